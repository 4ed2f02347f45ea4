"""Rollouts that share beginnings: full groups, tokens the policy would have drawn, advantages by hand."""

import pytest
import torch

from paceline.rl.algorithms.tree import tree_advantages
from paceline.rl.config.rollout import TreeConfig
from paceline.rl.errors import UserError
from paceline.rl.generation.tree import Tree, grow
from paceline.rl.recipe import load_config
from paceline.rl.tasks.task import Problem
from paceline.rollout import FinishReason, Request, SamplingParams
from tests.engines import engine_for, tiny_llama
from tests.support import tiny_trainer

SIZE = 6
STOPS = "rollout.stop_strings=['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']"


def grown(params: SamplingParams, config: TreeConfig, trees: int = 3, **engine_options):
    engine = engine_for(tiny_llama(97), slots=5, context=200, **engine_options)
    made = []
    for number in range(trees):
        problem = Problem(str(number), "", "", lambda text: 0.0, {}, "none")
        made.append(
            Tree(
                problem,
                [Request([3, 1, number], params, seed=10 * number + i, group=number) for i in range(SIZE)],
            )
        )
    seen = []
    grow(engine, made, config, None, lambda number, order, rollout: seen.append((number, order, rollout)))
    return engine, made, seen


PARAMS = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, stop_token_ids=tuple(range(0, 97, 9)))]


@pytest.mark.parametrize("params", PARAMS, ids=["long", "ends early"])
@pytest.mark.parametrize("config", [TreeConfig(8, 2, 2), TreeConfig(8, 1, 3), TreeConfig(100, 2, 2)], ids=str)
def test_groups_are_full_and_share_beginnings(params, config):
    _, trees, seen = grown(params, config)
    for number, tree in enumerate(trees):
        assert tree.full and not tree.active
        assert [r.token_ids for _, r in tree.leaves] == [r.token_ids for n, _, r in seen if n == number]
        assert len({r.request.seed for _, r in tree.leaves}) == SIZE
        tokens = {}
        for path, rollout in tree.leaves:
            assert rollout.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert len(rollout.logprobs) == len(rollout.token_ids) <= 40
            for depth in range(1, len(path)):
                start, end = (depth - 1) * config.segment_tokens, depth * config.segment_tokens
                part = tuple(rollout.token_ids[start:end])
                assert tokens.setdefault(path[:depth], part) == part
        assert tree.drawn <= sum(len(r.token_ids) for _, r in tree.leaves)
    if config.segment_tokens < 40 and params is PARAMS[0]:
        assert all(tree.drawn < 0.9 * sum(len(r.token_ids) for _, r in tree.leaves) for tree in trees)


def test_logprobs_are_the_policys():
    _, trees, _ = grown(PARAMS[0], TreeConfig(8, 1, 2), trees=1)
    model = tiny_llama(97)
    for _, rollout in trees[0].leaves:
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
        with torch.no_grad():
            reference = torch.log_softmax(model(ids).logits[0, 2:-1], -1).gather(-1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), reference, rtol=0, atol=1e-4)


def test_the_most_uncertain_end_branches_first():
    """Two roots, room for one more sample: it grows where the last segment was less likely."""
    params = SamplingParams(max_tokens=40)
    problem = Problem("p", "", "", lambda text: 0.0, {}, "none")
    tree = Tree(problem, [Request([3, 1, 4], params, seed=i) for i in range(3)])
    grow(engine_for(tiny_llama(97, sharpness=4.0)), [tree], TreeConfig(8, 2, 2), None, lambda *_: None)
    by_root: dict[int, list] = {}
    for path, rollout in tree.leaves:
        by_root.setdefault(path[0], []).append(rollout)
    assert sorted(map(len, by_root.values())) == [1, 2]
    likelihood = {len(leaves): sum(leaves[0].logprobs[:8]) for leaves in by_root.values()}
    assert likelihood[2] < likelihood[1]


def test_loops_are_stopped(monkeypatch):
    monkeypatch.setattr("paceline.rl.generation.tree.is_loop", lambda ids: len(ids) >= 16)
    _, trees, _ = grown(PARAMS[0], TreeConfig(8, 2, 2))
    assert all(
        r.finish_reason is FinishReason.LENGTH and len(r.token_ids) < 40 for t in trees for _, r in t.leaves
    )


def test_advantages_by_hand():
    """Four samples; two share segment 1, the third and fourth are alone. Rewards 1, 0, 0, 0: the group has a
    mean of 1/4, the two have 1/2. So (3/4 + 1/2) / 2, (−1/4 − 1/2) / 2, −1/4, −1/4."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    paths = [(1, 2), (1, 3), (4,), (5, 6)]
    wanted = torch.tensor([0.625, -0.375, -0.25, -0.25])
    torch.testing.assert_close(tree_advantages(rewards, paths, 4, scale_by_std=False), wanted)
    torch.testing.assert_close(tree_advantages(rewards, paths, 4), wanted / wanted.std())
    assert tree_advantages(torch.ones(4), paths, 4).tolist() == [0.0] * 4


def test_below_a_junction_shared_segments_are_credited_with_their_subtree():
    """The sum over the samples that share segment 1 has no part of what tells these apart."""
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.1])
    found = tree_advantages(rewards, [(1, 2), (1, 3), (4,), (5,)], 4, scale_by_std=False)
    assert float(found[:2].sum()) == pytest.approx((0.5 - 0.35) * 2 / 2)


def test_the_trainer_learns_from_trees(tmp_path, monkeypatch):
    options = ("rollout.tree={segment_tokens: 4}", "update.advantage=tree", "rollout.max_tokens=16", STOPS)
    with tiny_trainer(tmp_path, monkeypatch, "[1.0 * len(c) for c in completions]", *options) as trainer:
        before = [p.detach().clone() for p in trainer.policy.parameters()]
        metrics, (record,) = trainer.step(0)
        moved = [not torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True)]
    assert all(moved)
    assert 0.05 < metrics["rollout/shared_share"] < 0.9
    assert len(record["rewards"]) == 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("update.advantage=tree",), "write rollout.tree"),
        (("rollout.tree={width: 1}",), "width of at least 2"),
        (("rollout.tree={}", "rollout.segment_tokens=8"), "cannot be combined"),
        (("rollout.tree={}", "measure.plain_every=2"), "write measure.plain_every: 0"),
        (("rollout.tree={}", "update.advantage=gae"), "tree, group or rloo"),
        (("rollout.tree={}", "length.budgets=[4, 8]"), "budget_of: prompt"),
    ],
)
def test_what_does_not_go_together_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        load_config("configs/tiny.yaml", ["measure.plain_every=0", *options])
