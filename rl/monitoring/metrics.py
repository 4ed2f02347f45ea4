"""Aggregates the ranks' records of a step into its metrics."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.rl.algorithms.importance import effective_share
from paceline.rl.generation.anytime import AnytimeCredit
from paceline.rl.learner.critic import CriticReport
from paceline.rl.learner.updater import UpdateReport
from paceline.rl.lengths.statistics import is_loop, prompt_statistics
from paceline.rl.rewards.pool import Scores
from paceline.rl.types import RankRollouts
from paceline.rollout import FinishReason


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of one rank's step, in seconds since the step began on rank 0."""

    phase: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class RankStep:
    """What a rank did in a step.

    Attributes:
        batch: The rank's rollouts.
        scores: What the scoring pool returned, with its failures.
        rewards: The task's reward of each rollout.
        shaped: The shaped reward of each rollout, which is trained on.
        advantages: The mean advantage of each rollout.
        distilled: The report of the drafter's training.
        update: The report of the policy's update.
        critic: The report of the critic's update.
        spans: The phases of the rank's step.
        scoring: When scorers were busy, in seconds since the step began.
        carried: The number of samples that the next step continues.
        length_errors: Pinball losses of predicted lengths.
        credit: The advantages from demanded answers, where the recipe has them.
    """

    batch: RankRollouts
    scores: Scores
    rewards: Sequence[float]
    shaped: Sequence[float]
    advantages: Sequence[float]
    distilled: LearnerReport
    update: UpdateReport
    critic: CriticReport
    spans: list[Span]
    scoring: list[tuple[float, float]]
    carried: int
    length_errors: Sequence[float]
    credit: AnytimeCredit | None


def rank_record(step: RankStep) -> dict[str, Any]:
    """Returns a rank's record of a step as JSON data."""
    batch, scores = step.batch, step.scores
    stats = [r.stats for r in batch.rollouts]
    by_drafter: dict[str, Counter[str]] = {}
    for record in batch.records:
        f = record.feedback
        if f.strategy.drafter is not None:
            counts = by_drafter.setdefault(f.strategy.drafter, Counter())
            counts["sequence_steps"] += f.active
            counts["committed"] += record.committed
            counts["draft_ms"] += round(f.draft_seconds * 1e3)
    return {
        "problems": [p.key for p in batch.problems],
        "rewards": list(step.rewards),
        "shaped": list(step.shaped),
        "score_timeouts": scores.timeouts,
        "score_errors": scores.errors,
        "reward_parts": scores.parts,
        "advantages": [float(a) for a in step.advantages],
        "lengths": [len(r.token_ids) for r in batch.rollouts],
        "carried": step.carried,
        "anytime": None if step.credit is None else step.credit.accuracy,
        "drawn": batch.drawn,
        "length_errors": list(step.length_errors),
        "loops": sum(is_loop(r.token_ids) for r in batch.rollouts),
        "stale": sum(
            count for r in batch.rollouts for version, count in r.segments if version < r.segments[-1][0]
        ),
        "truncated": sum(r.finish_reason is FinishReason.LENGTH for r in batch.rollouts),
        "failed": sum(r.finish_reason is FinishReason.FAILED for r in batch.rollouts),
        "sequence_steps": sum(s.steps for s in stats),
        "drafted": sum(s.drafted for s in stats),
        "accepted": sum(s.accepted for s in stats),
        "strategies": dict(Counter(r.strategy for r in batch.records)),
        "by_drafter": {name: dict(counts) for name, counts in by_drafter.items()},
        "rollout_seconds": batch.seconds,
        "plain_seconds": batch.plain_seconds,
        "plain_identical": batch.plain_identical,
        "tail": [(round(r.at, 4), r.active, r.strategy) for r in batch.records],
        "peak_bytes": peak_memory_bytes(),
        "gpu_peak_bytes": gpu_peak_bytes(),
        "spans": [(s.phase, s.begin, s.end) for s in step.spans],
        "scoring": step.scoring,
        "drafter": asdict(step.distilled),
        "update": asdict(step.update),
        "critic": asdict(step.critic),
    }


def peak_memory_bytes() -> int:
    """Returns the largest resident set size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_peak_bytes() -> int:
    """Returns the most bytes of this rank's GPU that torch has held so far; 0 without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0


