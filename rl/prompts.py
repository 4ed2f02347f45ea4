"""Questions to token ids and seeds."""

from __future__ import annotations

import hashlib
from typing import Any


def encode_prompt(tokenizer: Any, question: str, system: str | None) -> list[int]:
    """Token ids of a question: through the chat template where the tokenizer has one, else as plain text.

    Args:
        tokenizer: A transformers tokenizer.
        question: The user's turn.
        system: System message; None leaves the template's own. Ignored without a template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(question + "\n")["input_ids"])
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


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
