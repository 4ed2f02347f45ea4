"""Flash attention merged with own keys: outputs and gradients of attention that keeps all scores.

On a CPU, flash attention has a stand-in that computes what its interface promises, in float64.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from paceline.drafter_trainer.objective import unrolled_attention
from paceline.drafter_trainer.objective.unrolled_attention import Pieces, UnrolledAttention

LENGTHS, HEADS, KV, DIM, POSITIONS = (5, 1, 9), 4, 2, 16, 3
CONTEXTS = (3, 0, 7)  # tokens of left context of each piece
KEPT = ((0, 1, 3, 5, 6, 10, 14), (1, 5, 14), ())  # anchors at positions that attend in one call


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


def _scores(query, key, pieces: Pieces, scaling):
    scores = torch.einsum("qhd,khd->hqk", query, _repeated(key, query)) * scaling
    seen = torch.zeros(len(query), len(key), dtype=torch.bool)
    for (a, b), (c, d) in zip(*(itertools.pairwise(e) for e in ends(pieces)), strict=True):
        for anchor in range(a, b):  # the last anchor sees every feature of its piece
            seen[anchor, c : d - (b - 1 - anchor)] = True
    assert pieces.longest == int(pieces.anchor_ends.diff().max())
    assert pieces.longest_features == int(pieces.feature_ends.diff().max())
    return scores.masked_fill(~seen, float("-inf"))


def ends(pieces: Pieces) -> tuple[list[int], list[int]]:
    return pieces.anchor_ends.tolist(), pieces.feature_ends.tolist()


def batch_of(contexts, device: str) -> SimpleNamespace:
    """What attention reads of a batch whose pieces have `LENGTHS` anchors."""
    pieces = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return SimpleNamespace(pieces=pieces.to(device), counts=LENGTHS, context=SimpleNamespace(counts=contexts))


def outputs_and_gradients(
    device: str, dtype: torch.dtype, contexts=CONTEXTS
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of three draft positions in a row, each attending to those before it, and of three in one call."""
    generator = torch.Generator().manual_seed(0)

    def made(heads: int, count: int) -> torch.Tensor:
        drawn = torch.randn(1, heads, count, DIM, generator=generator)
        inputs.append(drawn.to(device, dtype).requires_grad_())
        return inputs[-1]

    batch = batch_of(contexts, device)
    inputs: list[torch.Tensor] = []
    context = (made(KV, sum(contexts)), made(KV, sum(contexts))) if sum(contexts) else None
    attention = UnrolledAttention(batch, DIM**-0.5, context)
    outs = [attention(*(made(heads, sum(LENGTHS)) for heads in (HEADS, KV, KV))) for _ in range(POSITIONS)]
    other = UnrolledAttention(batch, DIM**-0.5, context)
    other(*(made(heads, sum(LENGTHS)) for heads in (HEADS, KV, KV)))
    at_once = other.at_once([torch.tensor(rows, dtype=torch.long, device=device) for rows in KEPT])
    outs.append(at_once(*(made(heads, sum(map(len, KEPT))) for heads in (HEADS, KV, KV))))
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    sum((o * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    return outs, [x.grad for x in inputs if x.grad is not None]


def reference(query, keys, values, context) -> torch.Tensor:
    """Attention of one draft position written out: an anchor after the other, without any library."""
    outs, first, before = [], 0, 0
    for length, left in zip(LENGTHS, CONTEXTS, strict=True):
        for anchor in range(first, first + length):
            lines = []
            for x, c in zip((keys, values), context, strict=True):
                seen = [c[0, :, before : before + left], x[0][0, :, first : anchor + 1]]
                lines.append(torch.cat([*seen, *(y[0, :, anchor : anchor + 1] for y in x[1:])], 1))
            k, v = (x.repeat_interleave(HEADS // KV, 0) for x in lines)
            weights = ((query[0, :, anchor, None] * k).sum(-1) * DIM**-0.5).softmax(-1)
            outs.append((weights[..., None] * v).sum(1))
        first, before = first + length, before + left
    return torch.stack(outs)[None]


def test_anchors_attend_to_their_context_to_earlier_anchors_and_to_their_own_drafts():
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(CONTEXTS, "cpu")

    def made(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, DIM, dtype=torch.float64, generator=generator)

    context = made(KV, sum(CONTEXTS)), made(KV, sum(CONTEXTS))
    attention = UnrolledAttention(batch, DIM**-0.5, context)
    queries, keys, values = [], [], []
    for _ in range(POSITIONS):
        for line, heads in ((queries, HEADS), (keys, KV), (values, KV)):
            line.append(made(heads, sum(LENGTHS)))
        found = attention(queries[-1], keys[-1], values[-1])
        torch.testing.assert_close(found, reference(queries[-1], keys, values, context))
    rows = torch.tensor([1, 4, 4, 5, 8])  # of all pieces, one of them twice
    query, key, value = made(HEADS, 5), made(KV, 5), made(KV, 5)
    found = attention.branch(rows)(query, key, value)
    for number, row in enumerate(rows.tolist()):
        wide = [torch.zeros(1, n, sum(LENGTHS), DIM, dtype=torch.float64) for n in (HEADS, KV, KV)]
        for to, x in zip(wide, (query, key, value), strict=True):
            to[:, :, row] = x[:, :, number]
        expected = reference(wide[0], [*keys, wide[1]], [*values, wide[2]], context)
        torch.testing.assert_close(found[0, number], expected[0, row])


def test_positions_in_one_call_attend_as_positions_in_turn():
    generator = torch.Generator().manual_seed(2)

    def made(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, DIM, dtype=torch.float64, generator=generator)

    context = made(KV, sum(CONTEXTS)), made(KV, sum(CONTEXTS))
    attention = UnrolledAttention(batch_of(CONTEXTS, "cpu"), DIM**-0.5, context)
    first = [made(heads, sum(LENGTHS)) for heads in (HEADS, KV, KV)]
    attention(*first)
    kept = [torch.tensor(rows, dtype=torch.long) for rows in KEPT]
    query, key, value = (made(heads, sum(map(len, KEPT))) for heads in (HEADS, KV, KV))
    found = attention.at_once(kept)(query, key, value).split([len(rows) for rows in KEPT], 1)
    keys, values, start = [first[1]], [first[2]], 0
    for rows, outs in zip(kept, found, strict=True):
        wide = [torch.zeros(1, n, sum(LENGTHS), DIM, dtype=torch.float64) for n in (HEADS, KV, KV)]
        for to, x in zip(wide, (query, key, value), strict=True):
            to[:, :, rows] = x[:, :, start : start + len(rows)]
        keys, values, start = [*keys, wide[1]], [*values, wide[2]], start + len(rows)
        torch.testing.assert_close(outs, reference(wide[0], keys, values, context)[:, rows])


@pytest.mark.parametrize("contexts", [CONTEXTS, (0, 0, 0)])
def test_merged_attention_is_that_of_all_scores(monkeypatch, contexts):
    expected, gradients = outputs_and_gradients("cpu", torch.float64, contexts)
    monkeypatch.setattr(unrolled_attention, "flash_serves", lambda value: True)
    monkeypatch.setattr(unrolled_attention, "flash_forward", forward)
    monkeypatch.setattr(unrolled_attention, "flash_backward", backward)
    found, others = outputs_and_gradients("cpu", torch.float64, contexts)
    for a, b in zip([*found, *others], [*expected, *gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_float64_gives():
    expected, gradients = outputs_and_gradients("cuda", torch.float64)
    found, others = outputs_and_gradients("cuda", torch.bfloat16)
    for a, b in zip([*found, *others], [*expected, *gradients], strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
