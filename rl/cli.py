"""What commands share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import transformers
from typer import Argument

from drafter_trainer.errors import DrafterError
from rl.errors import UserError

Overrides = Annotated[list[str] | None, Argument(help="key=value", metavar="[KEY=VALUE]...")]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Prints a `UserError` or `DrafterError` as one line and exits with status 2; anything else keeps its traceback.

    Also silences the progress bars of transformers' loading and saving, which would bury the run's own.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (UserError, DrafterError) as error:
        print(f"paceline: {error}", file=sys.stderr)
        raise SystemExit(2) from None
