"""Conversations with an environment, as tokens: what the policy said, what it was answered, and which of the
two each token is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.rl.errors import UserError
from paceline.rollout import Rollout

# stands for a turn of the policy's where a chat template is asked what follows one
_MARK = "paceline-marks-this-turn"


@dataclass(slots=True)
class Conversation:
    """One sample's conversation.

    Attributes:
        prompt: As the trainer handed it over: a text, or messages.
        prompt_ids: Its tokens.
        completion_ids: All tokens after it, the policy's and the environment's.
        logprobs: One for each completion token; 0 for the environment's.
        env_mask: One for each completion token: 1 for the policy's, which are trained on, 0 for the
            environment's.
        turns: The policy's turns so far, decoded without special tokens.
        columns: For the environment to write to; each key becomes a column that reward functions are given.
        over: Whether no turn follows.
    """

    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    env_mask: list[int] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    @property
    def token_ids(self) -> list[int]:
        """Everything so far: what the policy's next turn is drawn after."""
        return [*self.prompt_ids, *self.completion_ids]

    def add_turn(self, rollout: Rollout, tokenizer: Any) -> None:
        """Adds a turn of the policy's."""
        self.completion_ids += rollout.token_ids
        self.logprobs += rollout.logprobs
        self.env_mask += [1] * len(rollout.token_ids)
        self.turns.append(tokenizer.decode(rollout.token_ids, skip_special_tokens=True))

    def add_answer(self, ids: Sequence[int]) -> None:
        """Adds what the environment answered."""
        self.completion_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.env_mask += [0] * len(ids)


Answer = str | Sequence[int] | Sequence[Mapping[str, Any]] | None
Environment = Callable[[Conversation], Answer]


def answer_ids(
    tokenizer: Any, answer: Answer, last_token: int, template_options: Mapping[str, Any]
) -> list[int]:
    """Token ids of an environment's answer. What was said before is never tokenized again.

    Args:
        tokenizer: Of the policy.
        answer: Token ids, a text that goes on right after the policy's turn, or messages for the chat
            template.
        last_token: That the policy's turn ended with: where it is what the template ends a turn with, it is
            not repeated.
        template_options: For `apply_chat_template`.

    Raises:
        UserError: for an answer of another type, and for messages that the chat template cannot append.
    """
    if isinstance(answer, str):
        return list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    items = list(answer) if isinstance(answer, Sequence) else []
    if items and all(isinstance(item, Mapping) for item in items):
        text = _after_a_turn(tokenizer, items, tokenizer.decode([last_token]), template_options)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = [item for item in items if isinstance(item, int)]
    if isinstance(answer, Sequence) and len(ids) == len(items):
        return ids
    raise UserError(
        f"the environment answered {answer!r:.80}: return a text, token ids, messages, or None to end the "
        "conversation"
    )


def _after_a_turn(tokenizer: Any, messages: list[Any], ending: str, options: Mapping[str, Any]) -> str:
    """What a chat template writes between the end of an assistant's turn and the next one, with these
    messages in between.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "the environment answered with messages, and the tokenizer has no chat template: return a text"
        )
    talk = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(
            [*talk, *messages], add_generation_prompt=True, tokenize=False, **options
        )
    except Exception as error:  # whatever a template raises
        problem = " ".join(str(error).split())
        raise UserError(
            f"the chat template refuses the environment's messages ({problem}): return a text"
        ) from None
    before, mark, after = text.rpartition(_MARK)
    if not mark or _MARK not in before:
        raise UserError(
            "the chat template does not write an assistant's turn as it is: return a text that ends it "
            "instead"
        )
    return after.removeprefix(ending) if ending else after
