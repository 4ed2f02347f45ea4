"""Flash attention merged with own keys: outputs and gradients of attention that keeps all scores.

On a CPU, flash attention has a stand-in that computes what its interface promises, in float64.
"""

from types import SimpleNamespace

import pytest
import torch

from paceline.drafter_trainer import unrolled_attention
from paceline.drafter_trainer.packing import DraftBatch
from paceline.drafter_trainer.unrolled_attention import Pieces, UnrolledAttention

LENGTHS, HEADS, KV, DIM, POSITIONS = (5, 1, 9), 4, 2, 16, 3


def forward(query, key, value, pieces: Pieces, scaling):
    scores = _scores(query, key, pieces, scaling)
    weights = scores.softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, _repeated(value, query))
    return out, scores.logsumexp(-1), torch.zeros(2), torch.zeros(2)


def backward(grad, lines, merged, pieces: Pieces, scaling, state):
    """FlashAttention-2's gradients, whose weights are exp(score − log-sum-exp)."""
    query, key, value = lines
    out, logsumexp = merged
    weights = torch.exp(_scores(query, key, pieces, scaling) - logsumexp[..., None])
    of_value = torch.einsum("hqk,qhd->khd", weights, grad)
    of_weights = torch.einsum("qhd,khd->hqk", grad, _repeated(value, query))
    slopes = weights * (of_weights - (grad * out).sum(-1).T[..., None]) * scaling
    of_key = torch.einsum("hqk,qhd->khd", slopes, query)
    summed = (x.unflatten(1, (KV, -1)).sum(2) for x in (of_key, of_value))
    return torch.einsum("hqk,khd->qhd", slopes, _repeated(key, query)), *summed


def _repeated(line, query):
    return line.repeat_interleave(query.shape[1] // line.shape[1], 1)


def _scores(query, key, pieces, scaling):
    scores = torch.einsum("qhd,khd->hqk", query, _repeated(key, query)) * scaling
    at = torch.arange(len(query))
    piece = torch.bucketize(at, pieces.ends[1:].long(), right=True)
    seen = (piece[:, None] == piece) & (at[:, None] >= at)
    assert pieces.longest == int(pieces.ends.diff().max())
    return scores.masked_fill(~seen, float("-inf"))


def outputs_and_gradients(device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of three draft positions in a row, each attending to those before it."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor(LENGTHS)
    batch = SimpleNamespace(
        pieces=torch.arange(len(LENGTHS)).repeat_interleave(numbers).to(device),
        positions=torch.cat([torch.arange(n) for n in LENGTHS]).to(device),
    )
    batch.attends = lambda rows: DraftBatch.attends(batch, rows)
    attention = UnrolledAttention(batch, DIM**-0.5)
    outs, inputs = [], []
    for _ in range(POSITIONS):
        for heads in (HEADS, KV, KV):
            made = torch.randn(1, heads, sum(LENGTHS), DIM, generator=generator)
            inputs.append(made.to(device, dtype).requires_grad_())
        outs.append(attention(*inputs[-3:]))
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    sum((o * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    return outs, [x.grad for x in inputs]


def test_merged_attention_is_that_of_all_scores(monkeypatch):
    expected, gradients = outputs_and_gradients("cpu", torch.float64)
    monkeypatch.setattr(unrolled_attention, "flash_serves", lambda value: True)
    monkeypatch.setattr(unrolled_attention, "flash_forward", forward)
    monkeypatch.setattr(unrolled_attention, "flash_backward", backward)
    found, others = outputs_and_gradients("cpu", torch.float64)
    for a, b in zip([*found, *others], [*expected, *gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_float64_gives():
    expected, gradients = outputs_and_gradients("cuda", torch.float64)
    found, others = outputs_and_gradients("cuda", torch.bfloat16)
    for a, b in zip([*found, *others], [*expected, *gradients], strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
