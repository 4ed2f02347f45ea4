"""Fitting a process to the machine it runs on."""

from __future__ import annotations

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def fit_process(local_world_size: int) -> None:
    """Shares the cores between the ranks of this machine and keeps freed memory for reuse within a step.

    glibc hands large freed blocks back to the kernel at once, and each micro-batch then faults them in again page by page; blocks
    of up to 32 MB are kept instead (``launch/bench.py update``, with and without ``--untuned``, shows the worth). Without glibc
    only the threads are set.
    """
    torch.set_num_threads(max((os.cpu_count() or 1) // max(local_world_size, 1), 1))
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def release_freed_memory() -> None:
    """Gives what `fit_process` keeps back to the kernel: between phases, so that fragments of many shapes do not add up."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
