"""Errors about files that a user can act on."""


class DrafterError(Exception):
    """A drafter directory cannot be used; the one-line message names the file and what is wrong."""


class OptimizerStateError(Exception):
    """An optimizer's files cannot be used; the one-line message names the stem and what is wrong."""
