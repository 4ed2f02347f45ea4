"""Checks every row of a data set before the first step, and keeps arrays for choosing rows later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from paceline.rl.config.task import TaskConfig
from paceline.rl.data.conversations import Message
from paceline.rl.data.row_error import RowError
from paceline.rl.data.rows import read_row
from paceline.rl.errors import UserError


class RowSource(Protocol):
    """A source of rows: a JSONL file or a table.

    Attributes:
        name: Short name, for keys.
    """

    name: str

    def __len__(self) -> int: ...
    def location(self, row: int) -> str:
        """Returns where a row is, for messages."""
        ...

    def key(self, row: int) -> str:
        """Returns the name of a row across epochs."""
        ...

    def row_of(self, key: str) -> int | None:
        """Returns the row with this `key`, or None if there is none."""
        ...

    def entry(self, row: int) -> Any:
        """Returns a row's columns by name."""
        ...

    def entries(self) -> Iterator[Any]:
        """Yields all rows in order."""
        ...


@dataclass(frozen=True, slots=True)
class Survey:
    """A summary of all rows, about 30 bytes per row.

    Attributes:
        prompts: uint64 [rows], digests of the conversations, equal for equal conversations.
        golds: uint64 [rows], digests of the reference answers, equal for equal answers.
        difficulties: float64 [rows], difficulty of each row.
        sizes: int32 [rows], size of the turns' texts in bytes.
        turns: int16 [rows], number of turns.
        role_sequences: First row of each sequence of roles that occurs.
    """

    prompts: np.ndarray
    golds: np.ndarray
    difficulties: np.ndarray
    sizes: np.ndarray
    turns: np.ndarray
    role_sequences: dict[tuple[str, ...], int] = field(default_factory=dict)


def survey(source: RowSource, config: TaskConfig) -> Survey:
    """Reads and checks every row once.

    Raises:
        UserError: If a row has no valid prompt or answer; the message names file and line of the first one.
    """
    count = len(source)
    result = Survey(
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint64),
        np.zeros(count, np.float64),
        np.zeros(count, np.int32),
        np.zeros(count, np.int16),
    )
    needs_gold = config.reward is None
    for number, entry in enumerate(source.entries()):
        try:
            row = read_row(entry, config.columns, needs_gold)
        except RowError as error:
            raise UserError(f"{source.location(number)}: {error}") from None
        try:
            text, gold = content(row.turns).encode("utf-8"), row.gold.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{source.location(number)}: half of a surrogate pair, since the text was cut inside a "
                "character; correct it"
            ) from None
        result.prompts[number] = _digest(text)
        result.golds[number] = _digest(gold)
        result.difficulties[number] = row.difficulty
        result.sizes[number], result.turns[number] = len(text), len(row.turns)
        result.role_sequences.setdefault(tuple([turn["role"] for turn in row.turns]), number)
    return result


def content(turns: tuple[Message, ...]) -> str:
    """Returns a conversation as one text, by which prompts are compared.

    A single question gives the same text whether it was written as text or as a list of messages.
    """
    if len(turns) == 1:
        return str(turns[0]["content"]).strip()
    return json.dumps([(turn["role"], turn["content"].strip()) for turn in turns], ensure_ascii=False)


def _digest(data: bytes) -> int:
    """Returns a 64-bit digest of the data."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def chosen_share(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Chooses about this fraction of the rows, by their digests and the seed alone.

    The choice is the same on every machine and for every order of the rows, and rows with equal digests are
    chosen together.

    Args:
        digests: uint64 [rows].
        share: Fraction of the rows, from 0 to 1.
        seed: Seed of the choice.

    Returns:
        bool [rows], whether a row is chosen.
    """
    mixed = digests ^ np.uint64(_digest(f"held out/{seed}".encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finalizer
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(min(int(share * 2**64), 2**64 - 1))
