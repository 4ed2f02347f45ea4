"""Names the vLLM into whose internals the plug-in, the scheduler and the drafter reach."""

from __future__ import annotations

from packaging.version import Version

_MAJOR, _MINOR = 0, 32


def is_our_release() -> bool:
    """Returns whether the vLLM of this process is of the release that this package is written for."""
    from vllm import __version__

    return Version(__version__).release[:2] == (_MAJOR, _MINOR)


def require_our_release(key: str) -> None:
    """Checks that what a key asks for can run in the vLLM of this process.

    Another release may start with it and fail in the middle of a rollout, so it is refused before.

    Args:
        key: The key that asks for it, as its user writes it.

    Raises:
        RuntimeError: It is of another release; the message is one line.
    """
    from vllm import __version__

    if not is_our_release():
        ours, following = f"{_MAJOR}.{_MINOR}", f"{_MAJOR}.{_MINOR + 1}"
        install = f"install vllm>={ours},<{following}"
        raise RuntimeError(f"{key} needs vLLM {ours}, and this is {__version__}: {install}, or drop {key}")
