"""Unfinished groups of rollouts, which may last several steps (UloRL, arXiv 2507.19766, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from paceline.rl.tasks.task import Problem
from paceline.rollout import FinishReason, Request, Rollout, RolloutStats


@dataclass(slots=True)
class OpenGroup:
    """A prompt's samples, some of which may be unfinished.

    Attributes:
        problem: The problem that is asked.
        requests: The request of each sample.
        budgets: The token budget that each sample is told, or None.
        rollouts: The state of each sample: finished, paused, or None when nothing is decoded yet.
    """

    problem: Problem
    requests: list[Request]
    budgets: list[int] | None
    rollouts: list[Rollout | None]

    @property
    def finished(self) -> bool:
        """Whether every sample is finished."""
        return not self.pending()

    def pending(self) -> list[tuple[int, Request]]:
        """Returns the index of each unfinished sample, with the request that continues it."""
        return [
            (sample, request if rollout is None else replace(request, resume=rollout))
            for sample, (request, rollout) in enumerate(zip(self.requests, self.rollouts, strict=True))
            if rollout is None or rollout.finish_reason is FinishReason.PAUSED
        ]

    def samples(self) -> list[Rollout]:
        """Returns the samples of a finished group, each under its original request."""
        return [
            replace(r, request=request)
            for request, r in zip(self.requests, self.rollouts, strict=True)
            if r is not None
        ]

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON data; traces for the drafter are dropped."""
        samples = [
            None if r is None else {n: getattr(r, n) for n in _FIELDS} | {"stats": asdict(r.stats)}
            for r in self.rollouts
        ]
        return {
            "key": self.problem.key,
            "seeds": [r.seed for r in self.requests],
            "budgets": self.budgets,
            "rollouts": samples,
        }


_FIELDS = ("token_ids", "logprobs", "finish_reason", "segments", "entropies", "error")


def restored(
    state: Mapping[str, Any],
    find: Callable[[str], Problem],
    ask: Callable[[Problem, list[int], list[int] | None], list[Request]],
) -> OpenGroup | None:
    """Returns the group that `OpenGroup.state` describes; None when the task no longer has its problem.

    Args:
        state: The state, as read from JSON.
        find: Returns the task's problem of a key; raises KeyError when there is none.
        ask: Returns requests for a problem, seeds and budgets.
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
