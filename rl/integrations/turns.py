"""Represents conversations between the policy and an environment as tokens with a mask of their origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.rl.errors import UserError
from paceline.rollout import Rollout

# Placeholder for an assistant's turn, by which the end of that turn is found in a chat template's output.
_PLACEHOLDER = "paceline-marks-this-turn"


@dataclass(slots=True)
class Conversation:
    """The conversation of one sample.

    Attributes:
        prompt: Prompt as the trainer passed it, a text or messages.
        prompt_ids: Token ids of the prompt.
        completion_ids: Token ids after the prompt, both the policy's and the environment's.
        logprobs: Log-probs of the completion tokens; 0 for the environment's.
        env_mask: Mask of the completion tokens: 1 for the policy's, which are trained on, 0 for the
            environment's.
        turns: The policy's turns so far, decoded without special tokens.
        columns: Dictionary for the environment to write to; each key becomes a column for reward functions.
        finished: Whether no further turn follows.
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
        """All tokens so far, which are the prompt of the policy's next turn."""
        return [*self.prompt_ids, *self.completion_ids]

    def add_turn(self, rollout: Rollout, tokenizer: Any) -> None:
        """Appends a turn of the policy.

        Args:
            rollout: The turn.
            tokenizer: The policy's tokenizer.
        """
        self.completion_ids += rollout.token_ids
        self.logprobs += rollout.logprobs
        self.env_mask += [1] * len(rollout.token_ids)
        self.turns.append(tokenizer.decode(rollout.token_ids, skip_special_tokens=True))

    def add_answer(self, ids: Sequence[int]) -> None:
        """Appends the token ids of the environment's answer."""
        self.completion_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.env_mask += [0] * len(ids)


Answer = str | Sequence[int] | Sequence[Mapping[str, Any]] | None
Environment = Callable[[Conversation], Answer]


def answer_ids(
    tokenizer: Any, answer: Answer, last_token: int, template_options: Mapping[str, Any]
) -> list[int]:
    """Tokenizes an environment's answer. Earlier turns are never tokenized again.

    Args:
        tokenizer: The policy's tokenizer.
        answer: Token ids, a text that directly follows the policy's turn, or messages for the chat template.
        last_token: Last token of the policy's turn. If the template ends a turn with this token, it is not
            repeated.
        template_options: Keyword arguments for `apply_chat_template`.

    Raises:
        UserError: If the answer has another type, or the chat template cannot append the messages.
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
    """Returns the text that a chat template writes between two assistant turns, with messages in between.

    Args:
        tokenizer: The policy's tokenizer.
        messages: The environment's messages.
        ending: Text of the last token of the first turn, which is removed from the result's beginning.
        options: Keyword arguments for `apply_chat_template`.

    Raises:
        UserError: If there is no chat template, it raises an error, or it changes an assistant's turn.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "the environment answered with messages, and the tokenizer has no chat template: return a text"
        )
    turns = [{"role": "user", "content": _PLACEHOLDER}, {"role": "assistant", "content": _PLACEHOLDER}]
    try:
        text = tokenizer.apply_chat_template(
            [*turns, *messages], add_generation_prompt=True, tokenize=False, **options
        )
    except Exception as error:  # templates raise any type
        problem = " ".join(str(error).split())
        raise UserError(
            f"the chat template rejects the environment's messages ({problem}): return a text"
        ) from None
    before, placeholder, after = text.rpartition(_PLACEHOLDER)
    if not placeholder or _PLACEHOLDER not in before:
        raise UserError(
            "the chat template changes the text of an assistant's turn: return a text that ends the turn "
            "instead of messages"
        )
    return after.removeprefix(ending) if ending else after
