"""Fitting a process to the machine it runs on."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from paceline.rollout.machine_limits import usable_cores

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_THREADS = "OMP_NUM_THREADS"


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def fit_process(local_world_size: int) -> None:
    """Shares the cores between the ranks of this machine and keeps freed memory for reuse.

    glibc maps large blocks anew and hands them back when they are freed, and each micro-batch then faults
    them in again page by
    page: half of an update's time was the kernel's. All blocks come from one heap instead, which all threads
        share and which is
    not trimmed (docs/benchmarks.md, "The update"). Without glibc only the threads are set.
    """
    torch.set_num_threads(threads_of_rank(local_world_size))
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def threads_of_rank(local_world_size: int) -> int:
    """Returns the number of threads that a rank computes with.

    Args:
        local_world_size: Number of ranks on this machine.

    Returns:
        ``OMP_NUM_THREADS`` if the user has set it, else the rank's share of the cores that affinity and
        cgroups allow.
    """
    ranks = max(local_world_size, 1)
    asked = os.environ.get(_THREADS, "").partition(",")[0]
    if asked.isdigit() and int(asked) > 0 and not (asked == "1" and ranks > 1 and _is_torchruns_default()):
        return int(asked)
    return max(usable_cores() // ranks, 1)


def _is_torchruns_default() -> bool:
    """Tells whether torchrun has set ``OMP_NUM_THREADS=1``, as it does for several ranks when the user has
    not set it.

    The variable is then in the rank's environment, but not in the environment that torchrun was started with.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return not any(entry.startswith(f"{_THREADS}=".encode()) for entry in started_with)
