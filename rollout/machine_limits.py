"""Limits on this process's share of the machine: cores by affinity and cgroups, memory by cgroups.

In a container, in a SLURM job or under ``taskset``, a process may use less than the whole machine. One thread
for every core of the machine would slow it down, and a cache sized by the machine's free memory would get it
killed. Both versions of cgroups are supported (Linux kernel, Documentation/admin-guide/cgroup-v1 and
cgroup-v2.rst); on other systems only the affinity is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def usable_cores(proc: Path = _PROC) -> int:
    """Returns the lower of CPU affinity and CPU quota in cores, rounded down to at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroups("cpu", proc) if (quota := _cpu_quota(folder)) is not None]
    return max(int(min([cores, *quotas])), 1)


def memory_limit(proc: Path = _PROC) -> int:
    """Returns the bytes this process may use in total: the lower of its memory and the cgroups' limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        [
            total,
            *(limit for folder in _cgroups("memory", proc) if (limit := _memory_quota(folder)) is not None),
        ]
    )


def available_memory(proc: Path = _PROC) -> int:
    """Returns the bytes that can be allocated now: the lower of MemAvailable and the cgroups' headroom.

    Raises:
        RuntimeError: /proc/meminfo has no MemAvailable.
        OSError: There is no /proc/meminfo.
    """
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable")
    for folder in _cgroups("memory", proc):
        limit = _memory_quota(folder)
        if limit is not None:
            free = min(free, max(limit - _unreclaimable_memory(folder), 0))
    return free


def _cgroups(controller: str, proc: Path) -> Iterator[Path]:
    """Yields the folders of the cgroups that limit this process, from its own up to the mounted root."""
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
            found = _cgroup_mount(mount, controller if controllers else None)
            if found is None:
                continue
            root, point = found
            inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
            folder = Path(point) / inside
            yield folder
            yield from (p for p in folder.parents if p.is_relative_to(point))


def _cgroup_mount(mount: str, controller: str | None) -> tuple[str, str] | None:
    """Returns the root and the mount point of a line of mountinfo, or None if it is another kind of mount.

    Args:
        mount: Line of mountinfo.
        controller: Controller that the mount must serve (cgroups version 1); None for the unified hierarchy
            of version 2.
    """
    before, _, after = mount.partition(" - ")
    kind, _, options = [*after.split(" ", 2), "", ""][:3]
    fits = kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(",")
    fields = before.split()
    return (fields[3], fields[4]) if fits and len(fields) > 4 else None


def _cpu_quota(folder: Path) -> float | None:
    """Returns the number of cores that a cgroup may keep busy, or None if it has no limit."""
    unified = _read(folder / "cpu.max")
    quota, period = (
        unified.split()
        if unified
        else (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
    )
    if not quota.isdigit() or not period.isdigit():  # "max", -1, or no file
        return None
    return int(quota) / int(period)


def _memory_quota(folder: Path) -> int | None:
    """Returns the bytes that a cgroup may use, or None if it has no limit."""
    limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    return int(limit) if limit.isdigit() else None


def _unreclaimable_memory(folder: Path) -> int:
    """Returns the bytes that a cgroup uses and cannot reclaim.

    The kernel reclaims inactive file pages under pressure, so they are not counted.
    """
    used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
    pages = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(used or 0) - int(pages.get("total_inactive_file", pages.get("inactive_file", 0)))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
