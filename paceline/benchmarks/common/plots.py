"""Redraws the plots of the benchmarks from the JSON files in benchmarks/results."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options: the command always redraws benchmarks/results."""


def run(args: argparse.Namespace) -> None:
    """Redraws the plots and prints their paths."""
    for path in draw_all(Path("benchmarks/results")):
        print(path)


def draw_all(folder: Path) -> list[Path]:
    """Draws a plot beside each JSON file in ``folder`` that has one, and returns the paths of the plots."""
    drawers = {
        "drafters": _drafters,
        "sharing": _sharing,
        "positions": _positions,
        "verifiers": _verifiers,
        "selection": _selection,
        "idle": _idle,
        "online": _online,
        "lengths": _lengths,
        "tail": _tail,
    }
    drawn = []
    for name, drawer in drawers.items():
        source = folder / f"{name}.json"
        if source.is_file():
            data = json.loads(source.read_text(encoding="utf-8"))
            tables = {key: value for key, value in data.items() if isinstance(value, list)}
            figure = drawer(tables)
            figure.tight_layout()
            figure.savefig(source.with_suffix(".png"))
            plt.close(figure)
            drawn.append(source.with_suffix(".png"))
    return drawn


def _drafters(tables: dict[str, Rows]) -> plt.Figure:
    cells: dict[tuple[float, str], Rows] = defaultdict(list)
    for row in tables["rows"]:
        cells[row["temperature"], row["batch"]].append(row)
    figure, axes = plt.subplots(1, len(cells), figsize=(4.2 * len(cells), 6), dpi=90, squeeze=False)
    for ax, ((temperature, batch), rows) in zip(axes[0], cells.items(), strict=True):
        rows = sorted(rows, key=lambda r: r["ratio"])
        names = [r["strategy"] + (f"  {r['rules']}" if r["rules"] else "") for r in rows]
        ax.barh(names, [r["ratio"] for r in rows], color="#4878d0")
        for y, r in enumerate(rows):
            ax.text(r["ratio"], y, f" {r['acceptance_length']:.2f}", va="center", fontsize=6)
        ax.axvline(1, color="grey", lw=0.8)
        ax.tick_params(labelsize=6)
        ax.set_title(
            f"T = {temperature}, {batch} sequences: ÷ plain\n(accepted length at the bars)", fontsize=8
        )
    return figure


def _lengths(tables: dict[str, Rows]) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(8, 5), dpi=90)
    for row in tables["rows"]:
        ax.errorbar(row["length"], row["accuracy"], yerr=row["accuracy_error"], fmt="o", ms=5, capsize=2)
        ax.annotate(f"  {row['recipe']}", (row["length"], row["accuracy"]), fontsize=7)
    ax.set_xlabel("tokens per completion, last quarter")
    ax.set_ylabel("accuracy (bars: standard error of the difference to plain GRPO)")
    return figure


def _tail(tables: dict[str, Rows]) -> plt.Figure:
    rows = tables["rows"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), dpi=90)
    axes[0].barh(
        [r["remedy"] for r in rows], [rows[0]["step_by_completion"] / r["step_by_completion"] for r in rows]
    )
    axes[0].axvline(1, color="grey", lw=0.8)
    axes[0].set_title("time of a step per completion: none ÷ mitigation", fontsize=9)
    axes[0].tick_params(labelsize=7)
    for ax, key in ((axes[1], "rewards"), (axes[2], "entropies")):
        for r in rows:
            ax.plot(_smoothed(r[key]), label=r["remedy"], lw=1)
        ax.set_title(f"{key}, mean of four steps", fontsize=9)
    axes[2].legend(fontsize=6)
    return figure


def _smoothed(values: list[float], window: int = 4) -> list[float]:
    return [
        sum(part) / len(part) for i in range(len(values)) if (part := values[max(i - window + 1, 0) : i + 1])
    ]


