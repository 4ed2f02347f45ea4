"""Summarises a whole run: rewards, lengths, times, and what speculation saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from paceline.rl.errors import UserError
from paceline.rl.monitoring.speculation_verdict import verdict
from paceline.rl.process.files import read_lines

PHASES = ("rollout", "score", "reference", "drafter", "wait", "measure", "update", "gather", "sync")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Reads the steps of ``metrics.jsonl`` and skips a line that a kill has truncated.

    Raises:
        UserError: If there is no finished step.
    """
    steps, _ = read_lines(run / "metrics.jsonl")
    if not steps:
        raise UserError(
            f"{run / 'metrics.jsonl'}: holds no finished step; name the directory of a run that has finished "
            "one"
        )
    return steps


def summarise(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Computes the summary of a run.

    "Before" and "after" are the means over the first and the last quarter of its steps.

    Args:
        metrics: The run's steps, as in ``metrics.jsonl``.

    Raises:
        UserError: If a step lacks a number.
    """
    try:
        return _summarise(metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"metrics.jsonl: a line does not have the metrics of a step ({reason}); remove it to get a report"
        ) from None


def _summarise(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    quarter = max(len(metrics) // 4, 1)
    first, last = metrics[:quarter], metrics[-quarter:]
    measured = [m for m in metrics if "measure/rollout_speedup" in m]
    summary: dict[str, Any] = {
        "steps": len(metrics),
        "reward_before": float(np.mean([m["reward/mean"] for m in first])),
        "reward_after": float(np.mean([m["reward/mean"] for m in last])),
        "reward_rise_std_error": rise_std_error(first, last),
        "acceptance_length": float(np.mean([m["rollout/acceptance_length"] for m in metrics])),
        "length_mean": float(np.mean([m["length/mean"] for m in metrics])),
        "length_p50": float(np.median([m["length/p50"] for m in metrics])),
        "length_p95": float(np.mean([m["length/p95"] for m in metrics])),
        "length_max": max(m["length/max"] for m in metrics),
        "seconds": {p: float(np.mean([m.get(f"time/{p}", 0.0) for m in metrics])) for p in PHASES},
        "drafter_seconds_off_path": sum(m["drafter/seconds_off_path"] for m in metrics),
        "drafter_seconds_on_path": sum(m["drafter/seconds_on_path"] for m in metrics),
        # runs of earlier versions have not measured it
        "drafter_seconds_held_back": sum(m.get("drafter/held_back_seconds", 0.0) for m in metrics),
        "peak_memory_gb": max(m["memory/peak_gb"] for m in metrics),
        "gpu_peak_memory_gb": max(m.get("memory/gpu_peak_gb", 0.0) for m in metrics),
    }
    priced = [m for m in metrics if "drafter/slowdown" in m]
    if priced:
        summary["drafter_slowdown"] = float(np.mean([m["drafter/slowdown"] for m in priced]))
        # steps share measurements, so their mean is no surer than one of them
        summary["drafter_slowdown_error"] = float(np.mean([m["drafter/slowdown_error"] for m in priced]))
    if measured:
        plain = sum(m["measure/plain_seconds"] for m in measured)
        adaptive = sum(m["measure/adaptive_seconds"] for m in measured)
        summary["rollout_speedup"] = plain / adaptive
        if "measure/identical" in measured[0]:
            summary["identical_to_plain"] = float(np.mean([m["measure/identical"] for m in measured]))
        if len(measured) > 1:
            summary["rollout_speedup_error"] = _ratio_std_error(measured)
        saved = sum(m["measure/plain_seconds"] - m["measure/adaptive_seconds"] for m in measured)
        seconds = sum(m["time/step"] for m in measured)
        summary["step_speedup"] = (seconds + saved) / seconds
        summary["step_speedup_bound"] = 1 / (1 - _plain_share(measured))
        summary["measured_steps"] = len(measured)
        summary["speculation"] = verdict(metrics)
    return summary


def _plain_share(measured: list[dict[str, Any]]) -> float:
    """Returns the share of a plain step that rollouts take: the most that faster ones can save (Amdahl)."""
    plain = sum(m["measure/plain_seconds"] for m in measured)
    rest = sum(m["time/step"] - m["measure/adaptive_seconds"] for m in measured)
    return plain / (plain + rest)


def _ratio_std_error(measured: Sequence[dict[str, Any]]) -> float:
    """Returns the standard error of the ratio of plain to adaptive seconds, summed over two or more steps.

    It is that of a ratio estimator (Cochran, Sampling Techniques, 1977, equation 6.13): steps are paired, so
    that longer completions on both sides do not count as noise.
    """
    plain = np.array([m["measure/plain_seconds"] for m in measured])
    adaptive = np.array([m["measure/adaptive_seconds"] for m in measured])
    residuals = plain - plain.sum() / adaptive.sum() * adaptive
    return float(np.sqrt((residuals**2).sum() / (len(plain) - 1) / len(plain)) / adaptive.mean())


def rise_std_error(first: list[dict[str, Any]], last: list[dict[str, Any]]) -> float:
    """Returns the standard error of the rise in mean reward between two spans of steps.

    If both spans saw the same problems (an epoch each), rewards are paired by problem, which cancels the
    problems' difficulty and thus most of the variance. Otherwise the spans count as independent samples.

    Args:
        first: Metrics of the earlier steps.
        last: Metrics of the later steps.
    """
    a, b = _by_problem(first), _by_problem(last)
    if a.keys() == b.keys():
        differences = np.array([b[k] - a[k] for k in a])
        return float(np.sqrt(_variance_of_mean(differences)))
    return float(
        np.sqrt(_variance_of_mean(np.array([*a.values()])) + _variance_of_mean(np.array([*b.values()])))
    )


def _by_problem(steps: list[dict[str, Any]]) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for m in steps:
        for key, reward in m["reward/by_problem"].items():
            rewards.setdefault(key, []).append(reward)
    return {key: float(np.mean(values)) for key, values in sorted(rewards.items())}


def _variance_of_mean(x: np.ndarray) -> float:
    return float(x.var(ddof=1) / len(x)) if len(x) > 1 else 0.0


def _speedup(summary: dict[str, Any]) -> str:
    """Returns the measured ratio, its error, and how the two sides' tokens compare."""
    error = f" ± {summary['rollout_speedup_error']:.2f}" if "rollout_speedup_error" in summary else ""
    tokens = (
        f"{summary['identical_to_plain']:.1%} of completions token-identical"
        if "identical_to_plain" in summary
        else "other tokens, as many"
    )
    return f"{summary['rollout_speedup']:.2f}x{error} over {summary['measured_steps']} steps; {tokens}"


def table(summary: dict[str, Any]) -> Table:
    """Formats the summary as the table that is printed at the end of a run."""
    t = Table(title="Paceline", show_header=False)
    t.add_column()
    t.add_column()
    rise = summary["reward_after"] - summary["reward_before"]
    t.add_row(
        "reward, first → last quarter of steps",
        f"{summary['reward_before']:.3f} → {summary['reward_after']:.3f}  ({rise:+.3f} ± "
        f"{summary['reward_rise_std_error']:.3f})",
    )
    if "rollout_speedup" in summary:
        t.add_row(
            "rollout speedup over plain decoding of the same requests",
            _speedup(summary),
        )
        t.add_row(
            "step speedup over plain decoding",
            f"{summary['step_speedup']:.2f}x; at most {summary['step_speedup_bound']:.2f}x (Amdahl)",
        )
    t.add_row("acceptance length", f"{summary['acceptance_length']:.2f} tokens per forward pass")
    lengths = (f"{summary[f'length_{name}']:.0f}" for name in ("mean", "p50", "p95", "max"))
    t.add_row("completion length: mean, p50, p95, max", ", ".join(lengths))
    t.add_row(
        "seconds per step",
        ", ".join(f"{name} {s:.1f}" for name, s in summary["seconds"].items() if s >= 0.05),
    )
    t.add_row(
        "drafter training",
        f"{summary['drafter_seconds_off_path']:.1f} s while another rank was decoding, "
        f"{summary['drafter_seconds_on_path']:.1f} s on the critical path, "
        f"{summary['drafter_seconds_held_back']:.1f} s held back",
    )
    if "drafter_slowdown" in summary:
        t.add_row(
            "training beside decoding slows it by",
            f"{summary['drafter_slowdown']:.1%} ± {summary['drafter_slowdown_error']:.1%}",
        )
    t.add_row("peak memory, all ranks", f"{summary['peak_memory_gb']:.1f} GB")
    if summary["gpu_peak_memory_gb"] > 0:
        t.add_row("peak memory of a GPU", f"{summary['gpu_peak_memory_gb']:.1f} GB")
    return t