def step_metrics(ranks: Sequence[dict[str, Any]], group_size: int) -> dict[str, Any]:
    """Returns the metrics of a step from the records of all ranks."""
    rewards = np.array([x for r in ranks for x in r["rewards"]])
    lengths = np.array([x for r in ranks for x in r["lengths"]])
    groups = rewards.reshape(-1, group_size)
    keys = [key for r in ranks for key in r["problems"][::group_size]]
    rollout = max(r["rollout_seconds"] for r in ranks)
    steps = sum(r["sequence_steps"] for r in ranks)
    metrics: dict[str, Any] = {
        "reward/mean": float(rewards.mean()),
        "reward/shaped": float(np.mean([x for r in ranks for x in r["shaped"]])),
        "reward/exact": float((rewards >= 1).mean()),
        "reward/std_error": float(groups.mean(1).std(ddof=1) / np.sqrt(len(groups)))
        if len(groups) > 1
        else 0.0,
        "reward/by_problem": {key: float(mean) for key, mean in zip(keys, groups.mean(1), strict=True)},
        "reward/uniform_groups": float((groups.std(1) < 1e-6).mean()),
        "length/mean": float(lengths.mean()),
        "length/p50": float(np.quantile(lengths, 0.5)),
        "length/p95": float(np.quantile(lengths, 0.95)),
        "length/max": int(lengths.max()),
        "length/loops": sum(r["loops"] for r in ranks) / len(lengths),
        "length/truncated": sum(r["truncated"] for r in ranks),
        "reward/timeouts": sum(r["score_timeouts"] for r in ranks),
        "reward/errors": sum(r["score_errors"] for r in ranks),
        "rollout/completions": len(lengths),
        "rollout/carried": sum(r["carried"] for r in ranks),
        "rollout/shared_share": 1 - sum(r["drawn"] for r in ranks) / max(int(lengths.sum()), 1),
        "rollout/stale_share": float(sum(r["stale"] for r in ranks) / max(lengths.sum(), 1)),
        "rollout/failed": sum(r["failed"] for r in ranks),
        "rollout/seconds": rollout,
        "rollout/tokens_per_second": float(lengths.sum() / rollout),
        "rollout/acceptance_length": float((lengths - 1).clip(min=0).sum() / steps) if steps else 1.0,
        "memory/peak_gb": sum(r["peak_bytes"] for r in ranks) / 1e9,
        "memory/gpu_peak_gb": max(r["gpu_peak_bytes"] for r in ranks) / 1e9,
        **_speculation_metrics(ranks),
        "rollout/drafted": sum(r["drafted"] for r in ranks),
        "rollout/accepted": sum(r["accepted"] for r in ranks),
    }
    metrics |= _part_metrics(ranks)
    metrics |= prompt_statistics(keys, lengths.reshape(-1, group_size))
    anytime = [r["anytime"] for r in ranks if r["anytime"]]
    if anytime:
        metrics["anytime/accuracy"] = np.mean(anytime, axis=0).tolist()
    errors = [error for r in ranks for error in r["length_errors"]]
    if errors:
        metrics["length/pinball"] = float(np.mean(errors))
    metrics |= (
        _drafter_metrics(ranks) | _update_metrics(ranks) | _critic_metrics(ranks) | _time_metrics(ranks)
    )
    if ranks[0]["plain_seconds"] is not None:
        plain = max(r["plain_seconds"] for r in ranks)
        metrics["measure/plain_seconds"] = plain
        metrics["measure/adaptive_seconds"] = rollout
        metrics["measure/rollout_speedup"] = plain / rollout
        if ranks[0]["plain_identical"] is not None:
            metrics["measure/identical"] = float(np.mean([r["plain_identical"] for r in ranks]))
    return metrics


