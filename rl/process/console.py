"""Where a command prints: a terminal with bars and colours, or a file with plain lines of any length."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console

_FILE_WIDTH = 10_000  # characters; a log's lines are never broken


def console(stream: TextIO | None = None) -> Console:
    """Returns a console for a stream, by default standard output.

    What is not a terminal gets no control characters, whatever ``FORCE_COLOR`` and ``COLUMNS`` say, and no
    line is wrapped.
    """
    out = sys.stdout if stream is None else stream
    if out.isatty():
        return Console(file=out)
    return Console(file=out, force_terminal=False, color_system=None, width=_FILE_WIDTH, soft_wrap=True)
