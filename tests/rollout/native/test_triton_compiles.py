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
from paceline.rollout.native import draw_programs as draws
from paceline.rollout.native import product_programs as products
from paceline.rollout.native import triton_programs as programs

STEPS = dict.fromkeys(("page_step", "half_step", "head_step", "parts", "page"), "i32")
PAGES = dict(STEPS, pages="*i32", table="*i64")
SIZES = dict(HEADS=12, KV_HEADS=2, DIM=128)


def build(program, constants, **types):
    signature = {name: "constexpr" if name in constants else types[name] for name in program.arg_names}
    source = ASTSource(program, signature, {(program.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == constants.get("PDL", False)
    print(program.__name__, len(compiled.asm["cubin"]))


for dtype in ("*bf16", "*fp32"):
    normed = dict(x=dtype, gain=dtype, out=dtype, width="i32", eps="fp32")
    build(programs.rms_norm, dict(BLOCK=2048, PDL=True), **normed)
    names = "x", "first", "second", "third", "first_bias", "second_bias", "third_bias"
    sizes = "rows", "first_outputs", "second_outputs", "outputs", "inputs", "length"
    types = dict(dict.fromkeys(names, dtype), **dict.fromkeys(sizes, "i32"))
    for outputs, tokens, gated in ((64, 16, False), (128, 128, True)):
        step = 64 if dtype == "*bf16" else 32
        tile = dict(TOKENS=tokens, OUTPUTS=outputs, STEP=step, PARTS=2, GATED=gated, BIAS=True, RAGGED=True)
        tile |= dict(LINE=64, AHEAD=8, PDL=True)
        build(products.multiply, tile, **types, out=dtype if gated else "*fp32")
    summed = dict(sums="*fp32", residual=dtype, out=dtype)
    build(products.add, dict(PARTS=4, RESIDUAL=True, BLOCK=1024, PDL=True), **summed, count="i32")
    row = dict(summed, gain=dtype, normed=dtype, width="i32", eps="fp32")
    build(products.add_norm, dict(PARTS=4, BLOCK=2048, PDL=True), **row)
    names = "cosines", "sines", "query_gain", "key_gain", "out", "cache"
    types = dict(dict.fromkeys(names, dtype), **PAGES, sums="*fp32", tokens="i32", eps="fp32")
    build(programs.rotate_and_store, dict(SIZES, BLOCK=128, NORM=True, PARTS=4, PDL=True), **types)
    for folded in (False, True):
        constants = dict(SIZES, BLOCK_D=128, ROWS=16, KEYS=32, SPLITS=16, WINDOW=64, SOFTCAP=True, PDL=True)
        build(
            programs.attend, dict(constants, FOLDED=folded), **PAGES, query=dtype, cache=dtype, out=dtype,
            partial="*fp32", tokens="i32", scale="fp32", softcap="fp32",
        )
    joined = dict(partial="*fp32", out=dtype, lines="i32")
    build(programs.combine, dict(DIM=128, BLOCK_D=128, SPLITS=16, PDL=True), **joined)
    drawn = dict(logits=dtype, numbers="*fp64", blocks="*fp32", vocab="i32", rows="i32")
    drawn |= dict(tokens="*i64", logprobs="*fp32")
    build(draws.weigh_blocks, dict(BLOCK=4096, COUNT=64), **drawn)
    build(draws.draw, dict(BLOCK=4096, COUNT=64), **drawn)
    trees = dict(drafted="*i64", found="*fp64", sequences="i32", width="i32")
    build(draws.follow, dict(BLOCK=4096, COUNT=64, NODES=16), **drawn, **trees)
"""


@pytest.mark.ci
def test_every_program_compiles_for_hopper(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    made = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert made.returncode == 0, made.stderr[-2000:]
    built = [line.split() for line in made.stdout.splitlines()]
    assert len(built) == 24
    assert all(int(size) > 1000 for _, size in built)


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
