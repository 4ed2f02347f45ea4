"""What commands share. Imports nothing that takes long: help and mistakes are answered at once."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

Overrides = Annotated[list[str] | None, Argument(help="key=value", metavar="[KEY=VALUE]...")]
