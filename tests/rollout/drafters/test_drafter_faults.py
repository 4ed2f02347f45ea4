"""A drafter that breaks costs time, never a rollout."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.engine import timing
from paceline.rollout.engine.speculation import DrafterWarning
from paceline.rollout.model import calibration
from paceline.rollout.strategy import Strategy
from paceline.rollout.trees import DraftTree
from tests.engines import tiny_llama

REQUESTS = [Request([3, 1, 4, i], SamplingParams(max_tokens=24), seed=i, group=0) for i in range(6)]


class Breaking(StatelessSlots):
    """Drafts the token 5 until it breaks in one of the ways."""

    name = "breaking"

    def __init__(self, way: str) -> None:
        self._way = way
        # calls that go well: some steps, and not to the end
        self._left = {"observe": 8, "release": 0}.get(way, 3)

    def _breaks(self, way: str) -> bool:
        self._left -= way == self._way
        return way == self._way and self._left < 0

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        if self._breaks("raises"):
            raise RuntimeError("out of memory")
        batch = len(context.sequences)
        tokens = torch.full((batch, strategy.depth), 10_000 if self._breaks("unknown id") else 5)
        probs = torch.zeros(batch, strategy.depth, 97)
        probs[..., 5] = math.nan if self._breaks("not finite") else 1.0
        return DraftTree(tokens, torch.full((batch,), strategy.depth), None, probs)

    def observe(self, sequence, count):
        if self._breaks("observe"):
            raise KeyError("lost")

    def verified(self, step):
        if self._breaks("verified"):
            raise KeyError("lost")

    def release(self, slot):
        if self._breaks("release"):
            raise KeyError("lost")


def engine(way: str) -> RolloutEngine:
    made = RolloutEngine(tiny_llama(sharpness=20.0), dtype=torch.float32, max_slots=3, max_context=64)
    made.add_drafter(SuffixDrafter())
    made.add_drafter(Breaking(way))
    return made


@pytest.fixture(scope="module")
def plain():
    return [r.token_ids for r in engine("never").generate(REQUESTS)]


@pytest.mark.parametrize("way", ["raises", "unknown id", "not finite", "observe", "verified", "release"])
def test_rollouts_go_on_without_it_and_it_is_said_once(way, plain):
    broken = engine(way)
    broken.use_strategy("breaking:3")
    with pytest.warns(DrafterWarning, match="breaking drafter failed and is disabled") as told:
        rollouts = broken.generate(REQUESTS)
    assert len([w for w in told if w.category is DrafterWarning]) == 1
    assert set(broken.drafters) == {"suffix"}
    assert all(r.error is None and len(r.token_ids) == 24 for r in rollouts)
    ran = [record.strategy for record in broken.records]
    assert ran[0] == "breaking:3" and ran[-1] == "plain"
    again = broken.generate(REQUESTS)  # without a warning: pytest makes one an error
    assert [r.token_ids for r in again] == plain


def test_the_bandit_no_longer_chooses_it(monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    for module in (calibration, timing):  # every part of a step takes as long, whatever else the machine does
        monkeypatch.setattr(module, "time", clock)
    broken = engine("raises")
    broken.adapt([Strategy("breaking", 2), Strategy("suffix", 2)], epsilon=0.5, seed=1)
    broken.speculation.selector.cost.optimistic_tokens = lambda arm: 100.0  # everything looks worth a try
    tried: list[str] = []
    with pytest.warns(DrafterWarning):
        while "breaking" in broken.speculation.selector.arms:
            broken.generate(REQUESTS)
            tried += [record.strategy for record in broken.records]
            assert len(tried) < 1000
    assert "breaking:2" in tried
    left: set[str] = set()
    for _ in range(4):
        broken.generate(REQUESTS)
        left |= {record.strategy for record in broken.records}
    assert left == {"plain", "suffix:2"}
