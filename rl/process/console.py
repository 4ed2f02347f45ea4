"""Creates the console that a command prints to, and announces what takes seconds to import."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

_FILE_WIDTH = 10_000  # characters; a log's lines are never broken


def console(stream: TextIO | None = None) -> Console:
    """Returns a console for a stream.

    A stream that is not a terminal gets no control characters and no wrapped lines, whatever ``FORCE_COLOR``
    and ``COLUMNS`` say.

    Args:
        stream: Stream to print to; None for standard output.
    """
    out = sys.stdout if stream is None else stream
    if out.isatty():
        return Console(file=out)
    return Console(file=out, force_terminal=False, color_system=None, width=_FILE_WIDTH, soft_wrap=True)


def announce(doing: str, *, data: bool = False) -> None:
    """Prints what a command is about to do before it spends seconds on importing torch and transformers.

    Prints nothing if torch is imported already, or on ranks other than 0.

    Args:
        doing: Phrase such as ``reading the recipe``.
        data: Whether standard output holds data for a script, such as a path. The line then goes to standard
            error if that is a terminal, and is dropped otherwise.
    """
    if "torch" in sys.modules or os.environ.get("RANK", "0") != "0" or (data and not sys.stderr.isatty()):
        return
    print(f"{doing} …", file=sys.stderr if data else sys.stdout, flush=True)
