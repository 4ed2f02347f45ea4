"""Groups of rollouts that are under way, also over several steps (segment rollouts: UloRL, arXiv 2507.19766,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from paceline.rl.tasks.task import Problem
from paceline.rollout import FinishReason, Request, Rollout, RolloutStats


@dataclass(slots=True)
class OpenGroup:
    """A prompt's samples, as far as they are.

    Attributes:
        problem: What is asked.
        requests: One for each sample.
        budgets: Tokens that each is asked for, or None.
        rollouts: What there is of each: over, paused, or None where nothing was decoded.
    """

    problem: Problem
    requests: list[Request]
    budgets: list[int] | None
    rollouts: list[Rollout | None]

    @property
    def whole(self) -> bool:
        """Whether every sample is over."""
        return not self.pending()

    def pending(self) -> list[tuple[int, Request]]:
        """Samples that are not over, each with the request that goes on with it."""
        return [
            (sample, request if rollout is None else replace(request, resume=rollout))
            for sample, (request, rollout) in enumerate(zip(self.requests, self.rollouts, strict=True))
            if rollout is None or rollout.finish_reason is FinishReason.PAUSED
        ]

    def finished(self) -> list[Rollout]:
        """The samples of a whole group; each answers the group's request, whatever calls it took."""
        return [
            replace(r, request=request)
            for request, r in zip(self.requests, self.rollouts, strict=True)
            if r is not None
        ]

    def state(self) -> dict[str, Any]:
        """What it takes to go on after a stop, as JSON; traces for the drafter are let go."""
        samples = [
            None if r is None else {n: getattr(r, n) for n in _KEPT} | {"stats": asdict(r.stats)}
            for r in self.rollouts
        ]
        return {
            "key": self.problem.key,
            "seeds": [r.seed for r in self.requests],
            "budgets": self.budgets,
            "rollouts": samples,
        }


_KEPT = ("token_ids", "logprobs", "finish_reason", "segments", "entropies", "error")


def restored(
    state: Mapping[str, Any],
    find: Callable[[str], Problem],
    ask: Callable[[Problem, list[int], list[int] | None], list[Request]],
) -> OpenGroup | None:
    """A group from its `OpenGroup.state`; None when the task no longer has its problem.

    Args:
        state: As read from JSON.
        find: The task's problem of a key; raises KeyError where there is none.
        ask: Problem, seeds and budgets to requests.
    """
    try:
        problem = find(state["key"])
    except KeyError:
        return None
    requests = ask(problem, state["seeds"], state["budgets"])
    rollouts = [
        None
        if kept is None
        else Rollout(
            request,
            kept["token_ids"],
            kept["logprobs"],
            FinishReason(kept["finish_reason"]),
            RolloutStats(**kept["stats"]),
            [(int(version), int(count)) for version, count in kept["segments"]],
            kept["entropies"],
            kept["error"],
        )
        for request, kept in zip(requests, state["rollouts"], strict=True)
    ]
    return OpenGroup(problem, requests, state["budgets"], rollouts)
