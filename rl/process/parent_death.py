"""Processes that end with the one that started them: ranks with their launcher, scorers with their rank.

This file imports neither torch nor transformers: processes call it first.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LAUNCHERS = (
    "torchrun",
    "torch.distributed",
    "accelerate",
    "deepspeed",
    "slurmstepd",
    "paceline",
    "mpirun",
    "orted",
    "prted",
    "hydra_pmi_proxy",
)
_REAPERS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "containerd-shim")


def end_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent ends, and ends at once where that has happened
    already.

    The kernel watches the parent's thread that started this process (prctl(2), PR_SET_PDEATHSIG). Elsewhere
    than on Linux nothing is done.

    Args:
        parent: Process id of the parent as the parent itself gave it; None takes the present one.
    """
    before = os.getppid() if parent is None else parent
    try:
        done = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if done == 0 and os.getppid() != before:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """`end_with_parent` for a rank that torchrun, ``accelerate launch``, srun or ``paceline train`` started.

    A run started from a shell goes on when the shell ends, as ``nohup`` wants it.
    """
    parent = os.getppid()
    program = _program(parent)
    if program.startswith(_LAUNCHERS):
        end_with_parent(parent)
    elif "TORCHELASTIC_RUN_ID" in os.environ and (parent == 1 or program in _REAPERS):
        # the launcher ended before this line, and the system took its child over
        os.kill(os.getpid(), signal.SIGKILL)


def _program(pid: int) -> str:
    """What a process runs: the name of its executable, or of Python's script or module; empty where that
    cannot be seen.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if Path(words[0]).name.startswith("python"):
        words = [word for word in words[1:] if not word.startswith("-")] or [""]
    return Path(words[0]).name
