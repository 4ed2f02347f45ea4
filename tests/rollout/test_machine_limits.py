"""Cores and memory by affinity and cgroups, on folders laid out as Linux lays them out."""

import os

import pytest

from paceline.rollout.machine_limits import available_memory, memory_limit, usable_cores

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(folder, membership: str, mounts: list[str], files: dict[str, str]):
    """A /proc/self of one's own; ``{}`` in a mount is the folder that stands for /sys/fs/cgroup."""
    proc, tree = folder / "proc", folder / "tree"
    proc.mkdir()
    (proc / "cgroup").write_text(membership)
    (proc / "mountinfo").write_text("".join(mount.format(tree) + "\n" for mount in mounts))
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return proc


V2 = "24 1 0:22 / {} rw - cgroup2 cgroup2 rw"
V2_CONTAINER = "24 1 0:22 /docker/abc {} rw - cgroup2 cgroup2 rw"
V1 = "30 1 0:30 / {}/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "31 1 0:31 / {}/memory rw - cgroup cgroup rw,memory"


@pytest.mark.parametrize(
    ("membership", "mount", "files", "cores"),
    [
        ("0::/\n", V2, {}, CORES),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "max 100000\n"}, CORES),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "100000 100000\n"}, 1),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "190000 100000\n"}, 1),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "20000 100000\n"}, 1),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n"}, 1),
        ("0::/docker/abc\n", V2_CONTAINER, {"cpu.max": "100000 100000\n"}, 1),
        ("0::/../elsewhere\n", V2, {"cpu.max": "100000 100000\n"}, 1),
        (
            "4:cpu,cpuacct:/job\n0::/\n",
            V1,
            {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            "4:cpu,cpuacct:/job\n0::/\n",
            V1,
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            CORES,
        ),
        (
            "4:cpuset:/job\n",
            V1,
            {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"},
            CORES,
        ),
    ],
)
def test_cores(tmp_path, membership, mount, files, cores):
    assert usable_cores(machine(tmp_path, membership, [mount], files)) == cores


def test_affinity_counts():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("Linux only")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_where_there_is_no_proc_there_are_no_limits(tmp_path):
    assert usable_cores(tmp_path / "nothing") == CORES
    assert memory_limit(tmp_path / "nothing") > 0


@pytest.mark.parametrize(
    ("membership", "mount", "files"),
    [
        (
            "0::/job\n",
            V2,
            {
                "job/memory.max": "1000000000\n",
                "job/memory.current": "700000000\n",
                "job/memory.stat": "anon 5\ninactive_file 200000000\n",
            },
        ),
        (
            "5:memory:/job\n0::/\n",
            V1_MEMORY,
            {
                "memory/job/memory.limit_in_bytes": "1000000000\n",
                "memory/job/memory.usage_in_bytes": "700000000\n",
                "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 200000000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_memory(tmp_path, membership, mount, files):
    """Of 1 GB, 0.7 are held, of which 0.2 are file pages that Linux would give back: half is left."""
    proc = machine(tmp_path, membership, [mount], files)
    assert memory_limit(proc) == 1_000_000_000
    assert available_memory(proc) == 500_000_000
    assert memory_limit() >= available_memory() > 0
