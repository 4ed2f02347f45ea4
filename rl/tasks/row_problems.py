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
from paceline.rl.tasks.problems import MAX_CACHED_PROBLEMS, Problem
from paceline.rl.tasks.verifiable import math_score


class RowProblems:
    """A collection of problems from rows, each read on demand.

    Args:
        source: The rows.
        config: The recipe's task section.

    Attributes:
        source: The rows.
    """

    def __init__(self, source: RowSource, config: TaskConfig) -> None:
        self.source, self._config = source, config
        self._cached_problem = lru_cache(MAX_CACHED_PROBLEMS)(self._create_problem)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Problem:
        return self._cached_problem(number)

    def _create_problem(self, number: int) -> Problem:
        entry = self.source.entry(number)
        try:
            row = read_row(entry, self._config.columns, self._config.reward is None)
        except RowError as error:
            raise UserError(f"{self.source.location(number)}: {error}") from None
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
        """Returns the number of the problem with this key, or None if there is none."""
        return self.source.row_of(key)

    @cached_property
    def survey(self) -> Survey:
        """A summary of all rows; the first access reads each row once."""
        return survey(self.source, self._config)

    def difficulties(self) -> np.ndarray:
        """Returns float64 [rows], the difficulty of each row."""
        return self.survey.difficulties


def rows_of(config: TaskConfig) -> RowSource:
    """Opens the file or table that a recipe names.

    Raises:
        UserError: If ``task.path`` is missing, or cannot be read.
    """
    if config.path is None:
        raise UserError(f"task.source is {config.source}, which needs task.path; write what to read there")
    if config.source == "jsonl":
        return JsonlFile(Path(config.path))
    return parquet_table(Path(config.path)) if config.source == "parquet" else huggingface_table(config)
