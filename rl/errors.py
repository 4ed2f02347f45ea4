"""Errors that a user can act on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from paceline.drafter_trainer.errors import DrafterError


class UserError(Exception):
    """A mistake in a configuration, data or files that the user can correct.

    The message is one line that says what is wrong, where, and what to write instead. The launch scripts
    print it without a traceback and exit with status 2.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns an error's message on one line, cut after ``most`` characters.

    An error without a message is represented by the name of its type.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


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
