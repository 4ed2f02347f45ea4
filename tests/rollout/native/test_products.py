"""Products of the engine against float64, row by row, and beside other users of the same registers."""

import gc

import pytest
import torch

from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.model.packed_linear import JoinedLinear, PackedLinear
from paceline.rollout.native.products import load_dot_products, load_products
from tests.engines import tiny_llama

pytestmark = pytest.mark.skipif(load_products() is None, reason="no C++ compiler")


def layer(outputs: int, inputs: int, bias: bool) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias).bfloat16()


@torch.no_grad()
@pytest.mark.parametrize(
    ("outputs", "inputs", "bias"),
    [(64, 32, False), (96, 576, True), (4128, 64, False), (99, 64, False), (70, 64, True)],
)
def test_products_match_float64(outputs, inputs, bias):
    source = layer(outputs, inputs, bias)
    packed = PackedLinear(source)
    for rows in (1, 5, 16, 17, 33, 80):
        x, residual = torch.randn(2, 1, rows, inputs).bfloat16(), torch.randn(1, rows, outputs).bfloat16()
        exact = torch.nn.functional.linear(
            x[0].double(), source.weight.double(), source.bias.double() if bias else None
        )
        # one rounding to bfloat16 of a sum that float32 has nearly exactly
        torch.testing.assert_close(packed(x[0]).double(), exact, rtol=2**-8, atol=1e-4)
        torch.testing.assert_close(
            packed(x[0], residual).double(), exact + residual.double(), rtol=2**-8, atol=1e-4
        )


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    """Bit for bit, or what is verified beside a sequence would change what it says."""
    packed = PackedLinear(layer(96, 576, bias=False))
    x = torch.randn(1, 70, 576).bfloat16()
    together = packed(x)
    for row in (0, 15, 16, 31, 32, 69):
        assert torch.equal(packed(x[:, row : row + 1])[0, 0], together[0, row])
    spoilt = x.clone()
    spoilt[0, 3] = float("nan")
    assert torch.equal(packed(spoilt)[0, 4:], together[0, 4:])


@torch.no_grad()
def test_a_row_is_summed_in_one_order():
    """Sums whose terms cancel are nothing but the rounding of their order, which bfloat16 otherwise hides."""
    source = layer(96, 576, bias=False)
    source.weight[:, 288:] = source.weight[:, :288]
    packed = PackedLinear(source)
    half = torch.randn(1, 70, 288).bfloat16()
    x = torch.cat([half, -half], dim=-1)
    together = packed(x)
    assert together.any()
    for row in range(70):
        assert torch.equal(packed(x[:, row : row + 1])[0, 0], together[0, row])
    for rows in (2, 5, 13, 16, 33):
        assert torch.equal(packed(x[:, :rows]), together[:, :rows])


@torch.no_grad()
def test_other_libraries_keep_their_tiles():
    """torch's own bfloat16 products use the same registers and may believe them set up from the call
    before."""
    source = layer(128, 256, bias=False)
    packed, x = PackedLinear(source), torch.randn(40, 256).bfloat16()
    theirs = source(x)
    for _ in range(3):
        ours = packed(x[None])[0]
        assert torch.equal(source(x), theirs)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


# float32 has its products as weights lie, and so has bfloat16 where inputs are not whole blocks
DOTS = [(torch.float32, 2**-20), (torch.bfloat16, 2**-8)]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "rounding"), DOTS)
@pytest.mark.parametrize("inputs", [16, 24, 37, 200])
def test_dot_products_match_float64(dtype, rounding, inputs):
    """Also of inputs that are not whole vectors, and of layers whose outputs come side by side."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(inputs, outputs, bias=biased).to(dtype)
        for outputs, biased in ((40, True), (7, False))
    ]
    products = load_dot_products("cpu", dtype)
    for rows in (1, 2, 3, 5, 17):
        x, residual = torch.randn(1, rows, inputs).to(dtype), torch.randn(1, rows, 47).to(dtype)
        exact = torch.cat([layer.double()(x.double()) for layer in layers], dim=-1)
        weights = [(layer.to(dtype).weight, layer.bias) for layer in layers]
        got = products.multiply(x, weights), products.multiply(x, weights, residual)
        torch.testing.assert_close(got[0].double(), exact, rtol=rounding, atol=1e-5)
        torch.testing.assert_close(got[1].double(), exact + residual.double(), rtol=rounding, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("linear", "dtype"),
    [(JoinedLinear, torch.float32), (JoinedLinear, torch.bfloat16), (PackedLinear, torch.bfloat16)],
)
def test_rows_of_dot_products_do_not_depend_on_the_others(linear, dtype):
    """Sums whose terms cancel are nothing but the rounding of their order."""
    source = layer(45, 200, bias=False).to(dtype)
    source.weight[:, 100:] = source.weight[:, :100]
    half = torch.randn(1, 23, 100).to(dtype)
    product, x = linear(source), torch.cat([half, -half], dim=-1)
    together = product(x)
    assert together.any()
    for rows in (1, 2, 3, 8, 22):
        assert torch.equal(product(x[:, :rows]), together[:, :rows])
        assert torch.equal(product(x[:, 23 - rows :]), together[:, 23 - rows :])


def test_speculation_in_bfloat16_says_what_plain_decoding_says():
    """Token for token and log-prob for log-prob: every row of a forward is computed the same way, whatever
    stands beside it. On matrix units, a tree node's ancestors lie elsewhere among the keys, so that sums are
    rounded in another order."""
    model = tiny_llama(vocab_size=128, layers=3, sharpness=30.0, hidden=128).bfloat16()
    requests = [
        Request([5, 6, 5, 6, 7 + i % 3], SamplingParams(max_tokens=120), seed=i, group=i % 3)
        for i in range(12)
    ]
    spoken = {}
    for strategy in ("plain", "suffix:3", "suffix:5x3/11"):
        engine = RolloutEngine(model, max_slots=5, max_context=160, max_nodes=11)
        engine.add_drafter(SuffixDrafter())
        engine.use_strategy(strategy)
        rollouts = engine.generate(requests)
        spoken[strategy] = [(r.token_ids, r.logprobs) for r in rollouts]
        assert strategy == "plain" or sum(r.stats.accepted for r in rollouts) > 0
    assert spoken["suffix:3"] == spoken["plain"]
    if not load_products().on_matrix_units:
        assert spoken["suffix:5x3/11"] == spoken["plain"]
    for (tree, tree_logprobs), (plain, plain_logprobs) in zip(
        spoken["suffix:5x3/11"], spoken["plain"], strict=True
    ):
        assert tree == plain
        assert tree_logprobs == pytest.approx(plain_logprobs, abs=1e-3)


@torch.no_grad()
def test_a_shared_copy_serves_what_is_built_later_on_its_layers():
    """And what is built on other layers, or after the copy is gone, has one of its own."""
    first, second = layer(64, 32, bias=False), layer(64, 32, bias=True)
    trained = PackedLinear(first)
    assert PackedLinear.shared(first) is not trained
    trained.share()
    assert PackedLinear.shared(first) is trained
    assert PackedLinear.shared(second) is not trained
    x = torch.randn(1, 3, 32).bfloat16()
    before = trained(x)
    first.weight.mul_(2)
    PackedLinear.shared(first).refresh()
    torch.testing.assert_close(trained(x), 2 * before)
    del trained
    gc.collect()
    assert PackedLinear.shared(first) is not PackedLinear.shared(first)
