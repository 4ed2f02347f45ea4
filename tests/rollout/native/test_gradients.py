"""Native backward passes beside float64 and torch's own derivation."""

import pytest
import torch

from paceline.rollout.native import AttentionRule, load_cpu_kernels
from paceline.rollout.native.gradients import HeadsInput, Pieces, load_gradient_kernels
from paceline.rollout.native.products import load_products

pytestmark = pytest.mark.skipif(load_products() is None, reason="no C++ compiler")


@pytest.fixture
def kernels():
    return load_gradient_kernels()


def numbers(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def test_a_transpose_is_packed_like_any_weight(kernels):
    matrix = numbers(64, 96)
    assert torch.equal(kernels.pack_transposed(matrix), load_products().pack(matrix.T.contiguous()))
    padded = torch.cat([matrix[:37], torch.zeros(27, 96).bfloat16()])
    assert torch.equal(kernels.pack_transposed(matrix[:37]), load_products().pack(padded.T.contiguous()))


@pytest.mark.parametrize("tokens", [1, 31, 32, 77])
def test_weight_gradients_are_added_up(kernels, tokens):
    of_output, x = numbers(tokens, 1088), numbers(tokens, 96, seed=1)
    total = torch.ones(1088, 96)
    packed, inputs = kernels.pack_transposed(of_output), kernels.pack_transposed(x)
    kernels.add_weight_gradient(packed, inputs, total)
    exact = of_output.double().T @ x.double()
    torch.testing.assert_close(total.double(), exact + 1, rtol=1e-5, atol=1e-4)
    part = torch.zeros(64, 96)
    kernels.add_weight_gradient(packed[32:96], inputs, part)
    torch.testing.assert_close(part.double(), exact[32:96], rtol=1e-5, atol=1e-4)


def test_norms(kernels):
    x, gain, of_output = numbers(9, 96), numbers(96, seed=1), numbers(9, 96, seed=2)
    inputs, gains = x.double().requires_grad_(), gain.double().requires_grad_()
    normed = inputs * (inputs.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gains
    normed.backward(of_output.double())
    grad = torch.full((9, 96), 0.5)
    rounded, of_gain = kernels.norm_backward(x, gain, 1e-5, of_output, grad)
    torch.testing.assert_close(grad.double(), inputs.grad + 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_gain.double(), gains.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(rounded, grad.bfloat16())


def test_gates(kernels):
    x, of_output = numbers(7, 128, scale=3), numbers(7, 64, seed=1)
    inputs = x.double().requires_grad_()
    gate, up = inputs.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).backward(of_output.double())
    torch.testing.assert_close(
        kernels.gate_backward(x, of_output).double(), inputs.grad, rtol=2**-8, atol=1e-5
    )


LENGTHS = ((5, 3, 40, 1), (1, 2), (70, 9, 21))


def visible(lengths, window):
    """The mask of packed texts, [T, T]: a token sees its prompt and its own sample up to itself."""
    total = sum(map(sum, lengths))
    mask, start = torch.zeros(total, total, dtype=torch.bool), 0
    for prompt, *samples in lengths:
        pieces, at = [(start, prompt)], start + prompt
        for count in samples:
            pieces.append((at, count))
            at += count
        for number, (first, count) in enumerate(pieces):
            for i in range(count):
                keys = [*(range(start, start + prompt) if number else ()), *range(first, first + i + 1)]
                mask[first + i, keys[-window:] if window else keys] = True
        start = at
    return mask


def attention(joined, rotary, gains, heads, kv_heads, rule, mask):
    """Attention in torch's operators from projections [T, (H + 2 KV) d]; queries and keys are rounded as the
    forward pass rounds them, which does not concern the derivative."""
    cos, sin = (x.to(joined.dtype) for x in rotary)
    dim = cos.shape[-1]
    split = joined.unflatten(-1, (-1, dim))

    def rotated(x, gain):
        if gain is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain
        low, high = x.chunk(2, dim=-1)
        x = x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
        return x + (x.detach().bfloat16().double() - x.detach())

    query, key = gains if gains is not None else (None, None)
    q, k = rotated(split[:, :heads], query), rotated(split[:, heads : heads + kv_heads], key)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, split[:, heads + kv_heads :]))
    scores = torch.einsum("qhd,khd->hqk", q, k) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "normed"), [(4, 4, 16, False), (6, 2, 64, True), (4, 1, 80, True)]
)
def test_attention(kernels, heads, kv_heads, dim, normed, softcap, window):
    total = sum(map(sum, LENGTHS))
    joined, of_output = numbers(total, (heads + 2 * kv_heads) * dim), numbers(total, heads * dim, seed=1)
    angles = torch.randn(total, dim // 2, generator=torch.Generator().manual_seed(2)).repeat(1, 2)
    rotary = angles.cos().bfloat16(), angles.sin().bfloat16()
    gains = (numbers(dim, seed=3), numbers(dim, seed=4)) if normed else None
    rule = AttentionRule(dim**-0.5, softcap, window)
    found, of_gains = kernels.attention_backward(
        HeadsInput(joined, rotary, gains, 1e-6, heads), Pieces(LENGTHS), rule, of_output
    )
    exact = joined.double().requires_grad_()
    wanted = None if gains is None else [g.double().requires_grad_() for g in gains]
    attention(exact, rotary, wanted, heads, kv_heads, rule, visible(LENGTHS, window)).backward(
        of_output.double()
    )
    assert error(found, exact.grad) < 0.004  # bfloat16 rounds by 0.002 on average
    if wanted is not None:
        for row, gain in zip(of_gains, wanted, strict=True):
            assert error(row, gain.grad) < 0.001


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [96, 1003])
def test_scores(kernels, temperature, vocabulary):
    logits, targets = numbers(11, vocabulary, scale=3), torch.arange(11) * 7
    logprobs, entropies, normalizers = kernels.score(logits, targets, temperature)
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact / temperature, -1)
    expected = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=1e-5)
    of_outputs = numbers(11, seed=1).float(), numbers(11, seed=2).float()
    sum((x * of.double()).sum() for x, of in zip(expected, of_outputs, strict=True)).backward()
    kernels.score_backward(logits, targets, temperature, (entropies, normalizers), of_outputs)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_scores_are_those_of_sampled_tokens(kernels):
    logits = numbers(50, 1003, scale=3)
    tokens, drawn = load_cpu_kernels("cpu", torch.bfloat16).draw(
        logits, torch.full((50,), 0.7), torch.linspace(0, 0.99, 50).double()
    )
    assert torch.equal(kernels.score(logits, tokens, 0.7)[0], drawn)


def test_logits_that_are_no_numbers_give_none(kernels):
    logits = numbers(2, 96)
    logits[1, 5] = float("inf")
    logprobs, entropies, _ = kernels.score(logits, torch.zeros(2, dtype=torch.long), 1.0)
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True]
