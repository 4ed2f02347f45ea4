"""Defines parameters that several commands share.

This module imports nothing slow, so that help and usage errors appear at once.
"""

from __future__ import annotations

from typing import Annotated

from typer import Argument

Overrides = Annotated[
    list[str] | None,
    Argument(help="Changes of the recipe's keys, such as steps=20.", metavar="[KEY=VALUE]..."),
]
