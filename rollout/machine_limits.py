"""How much of the machine this process may use: cores by affinity and cgroups, memory by cgroups.

In a container, in a SLURM job or under ``taskset``, a process may use less than the whole machine. With a
thread for every core of the machine it would run slower, and with a cache sized by the machine's free memory
it would be killed. Both versions of cgroups are supported (Linux kernel, Documentation/admin-guide/cgroup-v1
and cgroup-v2.rst); other systems have no limits but affinity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def usable_cores(proc: Path = _PROC) -> int:
    """Returns the number of cores that this process may keep busy: its affinity or its CPU quota, rounded
    down; at least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroups("cpu", proc) if (quota := _cpu_quota(folder)) is not None]
    return max(int(min([cores, *quotas])), 1)


def memory_limit(proc: Path = _PROC) -> int:
    """Returns the bytes that this process may use in total: the machine's memory or the limit of its cgroups,
    whichever is less.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        [whole, *(limit for folder in _cgroups("memory", proc) if (limit := _memory(folder)) is not None)]
    )


def available_memory(proc: Path = _PROC) -> int:
    """Returns the bytes that can be allocated now: MemAvailable or what is left of the cgroups' limit,
    whichever is less.

    Raises:
        RuntimeError: when /proc/meminfo has no MemAvailable.
        OSError: when there is no /proc/meminfo.
    """
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable")
    for folder in _cgroups("memory", proc):
        limit = _memory(folder)
        if limit is not None:
            free = min(free, max(limit - _memory_held(folder), 0))
    return free


def _cgroups(controller: str, proc: Path) -> Iterator[Path]:
    """Folders of the cgroups that limit this process, from its own to the root of what is mounted."""
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            place = _mounted(mount, controller if controllers else None)
            if place is None:
                continue
            root, point = place
            inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
            folder = Path(point) / inside
            yield folder
            yield from (p for p in folder.parents if p.is_relative_to(point))


def _mounted(mount: str, controller: str | None) -> tuple[str, str] | None:
    """Root and mount point of a line of mountinfo, if it mounts the controller (version 1) or the one tree
    (None, version 2).
    """
    before, _, after = mount.partition(" - ")
    kind, _, options = [*after.split(" ", 2), "", ""][:3]
    fits = kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(",")
    fields = before.split()
    return (fields[3], fields[4]) if fits and len(fields) > 4 else None


def _cpu_quota(folder: Path) -> float | None:
    """Cores that a cgroup may keep busy; None for no limit."""
    whole = _read(folder / "cpu.max")
    quota, period = (
        whole.split() if whole else (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
    )
    if not quota.isdigit() or not period.isdigit():  # "max", -1, or no file
        return None
    return int(quota) / int(period)


def _memory(folder: Path) -> int | None:
    """Bytes that a cgroup may use; None for no limit."""
    limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    return int(limit) if limit.isdigit() else None


def _memory_held(folder: Path) -> int:
    """Bytes that a cgroup uses and cannot be made to give back: all but the file pages that were not read
    lately.
    """
    used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
    pages = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(used or 0) - int(pages.get("total_inactive_file", pages.get("inactive_file", 0)))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
