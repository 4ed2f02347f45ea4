"""Tunes a process for its machine: torch's threads and glibc's memory allocator."""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from paceline.rollout.machine_limits import usable_cores

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_THREADS_VARIABLE = "OMP_NUM_THREADS"


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def fit_process(local_world_size: int) -> None:
    """Divides the cores among the ranks of this machine and makes glibc keep freed memory for reuse.

    By default glibc maps each large block separately and unmaps it when it is freed, so every micro-batch
    faults its pages in again: the kernel took half of an update's time. Here all blocks come from one heap,
    which all threads share and which is not trimmed (docs/benchmarks.md, the update phase). Without glibc
    only the number of threads is set.

    Args:
        local_world_size: Number of ranks on this machine.
    """
    torch.set_num_threads(threads_of_rank(local_world_size))
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def name_deepspeeds_device() -> None:
    """Tells DeepSpeed that this machine computes on CPUs, if it does.

    transformers and accelerate import DeepSpeed wherever it is installed; it warns where it finds no GPU.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether torch multiplies bfloat16 matrices on a device with instructions for that.

    On a CPU without AVX-512 (or NEON's bfloat16 instructions) such products take seven times as long
    as those of float32.
    The engine's own kernels do not depend on this.
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def without_slow_bfloat16(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context that turns autocast off where torch multiplies bfloat16 slowly.

    Modules then compute in the dtype of their parameters, which is float32 for those that are trained.

    Args:
        device: Device of the modules.
    """
    return nullcontext() if multiplies_bfloat16(device) else torch.autocast(device.type, enabled=False)


def release_freed_memory() -> None:
    """Returns freed memory to the system.

    The heap is not trimmed by itself (`fit_process`), and what one update leaves in it fits the next one's
    blocks badly: without this, a rank of the quickstart grows by a gigabyte in 20 steps.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def threads_of_rank(local_world_size: int) -> int:
    """Returns the number of threads that a rank computes with.

    Args:
        local_world_size: Number of ranks on this machine.

    Returns:
        ``OMP_NUM_THREADS`` if the user has set it, else the rank's share of the cores that affinity and
        cgroups allow.
    """
    ranks = max(local_world_size, 1)
    value = os.environ.get(_THREADS_VARIABLE, "").partition(",")[0]
    if value.isdigit() and int(value) > 0 and not (value == "1" and ranks > 1 and _is_torchrun_default()):
        return int(value)
    return max(usable_cores() // ranks, 1)


def _is_torchrun_default() -> bool:
    """Returns whether ``OMP_NUM_THREADS=1`` comes from torchrun, which sets it for several ranks by default.

    The variable is then in the rank's environment, but not in the environment that torchrun was started with.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        launcher_environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return not any(entry.startswith(f"{_THREADS_VARIABLE}=".encode()) for entry in launcher_environment)
