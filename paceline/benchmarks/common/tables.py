"""Prints and plots measurements of decoding speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from paceline.benchmarks.common.harness import Measurement


def results_table(results: Sequence[Measurement]) -> Table:
    """Returns a table of tokens per second and their ratios to generate, to vLLM and to plain decoding."""
    t = Table(
        "sequences",
        "method",
        "tokens/s",
        "÷ generate",
        "÷ vLLM plain",
        "÷ plain",
        "accepted length",
        "drafting ms/token",
        "outside",
    )
    speed = {(m.workload, m.method): m.tokens_per_second for m in results}

    def ratio(m: Measurement, to: str) -> str:
        base = speed.get((m.workload, to))
        return "" if base is None else f"{m.tokens_per_second / base:.2f}"

    for m in results:
        known = m.acceptance_length is not None and m.outside_forwards is not None
        t.add_row(
            m.workload,
            m.method,
            f"{m.tokens_per_second:.1f}",
            *(ratio(m, to) for to in ("generate", "vLLM plain", "plain")),
            f"{m.acceptance_length:.2f}" if known else "",
            f"{m.draft_ms_per_token:.2f}" if known else "",
            f"{m.outside_forwards:.1%}" if known else "",
        )
    return t


def draw_results(results: Sequence[Measurement], path: Path) -> None:
    """Draws the tokens per second of every method relative to plain decoding, by workload."""
    methods = list(dict.fromkeys(m.method for m in results))
    workloads = list(dict.fromkeys(m.workload for m in results))
    figure, ax = plt.subplots(figsize=(10, 4), dpi=110)
    width = 0.85 / len(methods)
    plain = {m.workload: m.tokens_per_second for m in results if m.method == "plain"}
    for i, method in enumerate(methods):
        points = [
            (workloads.index(m.workload), m.tokens_per_second / plain[m.workload])
            for m in results
            if m.method == method
        ]
        ax.bar(
            [x + (i - (len(methods) - 1) / 2) * width for x, _ in points],
            [y for _, y in points],
            width,
            label=method,
        )
    ax.axhline(1, color="grey", lw=0.8)
    ax.set(
        xticks=range(len(workloads)),
        xticklabels=workloads,
        xlabel="concurrent sequences",
        ylabel="tokens/s ÷ engine plain",
    )
    ax.legend(ncol=len(methods), fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
