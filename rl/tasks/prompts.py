"""Problems to token ids and seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.data.conversations import Message, with_ending
from paceline.rl.errors import UserError, one_line
from paceline.rl.tasks.problems import Problem


def encode_problem(tokenizer: Any, problem: Problem, config: TaskConfig, ending: str = "") -> list[int]:
    """Token ids of a problem as it is asked: of its conversation, or of its question.

    Args:
        tokenizer: The policy's.
        problem: What is asked.
        config: The task section, for ``system`` and ``chat_template_kwargs``.
        ending: Appended to the last turn of the user's.

    Raises:
        UserError: when the chat template refuses the conversation, or there is none for a conversation of
            several turns.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return _encode(
            tokenizer, with_ending(messages_of(problem, config.system), ending), config.chat_template_kwargs
        )
    if len(problem.messages or ()) > 1:
        raise UserError(
            f"{problem.key} is a conversation of several turns, and the policy's tokenizer has no chat "
            "template: write the prompt "
            "as text, or take a policy with a template"
        )
    return encode_prompt(tokenizer, problem.question + ending, None)


def messages_of(problem: Problem, system: str | None) -> tuple[Message, ...]:
    """A problem's conversation, with the recipe's system message where it has none of its own."""
    turns = problem.messages or ({"role": "user", "content": problem.question},)
    if system is None or any(turn["role"] == "system" for turn in turns):
        return turns
    return ({"role": "system", "content": system}, *turns)


def encode_prompt(
    tokenizer: Any, question: str, system: str | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a question: through the chat template where the tokenizer has one, else as plain text.

    Args:
        tokenizer: A transformers tokenizer.
        question: The user's turn.
        system: System message; None leaves the template's own. Ignored without a template.
        chat_template_kwargs: Further arguments of the template.

    Raises:
        UserError: when the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(question + "\n")["input_ids"])
    messages = [{"role": "system", "content": system}] if system is not None else []
    return _encode(tokenizer, [*messages, {"role": "user", "content": question}], chat_template_kwargs or {})


def _encode(tokenizer: Any, turns: Sequence[Message], kwargs: Mapping[str, Any]) -> list[int]:
    """A last turn of the assistant's is continued; after any other a new one begins. Special tokens are the
    template's alone.
    """
    goes_on = (
        {"continue_final_message": True}
        if turns[-1]["role"] == "assistant"
        else {"add_generation_prompt": True}
    )

    def apply(messages: Sequence[Message]) -> list[int]:
        return list(
            tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, **goes_on, **kwargs
            )
        )

    try:
        return apply(turns)
    except Exception as error:  # a template raises what it likes
        reason = one_line(error, 300)
    if turns[0]["role"] == "system":
        try:
            apply(turns[1:])
        except Exception:
            raise UserError(f"the policy's chat template cannot be applied: {reason}") from None
        raise UserError(
            f"the policy's chat template refuses a system message ({reason}): write task.system: null, say "
            "it in task.instruction, "
            "and leave system turns out of the data"
        )
    raise UserError(f"the policy's chat template refuses {' → '.join(t['role'] for t in turns)}: {reason}")


def scored_text(tokenizer: Any, token_ids: Sequence[int], config: TaskConfig, stops: Sequence[int]) -> str:
    """What a scorer reads of a completion: with its special tokens, but for those that end it, where the
    recipe says so.

    Args:
        tokenizer: The policy's.
        token_ids: Of the completion.
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
    """Every end-of-sequence id that the tokenizer or the model's generation config names."""
    named = getattr(generation_config, "eos_token_id", None)
    ids = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def stable_seed(run_seed: int, step: int, key: str, sample: int) -> int:
    """A 63-bit seed that is equal on every machine and after a resume."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{key}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_key(problem: Problem) -> str:
    """What a problem's seeds follow from: its key, and which time of the step this is."""
    return problem.key if problem.repeat == 0 else f"{problem.key}/again {problem.repeat}"
