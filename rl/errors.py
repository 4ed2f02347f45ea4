"""Errors that a user can act on."""


class UserError(Exception):
    """Bad configuration, data or files: one line saying what was wrong, where, and what to write instead.

    The launch scripts print it without a traceback and exit with status 2.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns the beginning of an error's message, of at most ``most`` characters, or its type where it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__
