"""Speculation in an engine: drafters, the choice of each step's strategy, draft budgets and the verifier.

A faulty drafter can only cost time, never a rollout. One that raises or returns an invalid draft (ids outside
the vocabulary, probabilities that are not a distribution, a kind that the verifier does not cover) is
disabled with one warning.
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
    """Warns that a drafter failed and has been disabled."""


class Speculation:
    """Manages an engine's drafters, and drafts with the one that the current strategy names.

    Every drafter observes every committed token, whichever of them drafted it.

    Args:
        runner: Runner of the policy.
        slots: Maximum number of sequences decoded together.
        max_nodes: Maximum number of draft tokens per sequence that one forward verifies.
        budgets: Name of a budget rule in `BUDGETS`.

    Attributes:
        drafters: Drafters by name.
        selector: Selector of each step's strategy.
        verifier: Verifier of sampled drafts; None for the default.
    """

    def __init__(self, runner: ModelRunner, slots: int, max_nodes: int, budgets: str) -> None:
        self._runner, self._slots = runner, slots
        self.max_nodes = max_nodes
        self.drafters: dict[str, Drafter] = {}
        self.selector: Selector = FixedSelector()
        self.verifier: Verifier | None = None
        self._budgets = BUDGETS[budgets]

    def add_drafter(self, drafter: Drafter) -> None:
        """Makes a drafter available to strategies under its name.

        Raises:
            ValueError: The drafter reads hidden states that the engine does not keep, or drafts for a chosen
                strategy in a way that the verifier does not cover.
        """
        if drafter.needs_taps and not self._runner.tap_layers:
            raise ValueError(
                f"the {drafter.name} drafter reads hidden states, which this engine does not keep: "
                "build it with tap_layers"
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
        self._prepare()

    def use_strategy(self, strategy: Strategy | str) -> None:
        """Fixes the strategy of every step.

        Args:
            strategy: A `Strategy` or its string form; ``"adaptive"`` calls `adapt`.

        Raises:
            ValueError: The strategy cannot run.
        """
        if strategy == "adaptive":
            self.adapt()
            return
        fixed = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
        self._check(fixed)
        self.selector = FixedSelector(fixed)
        self._prepare()

    def _prepare(self) -> None:
        """Lets drafters prepare the strategies that may be chosen, so that no step is timed with that."""
        for strategy in self.selector.strategies():
            prepare = getattr(self.drafters.get(strategy.drafter or ""), "prepare", None)
            if prepare is not None:
                prepare(strategy)

    def adapt(self, arms: Sequence[Strategy] = (), **options: Any) -> None:
        """Selects each step's strategy from measured times (`BanditSelector`).

        Calibrating the forwards takes a few seconds.

        Args:
            arms: Strategies to choose from besides plain decoding. Those whose drafter is added later become
                available then. If empty, chains and trees of every drafter are used, as far as the verifier
                covers them.
            **options: Keyword arguments of `BanditSelector`.

        Raises:
            ValueError: A strategy verifies more tokens than the engine can, or drafts in a way that the
                verifier does not cover.
        """
        for arm in arms:
            self._check_size(arm)
            self._check_covered(arm, self.verifier)

        def arms_of(name: str) -> list[Strategy]:
            """Returns the strategies to try with the drafter of this name."""
            if arms:
                of_drafter = [arm for arm in arms if arm.drafter == name]
                for arm in of_drafter:
                    self._check_covered(arm, self.verifier)
                return of_drafter
            drafter = self.drafters[name]
            candidates = default_arms(name, self.max_nodes, getattr(drafter, "chains_only", False))
            return [arm for arm in candidates if refusal(self.verifier, drafter, arm) is None]

        forward = calibrate_forward(self._runner, self._slots, self.max_nodes + 1)
        cost = CostModel(forward.seconds, lambda name, batch: forward.seconds(batch, 1, 0) / 20)
        self.selector = BanditSelector(arms_of, tuple(self.drafters), cost, **options)
        self._prepare()

    def _check(self, strategy: Strategy) -> None:
        if strategy.drafter is not None and strategy.drafter not in self.drafters:
            raise ValueError(
                f"strategy {strategy} names a drafter that was not added: "
                f"add it or use one of {sorted(self.drafters)}"
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
                f"strategy {strategy} verifies more tokens than the engine's max_nodes of {self.max_nodes}: "
                "write a smaller strategy or raise max_nodes"
            )

    def verify_with(self, verifier: Verifier | str | None) -> None:
        """Sets the verifier of sampled drafts.

        Args:
            verifier: A verifier, or its name in `VERIFIERS`; None selects token-by-token verification for
                chains and recursive verification for trees.

        Raises:
            ValueError: The name is unknown, the function does not state which drafts it covers, or the
                verifier does not cover what the current strategies draft.
        """
        if isinstance(verifier, str):
            if verifier not in VERIFIERS:
                raise ValueError(f"verifier {verifier!r} is unknown: write one of {', '.join(VERIFIERS)}")
            verifier = VERIFIERS[verifier]
        if verifier is not None and not hasattr(verifier, "refusal"):
            raise ValueError(
                f"verifier {verifier!r} does not state which drafts it covers: wrap it in "
                "paceline.rollout.verify.StatedVerifier"
            )
        for strategy in self.selector.strategies():
            self._check_covered(strategy, verifier)
        self.verifier = verifier

    def propose(self, strategy: Strategy, active: list[SequenceState]) -> DraftTree:
        """Returns the drafts of active sequences.

        Each is cut to its budget, to its remaining tokens and to what a captured forward holds.
        """
        room = [s.remaining - 1 for s in active]
        most = self._most_nodes(len(active))
        if strategy.drafter is None or max(room) <= 0 or most == 0:
            return no_draft(len(active), self._runner.cache.device)
        budgets = [
            min(n, self.max_nodes) for n in self._budgets(strategy.nodes, [s.expected_left for s in active])
        ]
        largest = strategy.with_nodes(max(budgets), max(room))
        draft = self._checked_draft(strategy.drafter, active, largest)
        if draft is None:
            return no_draft(len(active), self._runner.cache.device)
        # Each row is cut by its own remaining tokens: what a request commits must not depend on how many its
        # neighbours have left.
        chains = draft.parents is None
        budgets = [min(n, most) for n in budgets]
        return draft.cut(
            torch.tensor([min(n, r) if chains or r <= 0 else n for n, r in zip(budgets, room, strict=True)])
        )

    def _most_nodes(self, batch: int) -> int:
        """Returns the most draft tokens of each of ``batch`` sequences that one forward verifies."""
        tokens = self._runner.most_tokens(batch)
        return self.max_nodes if tokens is None else min(self.max_nodes, tokens - 1)

    def caught_up(self, strategy: Strategy) -> bool:
        """Returns whether the last draft, of this strategy, read what earlier steps had left unread."""
        return getattr(self.drafters.get(strategy.drafter or ""), "caught_up", False)

    def _checked_draft(self, name: str, active: list[SequenceState], strategy: Strategy) -> DraftTree | None:
        """Returns the drafter's draft, or None if it failed, in which case it is disabled."""
        taps = self._runner.cache.taps_at if self._runner.tap_layers else None
        try:
            draft = self.drafters[name].propose(DraftContext(active, taps), strategy)
            problem = draft.problem(len(active), self._runner.vocab_size) or self._coverage_problem(draft)
            draft = draft.for_target(self._runner.cache.device)
        except Exception as error:  # a drafter's fault must not stop the rollouts
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            return draft
        self._disable(name, problem)
        return None

    def _coverage_problem(self, draft: DraftTree) -> str | None:
        if draft.kind is DraftKind.FIXED or draft.nodes == 0:
            return None
        chain = draft.parents is None
        return (self.verifier or default_verifier(chain)).refusal(draft.kind, chain)

    def _disable(self, name: str, problem: str) -> None:
        del self.drafters[name]
        self.selector.drafter_lost(name)
        message = f"the {name} drafter failed and is disabled ({problem}); rollouts continue without it"
        warnings.warn(message, DrafterWarning, stacklevel=2)

    def _notify(self, event: Callable[[Drafter], None]) -> None:
        """Calls ``event`` on every drafter; one that raises is disabled."""
        for name, drafter in list(self.drafters.items()):
            try:
                event(drafter)
            except Exception as error:  # a drafter's fault must not stop the rollouts
                self._disable(name, f"{type(error).__name__}: {error}")

    def observe(self, committed: Sequence[tuple[SequenceState, int]]) -> None:
        """Tells drafters of each sequence how many of its last tokens were committed."""

        def read(drafter: Drafter) -> None:
            for sequence, count in committed:
                drafter.observe(sequence, count)

        self._notify(read)

    def verified(self, step: VerifiedStep) -> None:
        """Tells drafters that a step was verified; its tokens are not committed yet."""
        self._notify(lambda drafter: drafter.verified(step))

    def vacate(self, slot: int, last: int) -> None:
        """Tells drafters that the sequence in ``slot`` is gone and that the one in ``last`` has moved there.

        The two are the same slot if nothing moved.
        """

        def close(drafter: Drafter) -> None:
            drafter.release(slot)
            if slot != last:
                drafter.move(last, slot)
                drafter.release(last)

        self._notify(close)

    def forget(self, sequence: SequenceState) -> None:
        """Tells drafters that the sequence is finished."""
        self._notify(lambda drafter: drafter.forget(sequence))
