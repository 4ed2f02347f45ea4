"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.errors import one_line as one_line


class UserError(Exception):
    """A mistake in a configuration, data or files that the user can correct.

    The message is one line that says what is wrong, where, and what to write instead. The launch scripts
    print it without a traceback and exit with status 2.
    """


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Prints a `UserError` or `DrafterError` as one line and exits with status 2.

    All other exceptions keep their traceback.
    """
    try:
        yield
    except (UserError, DrafterError) as error:
        print(f"paceline: {error}", file=sys.stderr)
        raise SystemExit(2) from None
