"""What commands share. Imports nothing that takes long: help and mistakes are answered at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from typer import Argument

Overrides = Annotated[list[str] | None, Argument(help="key=value", metavar="[KEY=VALUE]...")]


def say_first(doing: str, *, data: bool = False) -> None:
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
