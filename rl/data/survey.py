"""One pass over a data set before the first step: checks every row, and keeps as arrays what later steps
choose rows by.
"""

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
    """Where rows come from: a JSONL file or a table."""

    name: str

    def __len__(self) -> int: ...
    def place(self, row: int) -> str: ...
    def key(self, row: int) -> str: ...
    def row_of(self, key: str) -> int | None: ...
    def entry(self, row: int) -> Any: ...
    def entries(self) -> Iterator[Any]: ...


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of all rows, in about 30 bytes each.

    Attributes:
        prompts: uint64 [rows], equal where the conversations are.
        golds: uint64 [rows], equal where the reference answers are.
        difficulties: float64 [rows].
        sizes: int32 [rows], bytes of the turns' texts.
        turns: int16 [rows], how many turns there are.
        shapes: The first row of each sequence of roles that occurs.
    """

    prompts: np.ndarray
    golds: np.ndarray
    difficulties: np.ndarray
    sizes: np.ndarray
    turns: np.ndarray
    shapes: dict[tuple[str, ...], int] = field(default_factory=dict)


def survey(source: RowSource, config: TaskConfig) -> Survey:
    """Reads every row once.

    Raises:
        UserError: for the first row that cannot be asked or scored, named by file and line.
    """
    count = len(source)
    found = Survey(
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
            raise UserError(f"{source.place(number)}: {error}") from None
        try:
            text, gold = content(row.turns).encode("utf-8"), row.gold.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{source.place(number)}: half of a surrogate pair: the text was cut inside a character"
            ) from None
        found.prompts[number] = _digest(text)
        found.golds[number] = _digest(gold)
        found.difficulties[number] = row.difficulty
        found.sizes[number], found.turns[number] = len(text), len(row.turns)
        found.shapes.setdefault(tuple([turn["role"] for turn in row.turns]), number)
    return found


def content(turns: tuple[Message, ...]) -> str:
    """Returns a conversation as one text, by which prompts are compared. A single question gives the same
    text whether it was written as text or as a list of messages.
    """
    if len(turns) == 1:
        return str(turns[0]["content"]).strip()
    return json.dumps([(turn["role"], turn["content"].strip()) for turn in turns], ensure_ascii=False)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def chosen_share(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Chooses about this share of the rows. The choice follows from digests and seed alone: it is the same on
    every machine and in every order of the rows, and rows with equal digests are chosen together.

    Args:
        digests: uint64 [rows].
        share: From 0 to 1.
        seed: Of the choice.

    Returns:
        bool [rows].
    """
    mixed = digests ^ np.uint64(_digest(f"held out/{seed}".encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(min(int(share * 2**64), 2**64 - 1))
