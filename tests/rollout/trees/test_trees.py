"""Draft trees: their shape, who sees whom, the best tree for a budget, and the accepted path in the cache."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.rollout import Request, SamplingParams
from paceline.rollout.model.attention import chain_seats, grouped_attention, seat_bias, tree_seats
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.native import AttentionRule, RaggedTokens, load_kernels
from paceline.rollout.trees import DraftTree, chain_parents, child_table, tree_shape
from paceline.rollout.trees.expander import TreeLimits, draw_without_replacement
from paceline.rollout.trees.ranked import grow_dynamic, grow_opt_tree
from tests.engines import full_engine, tiny_llama
from tests.rollout.verify.verifier_cases import Chooser, Process, after

parents_lists = st.lists(st.integers(-1, 30), min_size=1, max_size=30).map(
    lambda xs: [min(p, i - 1) for i, p in enumerate(xs)]
)


@settings(max_examples=100, deadline=None)
@given(parents_lists)
def test_shape_and_children_of_any_tree(parents):
    depth, ancestors = tree_shape(torch.tensor([parents]))
    for node in range(len(parents)):
        path, at = [], node
        while at >= 0:
            path.append(at)
            at = parents[at]
        assert depth[0, node] == len(path)
        assert ancestors[0, node] == sum(1 << i for i in path)
    table = child_table(
        DraftTree(torch.zeros(1, len(parents)).long(), torch.tensor([len(parents)]), torch.tensor([parents]))
    )[0]
    for above in range(-1, len(parents)):
        assert [c for c in table[above + 1].tolist() if c >= 0] == [
            i for i, p in enumerate(parents) if p == above
        ]


def test_a_chain_is_a_tree():
    tokens, lengths = torch.tensor([[4, 5, 6]]), torch.tensor([2])
    chain = child_table(DraftTree(tokens, lengths))
    tree = child_table(DraftTree(tokens, lengths, chain_parents(1, 3)))
    assert torch.equal(chain, tree)
    assert chain[0, :, 0].tolist() == [0, 1, -1, -1], "what is past the length is no child"
    depth, ancestors = tree_shape(chain_parents(1, 3))
    assert torch.equal(
        tree_seats(torch.tensor([7]), depth, ancestors)[0], chain_seats(torch.arange(7, 11)[None])[0]
    )
    for window in (None, 4):
        bias = seat_bias(tree_seats(torch.tensor([7]), depth, ancestors), 16, window, torch.float32)
        assert torch.equal(bias, seat_bias(chain_seats(torch.arange(7, 11)[None]), 16, window, torch.float32))


def test_native_tree_attention_is_the_masked_one():
    """Trees of two sequences over more keys than one chunk, against torch's operators with the mask written
    out.
    """
    torch.manual_seed(0)
    kernels = load_kernels("cpu", torch.float32)
    if kernels is None:
        pytest.skip("no compiler")
    parents = torch.tensor([[-1, 0, 0, 1, -1, 4], [-1, -1, 1, 2, 3, 0]])
    depth, ancestors = tree_shape(parents)
    starts = torch.tensor([251, 40])
    seats = tree_seats(starts, depth, ancestors)
    tokens = RaggedTokens.from_seats(seats)
    cache, query = torch.randn(2, 2, 2, 384, 32), torch.randn(2, 7, 4, 32)
    got = kernels.attend(query.reshape(1, 14, 4, 32), cache, tokens, AttentionRule(0.3)).view(2, 7, 4, 32)
    bias = seat_bias(seats, 384, None, torch.float32)[:, None, None]
    expected = grouped_attention(query.transpose(1, 2), cache[0], cache[1], bias, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    positions = tokens.positions.view(2, 7)
    assert torch.equal(positions, starts[:, None] + torch.nn.functional.pad(depth, (1, 0)))


@pytest.mark.parametrize("native", [True, False])
def test_the_accepted_path_stays_in_the_cache(native, monkeypatch):
    from paceline.rollout.model import kv_cache

    if not native:
        monkeypatch.setattr(kv_cache, "load_cpu_kernels", lambda device, dtype: None)
    cache = SlotCache(CacheShape(2, 2, 16, 3, 40, 5, torch.float32), torch.device("cpu"))
    for layer in range(2):
        cache.lines(layer).copy_(torch.randn(2, 3, 2, 40, 16))
    cache.taps.copy_(torch.randn(3, 40, 5))
    before = [cache.lines(layer).clone() for layer in range(2)]
    taps = cache.taps.clone()
    cache.keep_paths([10, 20, 5], [[0, 3, 4], [], [2, 5]])
    for layer, old in enumerate(before):
        now = cache.lines(layer)
        assert torch.equal(now[:, 0, :, 10:13], old[:, 0, :, [10, 13, 14]])
        assert torch.equal(now[:, 1], old[:, 1])
        assert torch.equal(now[:, 2, :, 5:7], old[:, 2, :, [7, 10]])
    assert torch.equal(cache.taps[0, 10:13], taps[0, [10, 13, 14]])
    assert torch.equal(cache.taps[2, 5:7], taps[2, [7, 10]])


@pytest.mark.parametrize("kernels", [True, False], ids=["native", "torch"])
def test_tree_decoding_on_both_paths_gives_the_tokens_of_plain_decoding(kernels, monkeypatch):
    from paceline.rollout.model import fusion_check

    if not kernels:
        monkeypatch.setattr(fusion_check, "load_kernels", lambda device, dtype: None)
    model = tiny_llama(97, sharpness=6.0)
    engine = full_engine(model, slots=3, max_nodes=12, graphs=not kernels)
    requests = [
        Request([5, 6, 7, i % 2], SamplingParams(max_tokens=60), seed=i, group=i % 2) for i in range(6)
    ]
    plain = engine.generate(requests)
    for strategy in ("suffix:5x3/12", "recycling:3x4/11", "eagle3:4x3/9"):
        engine.use_strategy(strategy)
        again = engine.generate(requests)
        assert [r.token_ids for r in again] == [r.token_ids for r in plain]
        for a, b in zip(again, plain, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def every_tree(process: Process, depth: int) -> dict[tuple[int, ...], float]:
    """Value of every node (path of tokens) of the whole tree: the product of the drafter's probabilities."""
    values = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(5), repeat=length):
            state, value = torch.tensor(0), 1.0
            for token in path:
                value *= float(process.drafter[state, token])
                state = after(state, torch.tensor(token))
            values[path] = value
    return values


