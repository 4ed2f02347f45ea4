"""Reading a JSON object from a file, with what is wrong with the file in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, failure: type[Exception], missing: str = "missing") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: Of the file.
        failure: The exception to raise for a file that cannot be used; its message names the file and what is
            wrong with it.
        missing: What to say where there is no such file.

    Raises:
        Exception: ``failure``, for a file that is missing, cannot be read, is not JSON, or holds something
            else than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise failure(f"{path}: {missing}") from None
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise failure(f"{path}: truncated or not JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(found, dict):
        raise failure(f"{path}: holds a {type(found).__name__}, not an object with keys")
    return found
