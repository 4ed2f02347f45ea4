"""A whole decoder layer in one call: the bits of its kernels one by one, and which layers run so."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.model.packed_linear import JoinedLinear, PackedLinear
from paceline.rollout.native import AttentionRule, Kernels, NativeLayer, RaggedTokens, load_kernels
from paceline.rollout.native.products import load_products
from tests.engines import tiny_llama
from tests.rollout.model.families import BY_KIND, tiny

pytestmark = pytest.mark.skipif(load_products() is None, reason="no C++ compiler")

HIDDEN, INTERMEDIATE, HEADS, KV, DIM = 64, 96, 4, 2, 32


@dataclass
class Norm:
    gain: torch.Tensor
    eps: float


def linear(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads_normed", [False, True])
@pytest.mark.parametrize("rule", [AttentionRule(0.2), AttentionRule(0.1, 5.0, 9)])
def test_one_call_gives_the_bits_of_its_kernels_one_by_one(dtype, bias, heads_normed, rule):
    torch.manual_seed(0)
    kernels = load_kernels("cpu", dtype)
    join = PackedLinear if dtype == torch.bfloat16 else JoinedLinear
    widths = HEADS * DIM, KV * DIM, KV * DIM
    qkv = join(*(linear(width, HIDDEN, bias, dtype) for width in widths))
    o = join(linear(HIDDEN, HEADS * DIM, bias, dtype))
    gate_up = join(*(linear(INTERMEDIATE, HIDDEN, bias, dtype) for _ in range(2)))
    down = join(linear(HIDDEN, INTERMEDIATE, bias, dtype))
    norms = [Norm(torch.randn(HIDDEN).to(dtype), 1e-5), Norm(torch.randn(HIDDEN).to(dtype), 1e-3)]
    head_norms = [Norm(torch.randn(DIM).to(dtype), 1e-2) for _ in range(2)] if heads_normed else []
    layer = NativeLayer([part.operands() for part in (qkv, o, gate_up, down)], norms, head_norms, rule)
    shape = 2, 3, KV, 128, DIM
    # one sequence reads a long prompt, one decodes, one verifies a tree of three nodes
    counts, starts = [70, 1, 4], [0, 50, 20]
    trunks = torch.cat([torch.arange(1, 71), torch.tensor([51]), torch.tensor([21] * 4)])
    depth = torch.tensor([0] * 71 + [0, 1, 1, 2])
    ancestors = torch.tensor([0] * 71 + [0, 1, 2, 5])
    tokens = RaggedTokens(
        [0, 1, 2], starts, counts, nodes=tuple(x.numpy() for x in (trunks, depth, ancestors))
    )
    hidden = torch.randn(1, 75, HIDDEN).to(dtype)
    rotary = torch.randn(1, 75, DIM).to(dtype), torch.randn(1, 75, DIM).to(dtype)
    cache = torch.randn(shape).to(dtype)
    other_cache = cache.clone()

    found = kernels.decoder_layer(layer, hidden, rotary, tokens, cache)

    gains = tuple(norm.gain for norm in head_norms) or None
    joined = qkv(kernels.rms_norm(hidden, norms[0].gain, 1e-5))
    heads = kernels.rotate_and_store(joined, rotary, gains, 1e-2, tokens, other_cache)
    middle = o(kernels.attend(heads, other_cache, tokens, rule), hidden)
    gated = kernels.silu_gate(gate_up(kernels.rms_norm(middle, norms[1].gain, 1e-3)))
    assert torch.equal(found, down(gated, middle))
    assert torch.equal(cache, other_cache)
    assert found.float().std() > 0.1


def layers_called(model: nn.Module, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> float:
    """Returns how many layers of a forward run in one call."""
    calls = []
    whole = Kernels.decoder_layer
    monkeypatch.setattr(Kernels, "decoder_layer", lambda *args: calls.append(1) or whole(*args))
    engine = RolloutEngine(model, dtype=dtype, max_slots=1, max_context=64)
    calls.clear()
    engine.generate([Request([5, 6, 7], SamplingParams(max_tokens=9))])
    return len(calls) / 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "wanted"), [("llama", 4), ("qwen2", 4), ("qwen3", 4), ("mistral", 4), ("gemma2", 0)]
)
def test_which_layers_run_in_one_call(kind, wanted, dtype, monkeypatch):
    assert layers_called(tiny(BY_KIND[kind]), monkeypatch, dtype) == wanted


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_new_and_moved_weights_are_read_after_a_refresh(dtype):
    model = tiny_llama(sharpness=8.0)
    request = Request([5, 6, 7], SamplingParams(0.0, max_tokens=12))
    engine = RolloutEngine(model, dtype=dtype, max_slots=1, max_context=64)
    before = engine.generate([request])[0].logprobs
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().mul_(1.5)
    engine.refresh_weights()
    after = engine.generate([request])[0].logprobs
    assert after != before
    fresh = RolloutEngine(model, dtype=dtype, max_slots=1, max_context=64)
    assert after == fresh.generate([request])[0].logprobs
