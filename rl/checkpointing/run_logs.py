"""A run's logs, from which the report takes its numbers, beside its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.drafter_trainer.storage.checksums import prefix_sum
from paceline.rl.process.files import read_lines, write_atomically

LOGS = ("metrics.jsonl", "timeline.jsonl")


def log_sums(run: Path) -> dict[str, tuple[int, str]]:
    """Returns the length in bytes and the checksum of each log."""
    return {name: prefix_sum(run / name) for name in LOGS if (run / name).is_file()}


def changed_logs(run: Path, state: Mapping[str, Any]) -> list[str]:
    """Returns a line for each log that no longer begins as it did when a checkpoint was made.

    Args:
        run: The run's directory.
        state: The checkpoint's state.
    """
    said = []
    for name, kept in state.get("logs", {}).items():
        try:
            if list(prefix_sum(run / name, kept[0])) == list(kept):
                continue
            reason = "has changed"
        except OSError as error:
            reason = (
                "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            )
        said.append(f"{run / name} {reason} since the checkpoint was made: the report's numbers may be wrong")
    return said


def keep_first_lines(path: Path, steps_done: int) -> int:
    """Drops the lines of a log that belong to steps after a checkpoint, and those that are broken.

    Args:
        path: A JSONL file whose lines have a "step".
        steps_done: The number of finished steps behind the checkpoint.

    Returns:
        The number of broken lines, without a last one that a kill has cut off.
    """
    if not path.exists():
        return 0
    lines, broken = read_lines(path)
    cut = broken > 0 and not path.read_bytes().endswith(b"\n")
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] < steps_done))
    return broken - cut
