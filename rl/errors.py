"""Errors that a user can act on."""


class UserError(Exception):
    """Bad configuration, data or files: one line saying what was wrong, where, and what to write instead.

    The launch scripts print it without a traceback and exit with status 2.
    """
