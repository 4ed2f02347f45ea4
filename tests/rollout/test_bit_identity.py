"""No draft, neighbour, pause or preemption changes a bit of a token or a log-prob."""

import os
import subprocess
import sys

import pytest

from paceline.rollout.native.build import instruction_set, runnable_instruction_sets
from paceline.rollout.native.products import load_products
from tests.support import ROOT

pytestmark = pytest.mark.skipif(load_products() is None, reason="no C++ compiler")


# the best set is the machine's own, which every other test runs on too
SETS = [
    *(pytest.param(name, marks=pytest.mark.ci) for name in runnable_instruction_sets()[:-1]),
    instruction_set(),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("isa", SETS)
def test_no_bit_differs(isa, dtype):
    if isa == "amx" and dtype == "bfloat16":
        pytest.skip("matrix units add up a tree node's keys in the order of their places")
    # twelve requests have two long ones, of which one is preempted; the command takes any number
    count = 12 if isa != instruction_set() else 32 if dtype == "bfloat16" else 16
    run = subprocess.run(
        [sys.executable, "-m", "tests.rollout.bit_identity", str(count), dtype],
        cwd=ROOT,
        env={**os.environ, "PACELINE_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.count(" 0 differ") == 18


def test_an_instruction_set_that_cannot_be_is_said_in_a_line(monkeypatch):
    monkeypatch.setenv("PACELINE_ISA", "sse9")
    with pytest.raises(ValueError, match="PACELINE_ISA is 'sse9': write one of native, generic, avx2"):
        instruction_set()
    missing = {"avx2", "avx512", "avx512_bf16", "amx"} - set(runnable_instruction_sets())
    for name in missing:
        monkeypatch.setenv("PACELINE_ISA", name)
        with pytest.raises(ValueError, match="this processor has no"):
            instruction_set()
