"""Fitting a process to the machine it runs on."""

from __future__ import annotations

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def fit_process(local_world_size: int) -> None:
    """Shares the cores between the ranks of this machine and keeps freed memory for reuse.

    glibc hands large freed blocks back to the kernel, and each training step then faults them in again page by page; keeping
    them made a training step of a 135M model on a CPU 1.8 times faster (benchmarks/README.md). Elsewhere this does nothing.
    """
    torch.set_num_threads(max((os.cpu_count() or 1) // max(local_world_size, 1), 1))
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 256 << 20)
