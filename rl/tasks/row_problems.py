"""Problems from the rows of a file or a table."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from paceline.rl.config.task import TaskConfig
from paceline.rl.data.conversations import question_of, with_ending
from paceline.rl.data.jsonl import JsonlFile
from paceline.rl.data.row_error import RowError
from paceline.rl.data.rows import read_row
from paceline.rl.data.survey import RowSource, Survey, survey
from paceline.rl.data.tables import huggingface_table, parquet_table
from paceline.rl.errors import UserError
from paceline.rl.tasks.problems import KEPT, Problem
from paceline.rl.tasks.verifiable import math_score


class RowProblems:
    """The rows of a file or a table, each read when it is wanted.

    Attributes:
        source: Of the rows.
    """

    def __init__(self, source: RowSource, config: TaskConfig) -> None:
        self.source, self._config = source, config
        self._made = lru_cache(KEPT)(self._make)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Problem:
        return self._made(number)

    def _make(self, number: int) -> Problem:
        entry = self.source.entry(number)
        try:
            row = read_row(entry, self._config.columns, self._config.reward is None)
        except RowError as error:
            raise UserError(f"{self.source.place(number)}: {error}") from None
        turns = (
            with_ending(row.turns, " " + self._config.instruction) if self._config.instruction else row.turns
        )
        return Problem(
            self.source.key(number),
            question_of(turns),
            row.gold,
            math_score(row.gold),
            entry,
            row.source or self.source.name,
            row.difficulty,
            turns if row.conversational else None,
        )

    def row_of(self, key: str) -> int | None:
        return self.source.row_of(key)

    @cached_property
    def survey(self) -> Survey:
        """What is known of all rows, after reading each once."""
        return survey(self.source, self._config)

    def difficulties(self) -> np.ndarray:
        return self.survey.difficulties


def rows_of(config: TaskConfig) -> RowSource:
    """The file or table that a recipe names.

    Raises:
        UserError: when it cannot be had.
    """
    if config.path is None:
        raise UserError(f"task.source is {config.source}: name what to read in task.path")
    if config.source == "jsonl":
        return JsonlFile(Path(config.path))
    return parquet_table(Path(config.path)) if config.source == "parquet" else huggingface_table(config)