def _part_metrics(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean and standard deviation of each reward function, over the completions it applies to."""
    metrics = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank.get("reward_parts", {})):
        found = [
            value
            for rank in ranks
            for value in rank.get("reward_parts", {}).get(name, [])
            if value is not None
        ]
        if found:
            metrics[f"rewards/{name}/mean"] = float(np.mean(found))
            metrics[f"rewards/{name}/std"] = float(np.std(found))
    return metrics


def _speculation_metrics(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean number of active sequences, and the shares of time spent speculating and drafting."""
    total = active_seconds = speculating = 0.0
    for rank in ranks:
        before = 0.0
        for at, active, strategy in rank["tail"]:
            took, before = max(at - before, 0.0), at
            total += took
            active_seconds += took * active
            speculating += took * (strategy != "plain")
    drafting = sum(counts["draft_ms"] for rank in ranks for counts in rank["by_drafter"].values()) / 1e3
    if not total:
        return {}
    return {
        "rollout/active_mean": active_seconds / total,
        "rollout/speculating_share": speculating / total,
        "rollout/drafting_share": drafting / total,
    }


def _drafter_metrics(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    total: dict[str, Counter[str]] = {}
    for rank in ranks:
        for name, counts in rank["by_drafter"].items():
            total.setdefault(name, Counter()).update(counts)
    for name, counts in total.items():
        metrics[f"rollout/acceptance_length_{name}"] = counts["committed"] / max(counts["sequence_steps"], 1)
        metrics[f"rollout/draft_seconds_{name}"] = counts["draft_ms"] / 1e3
    trained = [r["drafter"] for r in ranks if r["drafter"]["updates"]]
    if trained:
        metrics["drafter/loss"] = float(np.mean([t["loss"] for t in trained]))
        metrics["drafter/acceptance"] = np.mean([t["acceptance"] for t in trained], axis=0).tolist()
        metrics["drafter/updates"] = sum(t["updates"] for t in trained)
        metrics["drafter/tokens"] = sum(t["tokens"] for t in trained)
        metrics["drafter/approved"] = sum(t["approved"] for t in trained)
        judged = [t for t in trained if t["candidate_length"] > 0]
        if judged:
            for name in ("serving_length", "candidate_length"):
                metrics[f"drafter/{name}"] = float(np.mean([t[name] for t in judged]))
    if trained and len(trained[0]["ensemble"]) > 1:
        metrics["drafter/ensemble"] = np.mean([t["ensemble"] for t in trained], axis=0).tolist()
    priced = [r["drafter"] for r in ranks if r["drafter"]["slowdown"] is not None]
    if priced:
        worst = max(priced, key=lambda report: report["slowdown"])  # each machine has its own
        metrics["drafter/slowdown"] = worst["slowdown"]
        metrics["drafter/slowdown_error"] = worst["slowdown_error"]
    metrics["drafter/held_back_seconds"] = sum(r["drafter"]["held_back_seconds"] for r in ranks)
    metrics["drafter/snapshot_seconds"] = max(r["drafter"]["snapshot_seconds"] for r in ranks)
    metrics["drafter/skipped"] = sum(r["drafter"]["skipped"] for r in ranks)
    return metrics


def _update_metrics(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    updates = [r["update"] for r in ranks]
    tokens = max(sum(u["tokens"] for u in updates), 1)
    names = ("loss", "entropy", "clipped", "kl", "engine_gap", "truncated")
    mean = {name: sum(u[name] for u in updates) / tokens for name in names}
    weights, squares = (sum(u[name] for u in updates) for name in ("weights", "weights_squared"))
    return {
        "update/tokens": sum(u["tokens"] for u in updates),
        "update/imbalance": max(u["tokens"] for u in updates) * len(updates) / tokens,
        "update/loss": mean["loss"],
        "update/entropy": mean["entropy"],
        "update/clipped": mean["clipped"],
        "update/kl": mean["kl"],
        "update/grad_norm": updates[0]["grad_norm"],
        "update/skipped": max(u["skipped"] for u in updates),
        "engine/logprob_gap_mean": mean["engine_gap"],
        "engine/logprob_gap_max": max(u["engine_gap_max"] for u in updates),
        "engine/importance_truncated": mean["truncated"],
        "update/mastered": sum(u["mastered"] for u in updates) / tokens,
        "engine/importance_std": max(squares / tokens - (weights / tokens) ** 2, 0.0) ** 0.5,
        "engine/effective_share": effective_share(weights, squares, tokens),
    }


def _critic_metrics(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(r["critic"][name] for r in ranks) for name in ranks[0]["critic"]}
    if not total["tokens"]:
        return {}
    variance = total["squares"] / total["tokens"] - (total["returns"] / total["tokens"]) ** 2
    return {
        "critic/loss": total["loss"] / total["tokens"],
        "critic/explained_variance": 1 - total["errors"] / total["tokens"] / variance
        if variance > 1e-12
        else 0.0,
    }


def _time_metrics(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns seconds of each phase, of the step, and of drafter training on and off the critical path.

    A phase counts as long as on the slowest rank; the step counts without measurements. Drafter training is
    off the critical path until the last rank has finished its rollouts and their reference log-probs.
    """
    phases: dict[str, float] = {}
    for rank in ranks:
        own: Counter[str] = Counter()
        for phase, begin, end in rank["spans"]:  # a phase may come more than once
            own[f"time/{phase}"] += end - begin
        phases = {name: max(phases.get(name, 0.0), own[name]) for name in {**phases, **own}}
    spans = [(phase, begin, end) for rank in ranks for phase, begin, end in rank["spans"]]
    whole = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
    phases["time/step"] = whole - phases.get("time/measure", 0.0)
    last_busy = max(end for r in ranks for phase, _, end in r["spans"] if phase in ("rollout", "reference"))
    training = [(begin, end) for r in ranks for phase, begin, end in r["spans"] if phase == "drafter"]
    phases["drafter/seconds"] = sum(end - begin for begin, end in training)
    phases["drafter/seconds_off_path"] = sum(max(min(end, last_busy) - begin, 0.0) for begin, end in training)
    phases["drafter/seconds_on_path"] = max(
        [end - last_busy for _, end in training if end > last_busy], default=0.0
    )
    return phases
