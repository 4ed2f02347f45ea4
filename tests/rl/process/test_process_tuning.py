"""Threads of a rank: the user's word, else a share of the cores; and what its processor multiplies."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paceline.rl.process.process_tuning import multiplies_bfloat16, threads_of_rank
from paceline.rollout.machine_limits import usable_cores
from tests.support import ROOT


@pytest.mark.parametrize(
    ("asked", "ranks", "threads"),
    [
        ("3", 1, 3),
        ("3", 2, 3),
        ("1", 1, 1),
        ("5,2", 1, 5),
        ("", 1, None),
        ("0", 1, None),
        ("all", 1, None),
        ("", 4, None),
    ],
)
def test_threads(monkeypatch, asked, ranks, threads):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_of_rank(ranks) == (threads or max(usable_cores() // ranks, 1))


def test_a_share_of_what_a_cgroup_allows(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("paceline.rl.process.process_tuning.usable_cores", lambda: 24)
    assert [threads_of_rank(ranks) for ranks in (0, 1, 4, 7, 100)] == [24, 24, 6, 3, 1]


def test_bfloat16_is_multiplied_where_there_are_instructions_for_it():
    assert multiplies_bfloat16(torch.device("cuda"))
    if platform.machine() == "x86_64":
        flags = set(Path("/proc/cpuinfo").read_text().split())
        expected = {"avx512bw", "avx512vl", "avx512dq"} <= flags or "avx_ne_convert" in flags
        assert multiplies_bfloat16(torch.device("cpu")) == expected


@pytest.mark.ci
@pytest.mark.parametrize(("asked", "threads"), [(None, 8), ("1", 1)])
def test_torchruns_default_is_not_the_users_word(tmp_path, asked, threads):
    """torchrun gives each of several ranks OMP_NUM_THREADS=1 where the user has set nothing."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom paceline.rl.process import process_tuning\n"
        "process_tuning.usable_cores = lambda: 16\n"
        f"assert os.environ['OMP_NUM_THREADS'] == {asked or '1'!r}\n"
        "threads = process_tuning.threads_of_rank(int(os.environ['LOCAL_WORLD_SIZE']))\n"
        "os.write(1, f'threads {threads}\\n'.encode())\n"  # in one piece, beside the other rank's
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **({} if asked is None else {"OMP_NUM_THREADS": asked}),
    }
    if asked is None:
        environment.pop("OMP_NUM_THREADS", None)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["threads", str(threads)] * 2


RELEASE = """
from pathlib import Path
import torch
from paceline.rl.process.process_tuning import fit_process, release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

fit_process(1)
blocks = [torch.ones(2_500_000) for _ in range(40)]  # 10 MB each
kept, full = blocks[-1], resident()
del blocks
held = resident()
release_freed_memory()
print(full - held, held - resident(), float(kept.sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_until_it_is_released():
    """Below a block that is still in use, too."""
    ran = subprocess.run([sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True)
    without, with_release, kept = map(float, ran.stdout.split())
    assert without < 50e6
    assert with_release > 300e6
    assert kept == 2_500_000
