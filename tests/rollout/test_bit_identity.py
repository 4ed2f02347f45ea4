"""No draft, neighbour, pause or preemption changes a bit of a token or a log-prob in bfloat16."""

import os
import subprocess
import sys

import pytest

from paceline.rollout.native.build import instruction_set, runnable_instruction_sets
from paceline.rollout.native.products import load_products
from tests.support import ROOT

pytestmark = pytest.mark.skipif(load_products() is None, reason="no C++ compiler")


@pytest.mark.parametrize(
    "isa",
    [
        name if name == "native" else pytest.param(name, marks=pytest.mark.ci)
        for name in runnable_instruction_sets()
    ],
)
def test_no_bit_differs(isa):
    if isa == "amx" or (isa == "native" and load_products().on_matrix_units):
        pytest.skip("matrix units add up a tree node's keys in the order of their places")
    count = 200 if isa == "native" else 16
    run = subprocess.run(
        [sys.executable, "-m", "tests.rollout.bit_identity", str(count)],
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
