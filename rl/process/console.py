"""Where a command prints: a terminal with bars and colours, or a file with plain lines of any length."""

from __future__ import annotations

import os
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


def announce(doing: str, *, data: bool = False) -> None:
    """Says what a command is about to do, before it imports torch and transformers, which takes seconds.

    Says nothing where torch is imported already, nor on any rank of a run but the first.

    Args:
        doing: A phrase such as ``reading the recipe``.
        data: Whether standard output is for a script to read, such as a path: the line then goes to a
            terminal's standard error or nowhere.
    """
    if "torch" in sys.modules or os.environ.get("RANK", "0") != "0" or (data and not sys.stderr.isatty()):
        return
    print(f"{doing} …", file=sys.stderr if data else sys.stdout, flush=True)
