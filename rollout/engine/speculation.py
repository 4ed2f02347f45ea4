"""What speculates in an engine: drafters, the choice among their strategies, budgets and the verifier.

A drafter can only cost time, never a rollout: one that raises, or whose draft is not one (ids outside the
    vocabulary, probabilities
that are no distribution, a kind that the verifier does not cover), is left out from then on, with one
warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.rollout.drafters.base import DraftContext, Drafter, VerifiedStep
from paceline.rollout.drafters.coverage import refusal
from paceline.rollout.model.calibration import calibrate_forward
from paceline.rollout.model.runner import ModelRunner
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy import (
    BUDGETS,
    BanditSelector,
    CostModel,
    FixedSelector,
    Selector,
    Strategy,
    default_arms,
)
from paceline.rollout.trees import DraftKind, DraftTree, no_draft
from paceline.rollout.verify import VERIFIERS, Verifier, default_verifier


class DrafterWarning(RuntimeWarning):
    """A drafter failed and is left out."""


class Speculation:
    """Drafters of one engine, and what they are asked for; every drafter is told of every token, whichever
    drafts.

    Args:
        runner: Of the policy.
        slots: Sequences decoded together.
        max_nodes: Most draft tokens of a sequence that one forward verifies.
        budgets: Name in `BUDGETS`.

    Attributes:
        drafters: By name.
        selector: Chooses each step's strategy.
        verifier: Of drawn drafts; None for the default.
    """

    def __init__(self, runner: ModelRunner, slots: int, max_nodes: int, budgets: str) -> None:
        self._runner, self._slots = runner, slots
        self.max_nodes = max_nodes
        self.drafters: dict[str, Drafter] = {}
        self.selector: Selector = FixedSelector()
        self.verifier: Verifier | None = None
        self._budgets = BUDGETS[budgets]

    def add_drafter(self, drafter: Drafter) -> None:
        """Makes a drafter available to strategies, under its name.

        Raises:
            ValueError: for one that reads what the engine does not keep, or drafts for a chosen strategy what
                the verifier does not cover.
        """
        if drafter.needs_taps and not self._runner.tap_layers:
            raise ValueError(
                f"the {drafter.name} drafter reads hidden states: build the engine with tap_layers"
            )
        replaced = self.drafters.get(drafter.name)
        self.drafters[drafter.name] = drafter
        try:
            for strategy in self.selector.strategies():
                self._check_covered(strategy, self.verifier)
            self.selector.drafter_changed(drafter.name)
        except ValueError:
            if replaced is None:
                del self.drafters[drafter.name]
            else:
                self.drafters[drafter.name] = replaced
            raise

    def use_strategy(self, strategy: Strategy | str) -> None:
        """Fixes what every step runs: a `Strategy`, or what its ``str`` gives; ``"adaptive"`` is `adapt`.

        Raises:
            ValueError: for a strategy that cannot run.
        """
        if strategy == "adaptive":
            self.adapt()
            return
        fixed = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
        self._check(fixed)
        self.selector = FixedSelector(fixed)

    def adapt(self, arms: Sequence[Strategy] = (), **options: Any) -> None:
        """Chooses at each step from measured times (`BanditSelector`); a calibration of forwards takes a few
        seconds.

        Args:
            arms: Strategies to choose from, beside plain decoding; those of drafters that are added later
                count from then on. None at all takes chains and trees of every drafter, as far as the
                verifier covers them.
            **options: Of `BanditSelector`.

        Raises:
            ValueError: for a strategy that verifies more tokens than the engine can, or drafts what the
                verifier does not cover.
        """
        for arm in arms:
            self._check_size(arm)
            self._check_covered(arm, self.verifier)

        def arms_of(name: str) -> list[Strategy]:
            if arms:
                of_drafter = [arm for arm in arms if arm.drafter == name]
                for arm in of_drafter:
                    self._check_covered(arm, self.verifier)
                return of_drafter
            drafter = self.drafters[name]
            usual = default_arms(name, self.max_nodes, getattr(drafter, "chains_only", False))
            return [arm for arm in usual if refusal(self.verifier, drafter, arm) is None]

        forward = calibrate_forward(self._runner, self._slots, self.max_nodes + 1)
        cost = CostModel(forward.seconds, lambda name, batch: forward.seconds(batch, 1, 0) / 20)
        self.selector = BanditSelector(arms_of, tuple(self.drafters), cost, **options)

    def _check(self, strategy: Strategy) -> None:
        if strategy.drafter is not None and strategy.drafter not in self.drafters:
            raise ValueError(
                f"strategy {strategy} names a drafter that was not added; there are: {sorted(self.drafters)}"
            )
        self._check_size(strategy)
        self._check_covered(strategy, self.verifier)

    def _check_covered(self, strategy: Strategy, verifier: Verifier | None) -> None:
        drafter = None if strategy.drafter is None else self.drafters.get(strategy.drafter)
        problem = None if drafter is None else refusal(verifier, drafter, strategy)
        if problem is not None:
            raise ValueError(f"strategy {strategy}: {problem}")

    def _check_size(self, strategy: Strategy) -> None:
        if strategy.nodes > self.max_nodes:
            raise ValueError(
                f"strategy {strategy} verifies more tokens than the engine's max_nodes of {self.max_nodes}"
            )

    def verify_with(self, verifier: Verifier | str | None) -> None:
        """Verifies drawn drafts by a verifier, or by the one of that name in `VERIFIERS`; None takes
        token-by-token verification for chains and recursive for trees.

        Raises:
            ValueError: for an unknown name, a function that does not state which drafts it covers, and a
                verifier that does not cover what the present strategies draft.
        """
        if isinstance(verifier, str):
            if verifier not in VERIFIERS:
                raise ValueError(f"verifier {verifier!r} is unknown; write one of {', '.join(VERIFIERS)}")
            verifier = VERIFIERS[verifier]
        if verifier is not None and not hasattr(verifier, "refusal"):
            raise ValueError(
                f"{verifier!r} does not state which drafts it covers: wrap it in "
                "paceline.rollout.verify.StatedVerifier"
            )
        for strategy in self.selector.strategies():
            self._check_covered(strategy, verifier)
        self.verifier = verifier

    def propose(self, strategy: Strategy, active: list[SequenceState]) -> DraftTree:
        """The drafts of active sequences, each cut to its budget and to what is left of its request."""
        room = [s.remaining - 1 for s in active]
        if strategy.drafter is None or max(room) <= 0:
            return no_draft(len(active), self._runner.cache.device)
        budgets = [
            min(n, self.max_nodes) for n in self._budgets(strategy.nodes, [s.expected_left for s in active])
        ]
        asked = strategy.with_nodes(max(budgets), max(room))
        draft = self._ask(strategy.drafter, active, asked)
        if draft is None:
            return no_draft(len(active), self._runner.cache.device)
        # by each row's own room: what a request commits must not depend on how much room its neighbours have
        chains = draft.parents is None
        return draft.cut(
            torch.tensor([min(n, r) if chains or r <= 0 else n for n, r in zip(budgets, room, strict=True)])
        )

    def _ask(self, name: str, active: list[SequenceState], strategy: Strategy) -> DraftTree | None:
        """The drafter's draft; None where it failed."""
        taps = None
        if self._runner.tap_layers:
            cache = self._runner.cache
            taps = cache.taps.view(*cache.taps.shape[:2], -1, self._runner.hidden_size)
        try:
            draft = (
                self.drafters[name]
                .propose(DraftContext(active, taps), strategy)
                .to(self._runner.cache.device)
            )
            problem = draft.problem(len(active), self._runner.vocab_size) or self._not_covered(draft)
        except Exception as error:  # whatever a drafter does wrong, rollouts go on
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            return draft
        self._leave_out(name, problem)
        return None

    def _not_covered(self, draft: DraftTree) -> str | None:
        if draft.kind is DraftKind.FIXED or draft.nodes == 0:
            return None
        chain = draft.parents is None
        return (self.verifier or default_verifier(chain)).refusal(draft.kind, chain)

    def _leave_out(self, name: str, problem: str) -> None:
        del self.drafters[name]
        self.selector.drafter_lost(name)
        message = (
            f"the {name} drafter failed and is left out from now on ({problem}); rollouts go on without it"
        )
        warnings.warn(message, DrafterWarning, stacklevel=2)

    def _tell(self, event: Callable[[Drafter], None]) -> None:
        for name, drafter in list(self.drafters.items()):
            try:
                event(drafter)
            except Exception as error:  # as in `_ask`
                self._leave_out(name, f"{type(error).__name__}: {error}")

    def observe(self, sequence: SequenceState, count: int) -> None:
        """The sequence's last ``count`` tokens were committed."""
        self._tell(lambda drafter: drafter.observe(sequence, count))

    def verified(self, step: VerifiedStep) -> None:
        """A step was verified; its tokens are not committed yet."""
        self._tell(lambda drafter: drafter.verified(step))

    def vacate(self, slot: int, last: int) -> None:
        """The sequence in ``slot`` is gone and the one in ``last`` has moved there; the same slot twice where
        none moved.
        """

        def close(drafter: Drafter) -> None:
            drafter.release(slot)
            if slot != last:
                drafter.move(last, slot)
                drafter.release(last)

        self._tell(close)

    def forget(self, sequence: SequenceState) -> None:
        """The sequence is over."""
        self._tell(lambda drafter: drafter.forget(sequence))
