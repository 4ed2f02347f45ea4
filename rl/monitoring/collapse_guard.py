"""Detects collapse during training: accuracy far below its best, or entropy near zero."""

from __future__ import annotations

from typing import Any

from paceline.rl.config.length import GuardConfig


class CollapseGuard:
    """Watches the metrics of a run's steps. Every rank sees the same metrics and reaches the same result.

    A length penalty can reward a policy for saying nothing: accuracy and length then fall together within a
    few steps (GRPO-λ, arXiv 2505.18086, figure 1). A policy that becomes too certain loses its entropy and
    stops learning (UloRL, arXiv 2507.19766, section 3.3).

    Args:
        config: The recipe's ``length.guard``.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._recent: list[dict[str, float]] = []
        self._best: dict[str, float] = {}
        self._collapsed: list[str] = []

    def observe(self, metrics: dict[str, Any]) -> str | None:
        """Records a step's metrics and returns one line when a collapse begins.

        Args:
            metrics: Metrics of the step. ``reward/exact``, ``length/mean`` and ``update/entropy`` are read;
                ``guard/collapsed``, the number of collapses in progress, is added.
        """
        if self._config.action == "off":
            return None
        step = {name: float(metrics[name]) for name in ("reward/exact", "length/mean", "update/entropy")}
        self._recent = [*self._recent, step][-self._config.window :]
        means = {name: sum(s[name] for s in self._recent) / len(self._recent) for name in step}
        full_window = len(self._recent) == self._config.window
        collapses = self._collapses(means) if full_window else {}
        new = [line for kind, line in collapses.items() if kind not in self._collapsed]
        self._collapsed = list(collapses)
        if full_window and means["reward/exact"] > self._best.get("reward/exact", -1.0):
            self._best = means
        metrics["guard/collapsed"] = len(collapses)
        return "; ".join(new) or None

    def _collapses(self, means: dict[str, float]) -> dict[str, str]:
        """Returns a line for each kind of collapse that the means over the window show."""
        collapses, config = {}, self._config
        best = self._best.get("reward/exact", 0.0)
        if best > 0 and means["reward/exact"] <= (1 - config.accuracy_fall) * best:
            collapses["accuracy"] = (
                f"accuracy collapse: {means['reward/exact']:.2f} of the last {config.window} steps' "
                f"completions are correct, {best:.2f} at best, while the mean length went from "
                f"{self._best['length/mean']:.0f} to {means['length/mean']:.0f} tokens; weaken "
                "length.rewards, or use grpo_lambda, which exempts prompts that are not solved yet"
            )
        if means["update/entropy"] < config.entropy_floor:
            collapses["entropy"] = (
                f"entropy collapse: {means['update/entropy']:.3g} nats per token over the last "
                f"{config.window} steps, below length.guard.entropy_floor {config.entropy_floor:g}; set "
                "update.mask_mastered, update.entropy_coef or a lower update.lr"
            )
        return collapses

    def state(self) -> dict[str, Any]:
        """Returns the recorded steps and collapses as JSON data, for a checkpoint."""
        return {"recent": self._recent, "best": self._best, "collapsed": self._collapsed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self._recent, self._best = list(state.get("recent", [])), dict(state.get("best", {}))
        self._collapsed = list(state.get("collapsed", []))
