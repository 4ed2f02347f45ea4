"""Errors that a user can act on."""


class UserError(Exception):
    """Bad configuration, data or files: one line saying what was wrong, where, and what to write instead.

    The launch scripts print it without a traceback and exit with status 2.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns an error's message on one line, cut after ``most`` characters, or the error's type where it has
    no message.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__
