"""The Triton kernels compile for the GPUs that they are meant for, on a machine without one."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# in a process of its own: here, Triton interprets
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from paceline.rollout.native import triton_programs as programs

STEPS = dict.fromkeys(("page_step", "half_step", "head_step", "parts", "page"), "i32")
PAGES = dict(STEPS, pages="*i32", table="*i64")
SIZES = dict(HEADS=12, KV_HEADS=2, DIM=128)


def build(program, constants, **types):
    signature = {name: "constexpr" if name in constants else types[name] for name in program.arg_names}
    source = ASTSource(program, signature, {(program.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(program.__name__, len(compiled.asm["cubin"]))


for dtype in ("*bf16", "*fp32"):
    build(programs.rms_norm, dict(BLOCK=2048), x=dtype, gain=dtype, out=dtype, width="i32", eps="fp32")
    build(programs.silu_gate, dict(BLOCK=1024), gate=dtype, up=dtype, out=dtype, count="i32")
    names = "query", "key", "value", "cosines", "sines", "query_gain", "key_gain", "out", "cache"
    types = dict(dict.fromkeys(names, dtype), **PAGES, tokens="i32", eps="fp32")
    build(programs.rotate_and_store, dict(SIZES, BLOCK=128, NORM=True), **types)
    for tokens, splits in ((None, 1), (1, 16)):
        constants = dict(SIZES, BLOCK_D=128, ROWS=16, KEYS=32, SPLITS=splits, WINDOW=64, SOFTCAP=True)
        if tokens is not None:
            constants["tokens"] = tokens
        build(
            programs.attend, constants, **PAGES, query=dtype, cache=dtype, out=dtype, partial="*fp32",
            tokens="i32", scale="fp32", softcap="fp32",
        )
    build(programs.combine, dict(DIM=128, BLOCK_D=128, SPLITS=16), partial="*fp32", out=dtype, lines="i32")
    drawn = dict(logits=dtype, numbers="*fp64", blocks="*fp32", vocab="i32", rows="i32")
    build(programs.weigh_blocks, dict(BLOCK=4096, COUNT=64), **drawn)
    build(programs.draw, dict(BLOCK=4096, COUNT=64), **drawn, tokens="*i64", logprobs="*fp32")
"""


@pytest.mark.ci
def test_every_program_compiles_for_hopper(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    made = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert made.returncode == 0, made.stderr[-2000:]
    built = [line.split() for line in made.stdout.splitlines()]
    assert len(built) == 16
    assert all(int(size) > 1000 for _, size in built)
