"""A drafter, a tree and a verifier of one's own: one definition and one line of the registry each."""

import pytest

from paceline.rollout import Request, SamplingParams
from paceline.rollout.drafter_factory import DrafterParts, build_drafter
from paceline.rollout.drafters import DRAFTERS, DraftRules
from paceline.rollout.drafters.base import StatelessSlots
from paceline.rollout.drafters.best_first import pack
from paceline.rollout.trees import TREES, TreeBuilder
from paceline.rollout.trees.ranked import grow_dynamic
from paceline.rollout.verify import VERIFIERS, verifier, verify_chain
from tests.engines import engine_for, full_engine, tiny_llama

REQUESTS = [Request([1, 2, 3], SamplingParams(max_tokens=8), seed=seed) for seed in range(2)]


class Repeating(StatelessSlots):
    """Drafts the last token again and again."""

    name = "repeating"

    def propose(self, context, strategy):
        rows = [[(s.tokens[-1], i - 1) for i in range(strategy.depth)] for s in context.sequences]
        return pack(rows, width=1)


def test_every_registered_drafter_is_built_under_its_name():
    engine = full_engine(tiny_llama(50, layers=2))
    assert {name: drafter.name for name, drafter in engine.drafters.items() if name in DRAFTERS} == {
        name: name for name in DRAFTERS
    }


def test_a_drafter_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(DRAFTERS, "repeating", Repeating)
    engine = engine_for(tiny_llama(50, layers=2))
    plain = [r.token_ids for r in engine.generate(REQUESTS)]
    engine.add_drafter(build_drafter("repeating", engine, DrafterParts()))
    engine.use_strategy("repeating:2")
    rollouts = engine.generate(REQUESTS)
    assert [r.token_ids for r in rollouts] == plain
    assert all(r.stats.drafted > 0 for r in rollouts)


def test_a_tree_is_one_builder_and_one_line(monkeypatch):
    grown = []

    def grow(expander, limits, options):
        grown.append(limits)
        return grow_dynamic(expander, limits)

    monkeypatch.setitem(TREES, "own", TreeBuilder(grow, ("likeliest",)))
    engine = full_engine(tiny_llama(50, layers=2), rules=DraftRules(tree="own"))
    engine.use_strategy("draft_model:2x2/4")
    engine.generate(REQUESTS)
    assert {(limits.depth, limits.width, limits.nodes) for limits in grown} == {(2, 2, 4)}
    with pytest.raises(
        ValueError, match="tree own and draw replacement cannot be combined: write draw likel"
    ):
        DraftRules(tree="own", draw="replacement")


def test_a_verifier_is_one_function_and_one_line(monkeypatch):
    calls = []

    @verifier("own", trees=False)
    def verify_own(target_probs, draft, uniforms):
        calls.append(draft.nodes)
        return verify_chain(target_probs, draft, uniforms)

    monkeypatch.setitem(VERIFIERS, "own", verify_own)
    rules = DraftRules(tree="static", draw="replacement")
    engine = full_engine(tiny_llama(50, layers=2), rules=rules)
    engine.verify_with("own")
    engine.use_strategy("draft_model:2")
    engine.generate(REQUESTS)
    assert calls and set(calls) <= {1, 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("suffx", "'suffx' is unknown: write one of suffix, "),
        ("eagle3", "eagle3 drafter has no weights"),
        ("draft_model", "draft_model drafter has no model"),
        ("composite", "add these two drafters first"),
    ],
)
def test_a_drafter_that_cannot_be_built_says_what_is_missing(name, message):
    engine = engine_for(tiny_llama(50, layers=2))
    engine.drafters.clear()
    with pytest.raises(ValueError, match=message):
        build_drafter(name, engine, DrafterParts())
