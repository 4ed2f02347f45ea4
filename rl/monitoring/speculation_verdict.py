"""Reports how speculation compares with plain decoding of the same requests, why it lost, and what to change.

Every statement rests on measured metrics; `paceline.rl.monitoring.metrics` documents each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_EVEN_MARGIN = 0.02  # a speedup this close to 1 counts as neither gain nor loss
_MIN_IDENTICAL_SHARE = 0.5  # with fewer completions identical to plain decoding's, lengths distort the ratio
_COLD_STEPS = 2  # in the first steps, forward passes are still being timed and the drafter is untrained
_MIN_ACCEPTANCE_LENGTH = 1.5  # tokens per forward pass; drafts hardly pay off below it
_MAX_DRAFTING_SHARE = 0.15  # of the rollouts' time; drafting that takes more is named as a reason
_LARGE_BATCH = 16  # sequences; from here on, verifying tokens costs about as much as decoding them


def verdict(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Returns lines that say what speculation gained or lost; no lines if no step was measured.

    Args:
        metrics: The run's steps as in ``metrics.jsonl``; steps measured through ``measure.plain_every`` have
            the ratio.
    """
    measured = [m for m in metrics if "measure/rollout_speedup" in m]
    if not measured:
        return []
    plain, adaptive = (sum(m[f"measure/{name}_seconds"] for m in measured) for name in ("plain", "adaptive"))
    ratio, saved = plain / adaptive, (plain - adaptive) / len(measured)
    accepted = f"{_mean(measured, 'rollout/acceptance_length'):.2f} tokens per forward pass"
    if not any(m["rollout/drafted"] for m in measured):
        return [f"no token was drafted in the measured steps: plain decoding throughout, {ratio:.2f}x"]
    if ratio > 1 + _EVEN_MARGIN:
        return [f"speculation won: {ratio:.2f}x plain decoding, saving {saved:.1f} s per step; {accepted}"]
    if ratio >= 1 - _EVEN_MARGIN:
        first = f"speculation gained nothing: {ratio:.2f}x plain decoding of the same requests; {accepted}"
    else:
        first = (
            f"speculation lost: {ratio:.2f}x plain decoding of the same requests, costing {-saved:.1f} s per "
            f"step; {accepted}"
        )
    reasons = _reasons(metrics, measured)
    return [first, *(f"  {reason}" for reason in reasons)]


def _reasons(metrics: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the reasons for the lack of a gain, the likeliest first."""
    reasons = [
        *_cold(metrics, measured),
        *_rejected(measured),
        *_drafting(measured),
        *_batch(measured),
        *_different_lengths(measured),
    ]
    return reasons or [
        "neither acceptance nor drafting time nor batch size explains it: verification costs more here than "
        "it saves; write speculation.strategy=plain, or compare strategies with paceline bench selection"
    ]


def _cold(metrics: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whether only the first steps were measured, later ones did better, or no drafter was trained."""
    if measured[-1]["step"] < _COLD_STEPS:
        steps = ", ".join(str(m["step"] + 1) for m in measured)
        return [
            f"cold: only step {steps} was measured, while forward passes were still being timed and the "
            "drafter was new: measure later steps (measure.plain_every), or start with drafter.warmup_minutes"
        ]
    early = [m["measure/rollout_speedup"] for m in measured if m["step"] < _COLD_STEPS]
    late = [m["measure/rollout_speedup"] for m in measured if m["step"] >= _COLD_STEPS]
    if early and np.mean(late) > 1 + _EVEN_MARGIN:
        return [
            f"cold: {np.mean(early):.2f}x in the first steps, {np.mean(late):.2f}x in the later ones: "
            "start from a trained drafter (drafter.start, drafter.warmup_minutes)"
        ]
    return _untrained(metrics)


def _untrained(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whether the drafter was not trained, or held back for longer than it was trained."""
    held_back, trained = (
        sum(m.get(f"drafter/{name}", 0.0) for m in metrics) for name in ("held_back_seconds", "seconds")
    )
    if held_back > trained:
        return [
            f"the drafter's training was held back for {held_back:.0f} s: it would have slowed ranks on the "
            "same machine by more than drafter.max_slowdown, or by more than half of what good drafts save "
            "at these batch sizes; write drafter.schedule=always to train it all the same"
        ]
    if not any(m.get("drafter/updates") for m in metrics) and any(
        "rollout/acceptance_length_eagle3" in m for m in metrics
    ):
        return [
            "the drafter was never trained in this run: write drafter.schedule=always if no rank idles, "
            "or start from a trained drafter (drafter.warmup_minutes)"
        ]
    return []


def _rejected(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whether most drafted tokens are rejected, and breaks acceptance down by drafter."""
    drafted, accepted = (sum(m[f"rollout/{name}"] for m in measured) for name in ("drafted", "accepted"))
    length = _mean(measured, "rollout/acceptance_length")
    if length >= _MIN_ACCEPTANCE_LENGTH or not drafted:
        return []
    prefix = "rollout/acceptance_length_"
    names = sorted({key.removeprefix(prefix) for m in measured for key in m if key.startswith(prefix)})
    by_name = ", ".join(f"{name} {_mean(measured, prefix + name):.2f}" for name in names)
    return [
        f"drafts are rejected: {accepted} of {drafted} drafted tokens were accepted ({by_name} tokens per "
        "forward pass where they ran): either the drafter has not learned this policy yet, then train it "
        "longer (drafter.warmup_minutes, drafter.schedule=always); or the temperature is too high for tokens "
        "to be predictable"
    ]


def _drafting(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whether drafting itself takes too much time, and names the slowest drafter."""
    if not any("rollout/drafting_share" in m for m in measured):
        return []
    share = _mean(measured, "rollout/drafting_share")
    if share < _MAX_DRAFTING_SHARE:
        return []
    prefix = "rollout/draft_seconds_"
    names = {key.removeprefix(prefix) for m in measured for key in m if key.startswith(prefix)}
    seconds = {name: sum(m.get(prefix + name, 0.0) for m in measured) for name in names}
    slowest = max(seconds, key=seconds.__getitem__)
    return [
        f"drafting takes {share:.0%} of the rollouts' time, most of it {slowest} ({seconds[slowest]:.1f} s): "
        "write shallower trees in speculation.arms, or remove that drafter from speculation.drafters"
    ]


def _batch(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whether many sequences are decoded together most of the time."""
    recorded = [m for m in measured if "rollout/active_mean" in m]
    if not recorded:
        return []
    active = _mean(recorded, "rollout/active_mean")
    speculating = _mean(recorded, "rollout/speculating_share")
    if active < _LARGE_BATCH:
        return []
    longest = max(m["length/max"] for m in recorded)
    return [
        f"the batch is large: {active:.0f} sequences together on average, drafts in {speculating:.0%} of the "
        f"time, completions of up to {longest} tokens: forward passes of such batches are compute-bound; "
        "speculation pays off in long tails and with few sequences (more ranks, or a longer "
        "rollout.max_tokens)"
    ]


def _different_lengths(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Checks whether both sides decoded different completions, so that lengths affect the ratio as well."""
    if not any("measure/identical" in m for m in measured):  # vLLM decodes as many tokens on both sides
        return []
    identical = _mean(measured, "measure/identical")
    if identical >= _MIN_IDENTICAL_SHARE:
        return []
    return [
        f"only {identical:.0%} of the completions were identical to plain decoding's (sampling or rounding): "
        "lengths differ by chance, and the ratio with them"
    ]


def _mean(steps: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([m[name] for m in steps if name in m]))
