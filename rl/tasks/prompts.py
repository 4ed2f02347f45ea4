"""Encodes problems as token ids, and derives their seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.data.conversations import Message, with_ending
from paceline.rl.errors import UserError, one_line
from paceline.rl.tasks.problems import Problem


def encode_problem(tokenizer: Any, problem: Problem, config: TaskConfig, ending: str = "") -> list[int]:
    """Returns the token ids of a problem's prompt: its conversation, or without a template its question.

    Args:
        tokenizer: The policy's tokenizer.
        problem: Problem to encode.
        config: The task section, for ``system`` and ``chat_template_kwargs``.
        ending: Text to append to the last user turn.

    Raises:
        UserError: If the chat template rejects the conversation, or there is no template for a conversation
            of several turns.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return _encode(
            tokenizer, with_ending(messages_of(problem, config.system), ending), config.chat_template_kwargs
        )
    if len(problem.messages or ()) > 1:
        raise UserError(
            f"{problem.key} is a conversation of several turns, but the policy's tokenizer has no chat "
            "template; write the prompt as text, or choose a policy with a template"
        )
    return encode_prompt(tokenizer, problem.question + ending, None)


def messages_of(problem: Problem, system: str | None) -> tuple[Message, ...]:
    """Returns a problem's conversation, preceded by the recipe's system message if it has none of its own."""
    turns = problem.messages or ({"role": "user", "content": problem.question},)
    if system is None or any(turn["role"] == "system" for turn in turns):
        return turns
    return ({"role": "system", "content": system}, *turns)


def encode_prompt(
    tokenizer: Any, question: str, system: str | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Returns the token ids of a question: by the chat template if the tokenizer has one, else as plain text.

    Args:
        tokenizer: A transformers tokenizer.
        question: Text of the user turn.
        system: System message; None keeps the template's own. Ignored without a template.
        chat_template_kwargs: Further arguments of the template.

    Raises:
        UserError: If the template rejects the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(question + "\n")["input_ids"])
    messages = [{"role": "system", "content": system}] if system is not None else []
    return _encode(tokenizer, [*messages, {"role": "user", "content": question}], chat_template_kwargs or {})


def _encode(tokenizer: Any, turns: Sequence[Message], kwargs: Mapping[str, Any]) -> list[int]:
    """Applies the chat template: continues a last assistant turn, and begins a new one after any other.

    No special tokens are added to those of the template.
    """
    continuation = (
        {"continue_final_message": True}
        if turns[-1]["role"] == "assistant"
        else {"add_generation_prompt": True}
    )

    def apply(messages: Sequence[Message]) -> list[int]:
        return list(
            tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, **continuation, **kwargs
            )
        )

    try:
        return apply(turns)
    except Exception as error:  # templates may raise any exception
        reason = one_line(error, 300)
    if turns[0]["role"] == "system":
        try:
            apply(turns[1:])
        except Exception:
            raise UserError(f"the policy's chat template cannot be applied: {reason}") from None
        raise UserError(
            f"the policy's chat template rejects a system message ({reason}); set task.system: null, move "
            "its text to task.instruction, and remove system turns from the data"
        )
    roles = " → ".join(turn["role"] for turn in turns)
    raise UserError(f"the policy's chat template rejects the roles {roles}: {reason}")


def scored_text(tokenizer: Any, token_ids: Sequence[int], config: TaskConfig, stops: Sequence[int]) -> str:
    """Returns the text of a completion that its scorer reads.

    With ``reward_sees_special_tokens`` it keeps special tokens, except for the stop tokens at the end.

    Args:
        tokenizer: The policy's tokenizer.
        token_ids: Token ids of the completion.
        config: The task section, for ``reward_sees_special_tokens``.
        stops: Token ids that end a completion.
    """
    if not config.reward_sees_special_tokens:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    end = len(token_ids)
    while end and token_ids[end - 1] in stops:
        end -= 1
    return str(tokenizer.decode(list(token_ids[:end]), skip_special_tokens=False))


def stop_token_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """Returns all end-of-sequence ids of the tokenizer and the model's generation config, ascending."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def stable_seed(run_seed: int, step: int, key: str, sample: int) -> int:
    """Returns a 63-bit seed that is the same on every machine and after a resume."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{key}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_key(problem: Problem) -> str:
    """Returns the text from which a problem's seeds are derived: its key, and its repeat in the step."""
    return problem.key if problem.repeat == 0 else f"{problem.key}/again {problem.repeat}"
