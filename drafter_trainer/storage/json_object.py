"""Reads JSON objects from files with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paceline.drafter_trainer.errors import one_line


def read_object(path: Path, failure: type[Exception], missing: str = "missing") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: Path of the file.
        failure: Type of the exception to raise; its message names the file and what is wrong with it.
        missing: What the message says if the file does not exist.

    Raises:
        Exception: ``failure``, if the file is missing, cannot be read, is not JSON, or holds something other
            than an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise failure(f"{path}: {missing}") from None
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise failure(f"{path}: truncated or not JSON ({one_line(error, 120)})") from None
    if not isinstance(data, dict):
        raise failure(f"{path}: holds a {type(data).__name__}, not an object with keys")
    return data
