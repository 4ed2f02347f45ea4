"""Reconstructs the command line of this process, for the record in files that it writes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """Returns this process's command as one would type it: ``paceline …`` or ``python launch/….py …``.

    ``paceline`` comes without the directory that it is installed in.
    """
    program = Path(sys.argv[0])
    command = ["paceline"] if program.name in ("paceline", "main.py") else ["python", sys.argv[0]]
    return shlex.join([*command, *sys.argv[1:]])
