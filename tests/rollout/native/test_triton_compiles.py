"""The Triton kernels compile for the GPUs that they are meant for, on a machine without one."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.support import ROOT

# in a process of its own: here, Triton interprets
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from paceline.rollout.native import triton_programs as programs

TYPES = dict.fromkeys(("page_step", "half_step", "head_step", "parts", "page", "tokens"), "i32")
TYPES |= dict.fromkeys(("query", "cache", "out"), "*bf16") | dict.fromkeys(("scale", "softcap"), "fp32")
TYPES |= dict(pages="*i32", table="*i64", partial="*fp32")
SIZES = dict(HEADS=12, KV_HEADS=2, DIM=128, BLOCK_D=128)
SIZES |= dict(ROWS=16, KEYS=32, SPLITS=16, WINDOW=64, SOFTCAP=True)
for folded in (False, True):
    constants = dict(SIZES, FOLDED=folded)
    signature = dict(TYPES, **dict.fromkeys(constants, "constexpr"))
    signature = {name: signature[name] for name in programs.attend.arg_names}
    values = {(programs.attend.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(programs.attend, signature, values)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@pytest.mark.ci
def test_softcapped_attention_within_a_window_compiles_for_hopper(tmp_path):
    """What no engine of the test below launches."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    made = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert made.returncode == 0, made.stderr[-2000:]
    sizes = [int(line) for line in made.stdout.splitlines()]
    assert len(sizes) == 2 and min(sizes) > 1000


@pytest.mark.ci
def test_every_launch_of_an_engine_compiles_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run(
        [sys.executable, "-m", "tests.rollout.native.hopper_launches"],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    variants = dict(line.split() for line in made.stdout.splitlines())
    assert set(variants) == {
        "add", "add_norm", "attend", "combine", "draw", "follow", "multiply", "rms_norm", "rotate_and_store",
        "weigh_blocks",
    }  # fmt: skip
