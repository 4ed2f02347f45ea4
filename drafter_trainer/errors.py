"""Errors of files that a user can act on."""


class DrafterError(Exception):
    """A drafter directory that cannot be used: one line with the file and what is wrong."""


class OptimizerStateError(Exception):
    """An optimizer's files that cannot be used: one line with the stem and what is wrong."""
