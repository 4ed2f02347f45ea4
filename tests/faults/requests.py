"""Random requests and interleavings on one engine, checked against an engine that decodes each request alone
and plainly.

`run` makes calls of every kind, over and over on one engine: plain calls and streams, streams that are
    abandoned, callbacks that
raise, cancellations, pauses that are resumed, new weights, drafters that fail, other strategies, a second
call in between and from another thread, and odd requests among good ones. After each call every good
request's tokens are those of the plain engine, every odd one failed in a line or was served, every slot is
free, and nothing was raised but one-line ValueErrors.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from paceline.rollout import EngineBusyError, FinishReason, Request, Rollout, RolloutEngine, SamplingParams
from paceline.rollout.drafters import NgramDrafter, SuffixDrafter
from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.engine.speculation import DrafterWarning
from paceline.rollout.strategy import Strategy
from paceline.rollout.trees import DraftTree
from tests.engines import tiny_llama
from tests.rollout.engine.odd_requests import odd_request

VOCAB, CONTEXT, LONGEST = 97, 48, 12
PROMPTS = 20
SETTINGS = tuple(SamplingParams(t, k, max_tokens=LONGEST) for t, k in ((0.0, 0), (1.0, 0), (0.8, 20)))
STRATEGIES = ("plain", "suffix:3", "suffix:3x2/5", "ngram:3")


class CallersError(Exception):
    """What a callback or a consumer of the campaign raises."""


class Unreliable(StatelessSlots):
    """A drafter that fails in one of the ways."""

    name = "unreliable"

    def __init__(self, way: str) -> None:
        self._way = way

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        if self._way == "raises":
            raise RuntimeError("broken")
        batch = len(context.sequences) + (self._way == "rows")
        tokens = torch.full((batch, strategy.depth), VOCAB if self._way == "ids" else 1)
        probs = (
            None if self._way in ("ids", "rows") else torch.full((batch, strategy.depth, VOCAB), torch.nan)
        )
        return DraftTree(tokens, torch.full((batch,), strategy.depth), probs=probs)


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(65 + i % 26) for i in ids)


class Campaign:
    """One engine under test, the plain engine's answers, and counts of what happened."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.model = tiny_llama(VOCAB, layers=1, sharpness=6.0, hidden=32)
        self.engine = self._build(slots=4)
        self.alone = self._build(slots=1)
        self.counts: Counter[str] = Counter()
        self._expected: dict[tuple[Any, ...], list[int]] = {}
        self._prompts = [
            [self.rng.randrange(1, VOCAB) for _ in range(self.rng.randrange(1, 9))] for _ in range(PROMPTS)
        ]
        self._seeds = [self.rng.choice((i, 2**63 + i, -i, 2**70 + i)) for i in range(1, 3)]

    def _build(self, slots: int) -> RolloutEngine:
        engine = RolloutEngine(
            self.model,
            dtype=torch.float32,
            max_slots=slots,
            max_context=CONTEXT,
            max_nodes=5,
            decode_text=letters,
        )
        engine.add_drafter(SuffixDrafter())
        engine.add_drafter(NgramDrafter())
        return engine

    def good(self) -> Request:
        """A request whose answer is known, or is found out now."""
        rng = self.rng
        params = rng.choice(SETTINGS)
        prompt = rng.choice(self._prompts)
        request = Request(prompt, params, rng.choice(self._seeds), group=rng.choice((None, tuple(prompt))))
        key = self._key(request)
        if key not in self._expected:
            self._expected[key] = self.alone.generate([replace(request, group=None)])[0].token_ids
        return replace(request, params=replace(params, max_tokens=rng.randrange(1, LONGEST + 1)))

    @staticmethod
    def _key(request: Request) -> tuple[Any, ...]:
        return tuple(request.prompt_ids), request.params.temperature, request.params.top_k, request.seed

    def mixed(self) -> tuple[list[Any], set[int]]:
        """Good requests with odd ones among them, and the places of the good ones."""
        requests: list[Any] = []
        own = set()
        for _ in range(self.rng.randrange(1, 9)):
            if self.rng.random() < 0.75:
                own.add(len(requests))
                requests.append(self.good())
                continue
            try:
                requests.append(odd_request(self.rng))
            except ValueError as error:  # `SamplingParams` names the field
                _one_line(str(error))
                self.counts["refused when made"] += 1
        return requests, own

    def check(self, rollout: Rollout, good: bool) -> None:
        """One finished rollout is what the plain engine says, or a failure that says why."""
        self.counts["requests"] += 1
        if not good:
            self.counts["odd, failed alone" if rollout.error else "odd, served"] += 1
            assert (rollout.error is None) == (rollout.finish_reason is not FinishReason.FAILED)
            _one_line(rollout.error or "")
            return
        self.counts[f"good, {rollout.finish_reason}"] += 1
        assert rollout.error is None, rollout.error
        whole = self._expected[self._key(rollout.request)][: rollout.request.params.max_tokens]
        if rollout.finish_reason is FinishReason.LENGTH:
            assert rollout.token_ids == whole, (rollout.token_ids, whole)
        else:
            assert rollout.token_ids == whole[: len(rollout.token_ids)]
        assert len(rollout.logprobs) == len(rollout.token_ids)

    def check_all(self, rollouts: Sequence[Rollout], requests: Sequence[Any], own: set[int]) -> None:
        assert [id(r.request) for r in rollouts] == [id(r) for r in requests], (
            "rollouts are not in the order of their requests"
        )
        for i, rollout in enumerate(rollouts):
            self.check(rollout, i in own)

    def check_free(self) -> None:
        """Nothing of the last call is left."""
        assert not self.engine.scheduler.has_work
        # refused while the engine is held
        self.engine.use_strategy(self.engine.speculation.selector.strategies()[0])

    def generate(self) -> None:
        requests, own = self.mixed()
        self.check_all(self.engine.generate(requests), requests, own)

    def stream(self) -> None:
        requests, own = self.mixed()
        good = {id(requests[i]) for i in own}
        rollouts = list(self.engine.stream(requests))
        assert len(rollouts) == len(requests)
        for rollout in rollouts:
            self.check(rollout, id(rollout.request) in good)

    def abandoned(self) -> None:
        """A stream whose consumer stops, is closed, or fails; with others' calls in between."""
        requests, own = self.mixed()
        good = {id(requests[i]) for i in own}
        stream = self.engine.stream(requests)
        try:
            for _ in range(self.rng.randrange(1, 4)):
                rollout = next(stream, None)
                if rollout is None:
                    break
                self.check(rollout, id(rollout.request) in good)
                if self.engine.scheduler.has_work:
                    self.intruder()
            if self.rng.random() < 0.5:
                raise CallersError
        except CallersError:
            pass
        stream.close()
        self.counts["abandoned"] += len(requests)

    def intruder(self) -> None:
        """Another call while a stream is unfinished, of this thread or another."""
        calls: list[Callable[[], Any]] = [
            lambda: self.engine.generate([self.good()]),
            lambda: next(self.engine.stream([self.good()])),
            self.engine.refresh_weights,
            lambda: self.engine.use_strategy("plain"),
            lambda: self.engine.add_drafter(NgramDrafter()),
        ]
        call, told = self.rng.choice(calls), []

        def intrude() -> None:
            try:
                call()
            except EngineBusyError as error:
                told.append(str(error))

        if self.rng.random() < 0.5:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        else:
            intrude()
        assert len(told) == 1
        _one_line(told[0])
        self.counts["calls in between, refused"] += 1

    def failing_callback(self) -> None:
        requests, _ = self.mixed()

        def fail(*_: Any) -> None:
            raise CallersError

        try:
            self.engine.generate(requests, **{self.rng.choice(("on_step", "on_finish")): fail})
        except CallersError:
            self.counts["callbacks that raised"] += 1

    def cancelled(self) -> None:
        requests, own = self.mixed()
        victims = self.rng.sample(requests, min(2, len(requests)))

        def on_step(record: Any) -> None:
            for victim in victims:
                self.engine.cancel(victim)

        self.check_all(self.engine.generate(requests, on_step), requests, own)

    def paused(self) -> None:
        """Every call makes a few tokens; what is unfinished goes on in the next."""
        requests = [self.good() for _ in range(self.rng.randrange(1, 6))]
        limit = {self.rng.choice(("segment", "token_budget")): self.rng.randrange(2, 8)}
        while requests:
            rollouts = self.engine.generate(requests, **limit)
            requests = []
            for rollout in rollouts:
                self.check(rollout, good=True)
                if rollout.finish_reason is FinishReason.PAUSED:
                    requests.append(replace(rollout.request, resume=rollout))

    def failing_drafter(self) -> None:
        self.engine.add_drafter(Unreliable(self.rng.choice(("raises", "ids", "rows", "nan"))))
        self.engine.use_strategy("unreliable:2")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", DrafterWarning)
            self.generate()
        self.counts["drafters that failed"] += len(told)
        for warning in told:
            _one_line(str(warning.message))
        if "unreliable" in self.engine.drafters:  # no request came so far as to need a draft
            self.engine.use_strategy("plain")

    def new_weights(self) -> None:
        """The policy moves; what was said before it no longer counts."""
        with torch.no_grad():
            self.model.lm_head.weight.add_(0.02 * torch.randn(self.model.lm_head.weight.shape))
        self.engine.refresh_weights()
        self.alone.refresh_weights()
        self._expected.clear()
        self.counts["new weights"] += 1
        self.generate()

    def other_strategy(self) -> None:
        self.engine.use_strategy(self.rng.choice(STRATEGIES))
        self.generate()


CALLS = {
    **{
        Campaign.generate: 6,
        Campaign.stream: 4,
        Campaign.abandoned: 3,
        Campaign.failing_callback: 2,
        Campaign.cancelled: 3,
    },
    **{
        Campaign.paused: 3,
        Campaign.failing_drafter: 1,
        Campaign.other_strategy: 4,
        Campaign.new_weights: 0.1,
    },
}


def _one_line(text: str) -> None:
    assert "\n" not in text and len(text) < 400, text


def run(count: int, seed: int) -> dict[str, int]:
    """Makes calls until ``count`` requests were answered.

    Args:
        count: Requests.
        seed: Of everything that is chosen.

    Returns:
        How often what happened.

    Raises:
        AssertionError: at the first answer that is not what it should be.
    """
    campaign = Campaign(seed)
    while campaign.counts["requests"] < count:
        (call,) = campaign.rng.choices(list(CALLS), list(CALLS.values()))
        call(campaign)
        campaign.check_free()
        campaign.counts["calls"] += 1
    return dict(sorted(campaign.counts.items()))
