"""The command that made a file, as one would type it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """This process's own: ``paceline …`` without the directory that it is installed in, or
    ``python launch/….py …``.
    """
    program = Path(sys.argv[0])
    start = ["paceline"] if program.name in ("paceline", "main.py") else ["python", sys.argv[0]]
    return shlex.join([*start, *sys.argv[1:]])