def paths_of(draft: DraftTree) -> set[tuple[int, ...]]:
    paths, found = [], set()
    for node in range(int(draft.lengths[0])):
        above = int(draft.parents[0, node])
        paths.append((*(paths[above] if above >= 0 else ()), int(draft.tokens[0, node])))
        found.add(paths[-1])
    return found


@pytest.mark.parametrize("seed", range(6))
def test_with_full_width_the_tree_is_the_best_for_its_budget(seed):
    """OPT-Tree's claim, by enumeration: no tree of so many nodes has a larger expected acceptance length."""
    process = Process(seed)
    values = every_tree(process, 3)
    best = sorted(values.values(), reverse=True)[:9]
    for draft in (
        grow_opt_tree(Chooser(process, 1), TreeLimits(3, 5, 9), gain=0.0),
        grow_dynamic(Chooser(process, 1), TreeLimits(3, 5, 9)),
    ):
        found = paths_of(draft)
        assert len(found) == 9
        if draft.tokens.shape[1] == 9:
            total = sum(values[path] for path in found)
            assert total >= 0.98 * sum(best)
    opt = grow_opt_tree(Chooser(process, 1), TreeLimits(3, 25, 9), gain=0.0)
    assert sum(values[path] for path in paths_of(opt)) == pytest.approx(sum(best), rel=1e-5)


def test_opt_tree_stops_when_a_level_adds_too_little():
    process = Process(0)
    shallow = grow_opt_tree(Chooser(process, 1), TreeLimits(5, 3, 9), gain=10.0)
    deep = grow_opt_tree(Chooser(process, 1), TreeLimits(5, 3, 9), gain=0.0)
    assert int(tree_shape(shallow.parents)[0].max()) == 2 < int(tree_shape(deep.parents)[0].max())


def test_nodes_are_in_order_of_value_and_after_their_parents():
    draft = grow_dynamic(Chooser(Process(3), 1), TreeLimits(4, 3, 12))
    assert all(p < i for i, p in enumerate(draft.parents[0].tolist()))
    values = every_tree(Process(3), 4)
    ordered = []
    for node in range(12):
        above = int(draft.parents[0, node])
        ordered.append((*(ordered[above] if above >= 0 else ()), int(draft.tokens[0, node])))
    assert [values[p] for p in ordered] == sorted((values[p] for p in ordered), reverse=True)


def test_gumbel_top_k_is_sampling_without_replacement():
    """Frequencies of ordered pairs against q(a) q(b) / (1 − q(a)), and the distributions it reports."""
    q = torch.tensor([0.5, 0.3, 0.15, 0.05])
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(200_000, 4, dtype=torch.float64, generator=g)
    chosen, drawn_from = draw_without_replacement(q.expand(200_000, 4), noise, 2)
    counts = np.zeros((4, 4))
    np.add.at(counts, (chosen[:, 0].numpy(), chosen[:, 1].numpy()), 1 / 200_000)
    for a, b in itertools.permutations(range(4), 2):
        assert counts[a, b] == pytest.approx(float(q[a] * q[b] / (1 - q[a])), abs=0.005)
    assert torch.allclose(drawn_from[:, 0], q.expand(200_000, 4))
    first = chosen[0, 0]
    expected = q.clone()
    expected[first] = 0
    assert torch.allclose(drawn_from[0, 1], expected / expected.sum())
    few, reported = draw_without_replacement(torch.tensor([[1.0, 0.0, 0.0]]), noise[:1, :3], 3)
    assert few[0, 0] == 0 and torch.allclose(reported.sum(-1), torch.ones(1, 3))
    assert float(reported[0, 1, few[0, 1]]) == 1.0, "nothing was left: the choice is fixed, and says so"
