"""Writes a run's report, one HTML file that contains its plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paceline.rl.errors import UserError
from paceline.rl.monitoring.summary import PHASES, read_metrics, summarise
from paceline.rl.process.files import read_lines, write_atomically

_COLOURS = dict(zip(PHASES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]

Steps = list[dict[str, Any]]


def write_report(run: Path) -> Path:
    """Writes ``report.html`` to the run's directory and returns its path.

    Raises:
        UserError: If the run has no finished step.
    """
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run}: no metrics.jsonl; name the directory of a run that has finished a step")
    metrics = read_metrics(run)
    summary, timeline = summarise(metrics), _read_timeline(run)
    sections = [
        ("Reward", _figure(lambda ax: plot_reward(ax, metrics))),
        ("Completion lengths", _figure(lambda ax: plot_lengths(ax, timeline))),
        ("Acceptance length", _figure(lambda ax: plot_acceptance(ax, metrics))),
        ("Long tail: active sequences during a rollout", _figure(lambda ax: plot_tail(ax, timeline[-1]))),
        ("Time of each phase, by rank", _figure(lambda ax: plot_phases(ax, timeline))),
        ("The last step, rank by rank", _figure(lambda ax: plot_timeline(ax, timeline[-1]))),
    ]
    body = "".join(
        f"<h2>{html.escape(title)}</h2><img src='data:image/png;base64,{png}'>" for title, png in sections
    )
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(_format(v))}</td></tr>" for k, v in summary.items()
    )
    out = run / "report.html"
    write_atomically(out, _PAGE.format(title=html.escape(run.name), table=rows, body=body))
    return out


def _read_timeline(run: Path) -> Steps:
    """Reads the steps of ``timeline.jsonl`` that have an entry for each rank.

    Raises:
        UserError: If there is no such step.
    """
    steps, _ = read_lines(run / "timeline.jsonl")
    complete = [step for step in steps if isinstance(step.get("ranks"), list) and step["ranks"]]
    if not complete:
        raise UserError(
            f"{run / 'timeline.jsonl'}: holds no finished step, which the report's plots need; name the "
            "directory of a run that has finished a step"
        )
    return complete


def write_picture(run: Path, out: Path) -> Path:
    """Writes four of the report's plots to one PNG file and returns its path.

    Args:
        run: The run's directory.
        out: PNG file to write.

    Raises:
        UserError: If the run has no finished step.
    """
    metrics = read_metrics(run)
    timeline = _read_timeline(run)
    figure, axes = plt.subplots(2, 2, figsize=(13, 7), dpi=90)
    plot_reward(axes[0, 0], metrics)
    plot_acceptance(axes[0, 1], metrics)
    plot_tail(axes[1, 0], timeline[-1])
    plot_timeline(axes[1, 1], timeline[-1])
    for ax, title in zip(
        axes.flat,
        ("reward", "acceptance length", "long tail of the last rollout", "last step"),
        strict=True,
    ):
        ax.set_title(title)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
    return out


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Paceline: {title}</title>
<style>body{{font:15px sans-serif;max-width:900px;margin:2em auto;padding:0 1em}}img{{max-width:100%}}
td{{padding:.15em 1em .15em 0;border-bottom:1px solid #ddd}}</style>
<h1>Paceline: {title}</h1><table>{table}</table>{body}</html>
"""


