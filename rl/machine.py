"""Fitting a process to the machine it runs on."""

from __future__ import annotations

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def fit_process(local_world_size: int) -> None:
    """Shares the cores between the ranks of this machine and keeps freed memory for reuse.

    glibc maps large blocks anew and hands them back when they are freed, and each micro-batch then faults them in again page by
    page: half of an update's time was the kernel's. All blocks come from one heap instead, which all threads share and which is
    not trimmed (benchmarks/README.md, the update phase). Without glibc only the threads are set.
    """
    torch.set_num_threads(max((os.cpu_count() or 1) // max(local_world_size, 1), 1))
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)
