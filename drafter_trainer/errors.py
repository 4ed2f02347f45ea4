"""Errors about files that a user can act on."""


class DrafterError(Exception):
    """A drafter directory cannot be used; the one-line message names the file and what is wrong."""


class OptimizerStateError(Exception):
    """An optimizer's files cannot be used; the one-line message names the stem and what is wrong."""


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns an error's message on one line, cut after ``most`` characters.

    An error without a message is represented by the name of its type.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__