def _sharing(tables: dict[str, Rows]) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(6, 3.5), dpi=90)
    lines: dict[tuple[bool, int], Rows] = defaultdict(list)
    for row in tables["rows"]:
        lines[row["shared"], row["epoch"]].append(row)
    for (shared, epoch), rows in lines.items():
        style = "o-" if shared else "o:"
        label = f"epoch {epoch + 1}, {'shared' if shared else 'alone'}"
        ax.plot(
            [r["sample"] + 1 for r in rows],
            [r["acceptance_length"] for r in rows],
            style,
            color=f"C{epoch}",
            ms=3,
            label=label,
        )
    ax.set(xlabel="sample of the group", ylabel="acceptance length, suffix:4")
    ax.legend(fontsize=7, ncol=2)
    return figure


def _positions(tables: dict[str, Rows]) -> plt.Figure:
    figure, ax = plt.subplots(figsize=(6, 3.5), dpi=90)
    lines: dict[tuple[str, int | None], Rows] = defaultdict(list)
    for row in tables["rows"]:
        lines[row["drafter"], row["window"]].append(row)
    for (drafter, window), rows in lines.items():
        label = (
            drafter
            if drafter == "suffix"
            else f"{drafter}, " + ("all tokens" if window is None else f"window {window}")
        )
        ax.plot(
            [r["until"] for r in rows], [r["tokens_per_step"] for r in rows], marker="o", ms=3, label=label
        )
    ax.set(xlabel="position in the text", ylabel="acceptance length, chains of 3")
    ax.legend(fontsize=8)
    return figure


def _verifiers(tables: dict[str, Rows]) -> plt.Figure:
    bounds = {name: rows for name, rows in tables.items() if name.startswith("bounds")}
    figure, axes = plt.subplots(1, len(bounds), figsize=(5 * len(bounds), 3.6), dpi=90, squeeze=False)
    for ax, (name, rows) in zip(axes[0], bounds.items(), strict=True):
        k = [r["candidates"] for r in rows]
        for key, style in (
            ("bound_without", "k--"),
            ("without_replacement", "C0o-"),
            ("bound_with", "k:"),
            ("spectr", "C1o-"),
            ("with_replacement", "C2o-"),
            ("deterministic", "C3o-"),
        ):
            ax.plot(k, [r[key] for r in rows], style, ms=3, label=key.replace("_", " "))
        ax.set(
            xlabel="candidates", ylabel="P(one is accepted)", title=name.removeprefix("bounds, "), xticks=k
        )
        ax.legend(fontsize=7)
    return figure


def _selection(tables: dict[str, Rows]) -> plt.Figure:
    rows = [row for name, table in tables.items() if name.startswith("selection") for row in table]
    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 6), dpi=90, squeeze=False)
    for ax, row in zip(axes[0], rows, strict=True):
        fixed = sorted(row["search"].items(), key=lambda item: item[1])
        ax.barh([name for name, _ in fixed], [speed for _, speed in fixed], color="#b0b0b0")
        for speed in row["finals"]["adaptive"]:
            ax.axvline(
                speed, color="C3", lw=1, label="bandit" if speed == row["finals"]["adaptive"][0] else None
            )
        ax.tick_params(labelsize=6)
        ax.set_title(f"{row['batch']} sequences: tokens/s", fontsize=9)
        ax.legend(fontsize=7)
    return figure


def _idle(tables: dict[str, Rows]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), dpi=90)
    for row in tables["rows"]:
        label = "frozen" if row["schedule"] == "never" else "trained in idle time"
        for ax, key in zip(axes, ("acceptance", "reward"), strict=True):
            ax.plot(range(1, len(row[key]) + 1), row[key], "o-", ms=4, label=label)
    for ax, name in zip(axes, ("acceptance length", "reward"), strict=True):
        ax.set(xlabel="quarter of the run", ylabel=name, xticks=range(1, 5))
        ax.legend(fontsize=8)
    return figure


def _online(tables: dict[str, Rows]) -> plt.Figure:
    figure, (lengths, regret) = plt.subplots(1, 2, figsize=(9, 3.5), dpi=90)
    for row in tables["rows"]:
        lengths.plot(row["lengths"], label=row["variant"], lw=1)
        regret.plot(row["regret"], label=row["variant"], lw=1)
    lengths.set(xlabel="step", ylabel="expected acceptance length when served")
    regret.set(xlabel="step", ylabel="regret to the best fixed drafter")
    regret.axhline(0, color="grey", lw=0.8)
    regret.legend(fontsize=6)
    return figure
