"""A GPU's products compute what float64 does, and no row depends on another; see test_triton_kernels.py."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from paceline.rollout.native import gpu_tiles
from tests.rollout.native.test_triton_kernels import DEVICE, KERNELS, close, random


def layers(
    outputs: tuple[int, ...], inputs: int, bias: bool
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [
        (random(n, inputs, seed=n) * inputs**-0.5, random(n, seed=n + 1) if bias else None) for n in outputs
    ]


def reference(x: torch.Tensor, joined: list) -> torch.Tensor:
    return torch.cat(
        [x.double() @ w.double().T + (0 if b is None else b.double()) for w, b in joined], dim=-1
    )


@pytest.fixture(params=[132, 1], ids=["split", "whole"])
def processors(request, monkeypatch) -> None:
    """Multiprocessors that a product is divided among; one is enough for programs that run all parts."""
    monkeypatch.setattr(gpu_tiles, "_PROCESSORS", request.param)


@pytest.mark.parametrize(
    ("outputs", "inputs", "bias"), [((70,), 300, False), ((33, 20, 65), 129, True), ((64, 40), 256, False)]
)
@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_products(processors, rows, outputs, inputs, bias):
    x, joined = random(1, rows, inputs), layers(outputs, inputs, bias)
    residual = random(1, rows, sum(outputs), seed=3)
    expected = reference(x, joined)
    close(KERNELS.multiply(x, joined).parts.double().sum(0, keepdim=True), expected)
    close(KERNELS.linear(x, joined), expected)
    close(KERNELS.linear(x, joined, residual), expected + residual.double())


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_gate(rows, bias):
    x = random(1, rows, 300)
    joined = layers((45,), 300, bias) + layers((45,), 300, bias)[::-1]
    joined[1] = (joined[1][0].flip(0), joined[1][1])
    gate, up = reference(x, joined).chunk(2, dim=-1)
    close(KERNELS.gate(x, joined), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("width", [48, 100])
def test_sums_become_a_residual_and_its_norm(width):
    x, joined, gain = random(1, 5, 300), layers((width,), 300, True), random(width, seed=1)
    residual = random(1, 5, width, seed=2)
    expected = reference(x, joined) + residual.double()
    out, normed = KERNELS.add_norm(KERNELS.multiply(x, joined), residual, gain, 1e-5)
    close(out, expected)
    close(normed, expected * (expected.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double())
    assert torch.equal(out, KERNELS.add(KERNELS.multiply(x, joined), residual))


@pytest.fixture
def rounded_dots(monkeypatch) -> None:
    """Makes the interpreter's `dot` add in float64: numpy's float32 products round by their shapes."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, acc, *precision):
        product = a.data.astype("float64") @ b.data.astype("float64")
        return TensorHandle(product.astype("float32") + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def test_no_row_depends_on_the_others(rounded_dots):
    inputs, x = 300, random(1, 40, 300)
    joined, residual, gain = layers((70, 26), inputs, True), random(1, 40, 96, seed=2), random(96, seed=4)

    def everything(rows: slice) -> list[torch.Tensor]:
        part = x[:, rows]
        sums = KERNELS.multiply(part, joined)
        both = layers((48,), inputs, False) * 2
        return [
            KERNELS.linear(part, joined),
            *KERNELS.add_norm(sums, residual[:, rows], gain, 1e-5),
            KERNELS.gate(part, both),
        ]

    together = everything(slice(0, 40))
    for row in (0, 21, 39):
        for alone, among in zip(everything(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0, 0], among[0, row])


def test_parts_in_one_program_or_several_give_the_same_bits(monkeypatch):
    x, joined = random(1, 17, 700), layers((130,), 700, True)
    assert gpu_tiles.product_tiles(130, 700, 17, 4).written > 1
    several = KERNELS.linear(x, joined)
    whole = gpu_tiles.product_tiles

    def folded(*sizes: int) -> gpu_tiles.Tiles:
        return replace(whole(*sizes), folded=True)

    monkeypatch.setattr("paceline.rollout.native.triton_kernels.product_tiles", folded)
    assert torch.equal(KERNELS.linear(x, joined), several)


@pytest.mark.parametrize("bytes_per_value", [2, 4])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(2048, 1536), (1536, 8960), (17920, 1536), (151936, 1536), (4096, 14336), (96, 40)],
)
def test_parts_follow_from_the_weights_alone(outputs, inputs, bytes_per_value):
    tiles = [gpu_tiles.product_tiles(outputs, inputs, n, bytes_per_value) for n in (1, 7, 33, 128, 256, 8192)]
    assert len({(t.parts, t.length) for t in tiles}) == 1
    for t in tiles:
        assert (t.parts - 1) * t.length < inputs <= t.parts * t.length
        assert t.length % t.step == 0
        assert t.outputs >= 64 or bytes_per_value == 4
    assert tiles[-1].written == 1 or outputs < 256, "the sums of a long prompt are not written in parts"
