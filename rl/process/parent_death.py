"""Ends a process with the one that started it: ranks with their launcher, scoring processes with their rank.

This file imports neither torch nor transformers, because processes call it before anything slow.
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
    """Asks the kernel to kill this process when its parent ends, or ends it now if the parent is gone.

    The kernel watches the thread of the parent that started this process (prctl(2), PR_SET_PDEATHSIG). On
    systems other than Linux this function does nothing.

    Args:
        parent: Process id that the parent passed on; None for the current parent.
    """
    before = os.getppid() if parent is None else parent
    try:
        done = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if done == 0 and os.getppid() != before:  # the parent ended before the prctl call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """Ends a rank with the torchrun, ``accelerate launch``, srun or ``paceline train`` that started it.

    A rank that was started from a shell outlives the shell, which ``nohup`` relies on.
    """
    parent = os.getppid()
    program = _program(parent)
    if program.startswith(_LAUNCHERS):
        end_with_parent(parent)
    elif "TORCHELASTIC_RUN_ID" in os.environ and (parent == 1 or program in _REAPERS):
        # the launcher ended before this line, and init or a subreaper adopted this process
        os.kill(os.getpid(), signal.SIGKILL)


def _program(pid: int) -> str:
    """Returns the name of a process's executable, or of the script or module that Python runs.

    The name is empty if the process cannot be inspected.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if Path(words[0]).name.startswith("python"):
        words = [word for word in words[1:] if not word.startswith("-")] or [""]
    return Path(words[0]).name