def _format(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_format(v)}" for k, v in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _figure(draw: Callable[[Axes], None]) -> str:
    """Draws a plot and returns it as a PNG in base64."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(9, 3.6), dpi=110)
    draw(axes)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def plot_reward(ax: Axes, metrics: Steps) -> None:
    """Plots the mean reward of each step with its standard error over prompts."""
    x = [m["step"] + 1 for m in metrics]
    y = np.array([m["reward/mean"] for m in metrics])
    e = np.array([m["reward/std_error"] for m in metrics])
    ax.plot(x, y, marker="o", ms=3)
    ax.fill_between(x, y - e, y + e, alpha=0.2)
    ax.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.02))


def plot_lengths(ax: Axes, timeline: Steps) -> None:
    """Plots histograms of the completion lengths in the first and in the last quarter of the steps."""
    quarter = max(len(timeline) // 4, 1)
    first, last = (
        [x for s in part for r in s["ranks"] for x in r["lengths"]]
        for part in (timeline[:quarter], timeline[-quarter:])
    )
    bins = np.linspace(0, max([*first, *last, 1]), 40).tolist()
    ax.hist(first, bins=bins, alpha=0.6, label="first quarter of steps")
    ax.hist(last, bins=bins, alpha=0.6, label="last quarter")
    ax.set(xlabel="tokens", ylabel="completions")
    ax.legend()


def plot_acceptance(ax: Axes, metrics: Steps) -> None:
    """Plots tokens per forward pass of each step: over the whole rollout, and where each drafter ran."""
    names = sorted({k for m in metrics for k in m if k.startswith("rollout/acceptance_length")})
    for name in names:
        points = [(m["step"] + 1, m[name]) for m in metrics if name in m]
        label = name.removeprefix("rollout/acceptance_length").lstrip("_") or "whole rollout"
        ax.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
    ax.set(xlabel="step", ylabel="tokens per forward pass")
    ax.legend()


def plot_tail(ax: Axes, step: dict[str, Any]) -> None:
    """Plots each rank's active sequences during one rollout, with a thick line where it speculated."""
    for number, rank in enumerate(step["ranks"]):
        at = [0.0, *(t[0] for t in rank["tail"])]
        active = [t[1] for t in rank["tail"]]
        ax.stairs(active, at, baseline=None, label=f"rank {number}", color=f"C{number}")
        speculative = [np.nan if t[2] == "plain" else t[1] for t in rank["tail"]]
        ax.stairs(speculative, at, baseline=None, lw=4, alpha=0.35, color=f"C{number}")
    ax.set(xlabel="seconds", ylabel="active sequences", ylim=(0, None))
    ax.legend(title="thick: speculating")


def plot_phases(ax: Axes, timeline: Steps) -> None:
    """Plots the seconds of each phase as stacked bars, one bar for each rank and step."""
    ranks = max(len(s["ranks"]) for s in timeline)  # a run may resume with another number of ranks
    width = 0.8 / ranks
    for rank in range(ranks):
        x = np.array([s["step"] + 1 + (rank - (ranks - 1) / 2) * width for s in timeline])
        bottom = np.zeros(len(timeline))
        for phase in PHASES:
            height = np.array([_phase_seconds(s["ranks"], rank, phase) for s in timeline])
            ax.bar(x, height, width, bottom=bottom, color=_COLOURS[phase], label=phase if rank == 0 else None)
            bottom += height
    ax.set(xlabel="step (one bar per rank)", ylabel="seconds")
    ax.legend(ncol=4, fontsize=8)


def _phase_seconds(ranks: Steps, rank: int, phase: str) -> float:
    return sum(
        end - begin for r in ranks[rank : rank + 1] for name, begin, end in r["spans"] if name == phase
    )


def plot_timeline(ax: Axes, step: dict[str, Any]) -> None:
    """Plots each rank's phases during one step, and above them when its completions were scored."""
    labelled: set[str] = set()
    for number, rank in enumerate(step["ranks"]):
        for phase, begin, end in rank["spans"]:
            label = None if phase in labelled else phase
            labelled.add(phase)
            ax.barh(number, end - begin, left=begin, color=_COLOURS[phase], label=label)
        for begin, end in rank.get("scoring", ()):
            label = None if "scoring" in labelled else "scoring, in parallel"
            labelled.add("scoring")
            ax.barh(number + 0.46, end - begin, height=0.08, left=begin, color="black", label=label)
    ax.set(xlabel="seconds since the step began", yticks=range(len(step["ranks"])), ylabel="rank")
    ax.legend(ncol=4, fontsize=8)
