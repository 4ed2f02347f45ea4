"""What a draft is travels with it, and a verifier refuses what its theorem does not cover."""

import itertools

import pytest
import torch

from paceline.rollout import Request, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafters import DRAFTERS, DraftRules, StandDrafter
from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.drafters.model_drafts import DRAWS, TREES
from paceline.rollout.engine.speculation import DrafterWarning
from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.verify import VERIFIERS, Uniforms, verify_deterministic
from tests.engines import full_engine, tiny_llama

VOCAB = 6
REQUESTS = [Request([1, 4, 2, 4], SamplingParams(max_tokens=6), seed=i, group="g") for i in range(8)]


def tree(kind: DraftKind = DraftKind.UNLABELLED) -> DraftTree:
    """Two children of the root, in one row."""
    probs = torch.full((1, 2, VOCAB), 1 / VOCAB)
    return DraftTree(torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([[-1, -1]]), probs, kind=kind)


def verify(name: str, draft: DraftTree):
    numbers = Uniforms(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    return VERIFIERS[name](torch.full((1, 3, VOCAB), 1 / VOCAB), draft, numbers)


def test_a_draft_without_a_label_is_what_it_must_be():
    tokens, lengths, probs = torch.tensor([[1, 2]]), torch.tensor([2]), torch.full((1, 2, VOCAB), 1 / VOCAB)
    assert DraftTree(tokens, lengths).kind is DraftKind.FIXED
    assert DraftTree(tokens, lengths, torch.tensor([[-1, -1]])).kind is DraftKind.FIXED
    assert DraftTree(tokens, lengths, probs=probs).kind is DraftKind.WITH_REPLACEMENT
    assert tree().kind is DraftKind.UNLABELLED
    for kind in DraftKind:
        assert tree(kind).cut(torch.tensor([1])).kind is tree(kind).kind
        assert tree(kind).to(torch.device("cpu")).kind is tree(kind).kind


COVERED = {
    "recursive": {DraftKind.WITH_REPLACEMENT, DraftKind.WITHOUT_REPLACEMENT, DraftKind.UNLABELLED},
    "spectr": {DraftKind.WITH_REPLACEMENT},
    "chain": set(),
    "block": set(),
}


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(VERIFIERS, DraftKind)))
def test_verifiers_take_the_trees_of_their_theorem_alone(name, kind):
    if kind in COVERED[name]:
        verify(name, tree(kind))
    else:
        with pytest.raises(ValueError, match=f"^{name} verification .*") as refused:
            verify(name, tree(kind))
        assert "\n" not in str(refused.value)


def test_following_the_targets_draws_is_for_fixed_drafts():
    drawn = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="for fixed drafts"):
        verify_deterministic(drawn, tree(DraftKind.WITH_REPLACEMENT))


def test_of_equal_siblings_the_first_is_followed():
    twins = DraftTree(torch.tensor([[4, 4, 5]]), torch.tensor([3]), torch.tensor([[-1, -1, 0]]))
    outcome = verify_deterministic(torch.tensor([[4, 5, 1, 2]]), twins)
    assert outcome.accepted.tolist() == [2]
    assert outcome.path[0, :2].tolist() == [0, 2]


def drawn_rules():
    for t, draw in itertools.product(TREES, DRAWS):
        try:
            yield DraftRules(t, draw)
        except ValueError:
            continue


@pytest.mark.parametrize("rules", list(drawn_rules()), ids=lambda r: f"{r.tree} {r.draw}")
def test_every_drafter_makes_what_it_says_beforehand(rules):
    """For chains and trees: the kind that the drafts carry is the one that refusals beforehand go by."""
    engine = full_engine(tiny_llama(VOCAB, layers=2), slots=8, context=24, max_nodes=6, rules=rules)
    seen = {}
    verified = engine.speculation.verified
    engine.speculation.verified = lambda step: (seen.setdefault(step.draft.kind, step), verified(step))
    for name, strategy in itertools.product(DRAFTERS, ("{}:2", "{}:2x3/6")):
        model_free = not hasattr(engine.drafters.get(name), "rules")
        if name not in engine.drafters or (model_free and rules.tree != "dynamic"):
            continue
        strategy = Strategy.parse(strategy.format(name))
        engine.use_strategy(strategy)
        for _ in range(2):  # tables learn in the first round
            seen.clear()
            engine.generate(REQUESTS)
        kinds = {kind for kind, step in seen.items() if step.draft.nodes}
        assert kinds <= {DRAFTERS[name].drafts(strategy, rules)}, name


