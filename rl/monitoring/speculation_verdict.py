"""What speculation brought against plain decoding of the same requests, and where it lost, why and what to
change.

Everything is said from what was measured: `paceline.rl.monitoring.metrics` has where each number comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_EVEN = 0.02  # a ratio this near to 1 is neither gain nor loss
_IDENTICAL_ENOUGH = 0.5  # share of completions equal to plain decoding's, from which on lengths do not matter
_COLD_STEPS = 2  # first steps, in which forwards are measured and a drafter knows nothing yet
_SHORT = 1.5  # tokens a forward, below which drafts hardly pay
_DEAR = 0.15  # share of the rollouts' time that drafting may take
# sequences together, from which on verifying many tokens costs about as much as decoding them
_LARGE_BATCH = 16


def verdict(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """What speculation brought, in lines; none where no step was measured.

    Args:
        metrics: The run's steps, as in ``metrics.jsonl``; those with ``measure.plain_every`` have the ratio.
    """
    measured = [m for m in metrics if "measure/rollout_speedup" in m]
    if not measured:
        return []
    plain, own = (sum(m[f"measure/{name}_seconds"] for m in measured) for name in ("plain", "adaptive"))
    ratio, saved = plain / own, (plain - own) / len(measured)
    accepted = _mean(measured, "rollout/acceptance_length")
    if not any(m["rollout/drafted"] for m in measured):
        return [f"no token was drafted in the measured steps: plain decoding throughout, {ratio:.2f}x"]
    if ratio > 1 + _EVEN:
        return [
            f"speculation won: {ratio:.2f}x plain decoding, {saved:.1f} s of a step saved; {accepted:.2f} "
            "tokens a forward"
        ]
    if ratio >= 1 - _EVEN:
        first = (
            f"speculation brought nothing: {ratio:.2f}x plain decoding of the same requests, {accepted:.2f} "
            f"tokens a forward"
        )
    else:
        first = (
            f"speculation lost: {ratio:.2f}x plain decoding of the same requests, {-saved:.1f} s of a step; "
        )
        first += f"{accepted:.2f} tokens a forward"
    reasons = _reasons(metrics, measured)
    return [first, *(f"  {reason}" for reason in reasons)]


def _reasons(metrics: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[str]:
    """Gives the reasons, the likeliest first."""
    found = [
        *_cold(metrics, measured),
        *_rejected(measured),
        *_drafting(measured),
        *_batch(measured),
        *_other_lengths(measured),
    ]
    return found or [
        "none of acceptance, drafting time and batch explains it: verifying costs more here than what it "
        "saves; write "
        "speculation.strategy=plain, or compare strategies with paceline bench selection"
    ]


def _cold(metrics: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the measured steps are the first, or later ones did better."""
    if measured[-1]["step"] < _COLD_STEPS:
        steps = ", ".join(str(m["step"] + 1) for m in measured)
        return [
            f"cold: only step {steps} was measured, when times of forwards are still being learned and the "
            "drafter is new: measure "
            "later steps (measure.plain_every), or start with drafter.warmup_minutes"
        ]
    early = [m["measure/rollout_speedup"] for m in measured if m["step"] < _COLD_STEPS]
    late = [m["measure/rollout_speedup"] for m in measured if m["step"] >= _COLD_STEPS]
    if early and np.mean(late) > 1 + _EVEN:
        return [
            f"cold: {np.mean(early):.2f}x in the first steps, {np.mean(late):.2f}x in the later ones: "
            "start from a drafter (drafter.start, drafter.warmup_minutes)"
        ]
    if not any(m.get("drafter/updates") for m in metrics) and any(
        "rollout/acceptance_length_eagle3" in m for m in metrics
    ):
        return [
            "the drafter was never trained in this run: write drafter.schedule=always where no rank idles, "
            "or start from one "
            "(drafter.warmup_minutes)"
        ]
    return []


def _rejected(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Whether drafts are refused: of all of them, and by drafter."""
    drafted, accepted = (sum(m[f"rollout/{name}"] for m in measured) for name in ("drafted", "accepted"))
    length = _mean(measured, "rollout/acceptance_length")
    if length >= _SHORT or not drafted:
        return []
    prefix = "rollout/acceptance_length_"
    names = sorted({key.removeprefix(prefix) for m in measured for key in m if key.startswith(prefix)})
    by_name = ", ".join(f"{name} {_mean(measured, prefix + name):.2f}" for name in names)
    return [
        f"drafts are refused: {accepted} of {drafted} drafted tokens were accepted ({by_name} tokens a "
        "forward, where they ran): "
        "the drafter does not know this policy yet; train it longer (drafter.warmup_minutes, "
        "drafter.schedule=always), or a "
        "temperature this high leaves little to guess"
    ]


def _drafting(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Whether drafting itself takes the time."""
    if not any("rollout/drafting_share" in m for m in measured):
        return []
    share = _mean(measured, "rollout/drafting_share")
    if share < _DEAR:
        return []
    prefix = "rollout/draft_seconds_"
    names = {key.removeprefix(prefix) for m in measured for key in m if key.startswith(prefix)}
    spent = {name: sum(m.get(prefix + name, 0.0) for m in measured) for name in names}
    worst = max(spent, key=spent.__getitem__)
    return [
        f"drafting takes {share:.0%} of the rollouts' time, most of it {worst} ({spent[worst]:.1f} s): write "
        "shallower trees in "
        "speculation.arms, or leave that drafter out of speculation.drafters"
    ]


def _batch(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Whether many sequences are decoded together for most of the time."""
    known = [m for m in measured if "rollout/active_mean" in m]
    if not known:
        return []
    active, speculating = _mean(known, "rollout/active_mean"), _mean(known, "rollout/speculating_share")
    if active < _LARGE_BATCH:
        return []
    longest = max(m["length/max"] for m in known)
    return [
        f"the batch is large: {active:.0f} sequences together on average, drafts in {speculating:.0%} of the "
        "time, "
        f"completions of up to {longest} tokens: at such batches a forward is bound by arithmetic; "
        "speculation pays in long tails "
        "and at few sequences (more ranks, or longer rollout.max_tokens)"
    ]


def _other_lengths(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Whether both sides decoded other completions, so that the ratio is one of lengths, too."""
    identical = _mean(measured, "measure/identical")
    if identical >= _IDENTICAL_ENOUGH:
        return []
    return [
        f"only {identical:.0%} of the completions were the same as plain decoding's (draws or rounding): "
        "lengths differ by chance, "
        "and the ratio with them"
    ]


def _mean(steps: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([m[name] for m in steps if name in m]))