class OwnTree(StatelessSlots):
    """A drafter of someone else's: two children of the root that it drew, with their distributions."""

    name = "own"

    def __init__(self, **label):
        self._label = label

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        batch = len(context.sequences)
        tokens = torch.randint(
            0, VOCAB, (batch, 2), generator=torch.Generator().manual_seed(len(context.sequences[0].tokens))
        )
        probs = torch.full((batch, 2, VOCAB), 1 / VOCAB)
        return DraftTree(tokens, torch.full((batch,), 2), torch.full((batch, 2), -1), probs, **self._label)


def engine_with(*drafters) -> RolloutEngine:
    engine = RolloutEngine(
        tiny_llama(VOCAB, layers=2), dtype=torch.float32, max_slots=8, max_context=24, max_nodes=6
    )
    for drafter in drafters:
        engine.add_drafter(drafter)
    return engine


@pytest.mark.parametrize(
    ("label", "verifier", "says"),
    [
        ({}, "spectr", "of a kind it does not state"),
        ({"kind": DraftKind.WITHOUT_REPLACEMENT}, "spectr", "drawn without replacement"),
        ({}, "block", "reads chains"),
    ],
)
def test_the_engine_leaves_out_whose_drafts_the_verifier_does_not_cover(label, verifier, says):
    engine = engine_with(OwnTree(**label))
    plain = [r.token_ids for r in engine.generate(REQUESTS)]
    engine.verify_with(verifier)
    engine.use_strategy("own:2x2/2")
    with pytest.warns(DrafterWarning, match=says):
        rollouts = engine.generate(REQUESTS)
    assert [r.token_ids for r in rollouts] == plain
    assert not engine.drafters


@pytest.mark.parametrize("label", [{}, {"kind": DraftKind.WITH_REPLACEMENT}])
def test_a_tree_that_is_covered_is_verified(label):
    engine = engine_with(OwnTree(**label))
    engine.verify_with("spectr" if label else "recursive")
    engine.use_strategy("own:2x2/2")
    assert sum(r.stats.accepted for r in engine.generate(REQUESTS)) > 0


@pytest.mark.parametrize(
    ("drawn", "says"),
    [
        (
            DraftTree(
                torch.zeros(8, 1, dtype=torch.long),
                torch.ones(8).long(),
                probs=torch.full((8, 1, VOCAB), 0.5),
            ),
            "no distribution",
        ),
        (
            DraftTree(
                torch.zeros(8, 1, dtype=torch.long),
                torch.ones(8).long(),
                probs=torch.eye(VOCAB)[1].expand(8, 1, -1),
            ),
            "its own probs exclude",
        ),
        (DraftTree(torch.zeros(3, 1, dtype=torch.long), torch.ones(3).long()), "for a batch of 8"),
        (DraftTree(torch.zeros(8, 1, dtype=torch.long), torch.full((8,), 2)), "lengths"),
        (
            DraftTree(torch.zeros(8, 1, dtype=torch.long), torch.ones(8).long(), torch.zeros(8, 1).long()),
            "after its parent",
        ),
        (
            DraftTree(
                torch.zeros(8, 1, dtype=torch.long), torch.ones(8).long(), kind=DraftKind.WITH_REPLACEMENT
            ),
            "gives no probs",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_draft_is_left_out(drawn, says):
    class Wrong(StatelessSlots):
        name = "wrong"

        def propose(self, context, strategy):
            return drawn

    engine = engine_with(Wrong())
    engine.use_strategy("wrong:1")
    with pytest.warns(DrafterWarning, match=says):
        assert all(r.error is None for r in engine.generate(REQUESTS))


def test_what_is_known_beforehand_is_refused_where_it_is_chosen():
    refused = pytest.raises(
        ValueError,
        match="strategy stand:2x3/6: spectr verification does not cover siblings drawn without repl",
    )
    engine = engine_with(StandDrafter())
    engine.verify_with("spectr")
    with refused:
        engine.use_strategy("stand:2x3/6")
    with refused:
        engine.adapt([Strategy("stand", 2, 3, 6)])
    engine.adapt()  # of the usual arms those that are covered
    assert {a.width for a in engine.speculation.selector.arms["stand"]} == {1}
    engine.use_strategy("stand:2")
    engine.verify_with(None)
    engine.use_strategy("stand:2x3/6")
    with refused:
        engine.verify_with("spectr")
    assert engine.speculation.verifier is None
    later = engine_with()
    later.verify_with("spectr")
    later.adapt([Strategy("stand", 2, 3, 6)])
    with refused:
        later.add_drafter(StandDrafter())
    assert not later.drafters


def test_a_function_that_states_nothing_is_no_verifier():
    with pytest.raises(ValueError, match="does not state which drafts it covers"):
        engine_with().verify_with(lambda probs, draft, uniforms: None)
