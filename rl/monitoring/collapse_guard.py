"""Names a collapse when it happens: accuracy that falls away from its best, or entropy that is gone."""

from __future__ import annotations

from typing import Any

from paceline.rl.config.length import GuardConfig


class CollapseGuard:
    """Watches a run's steps. Every rank sees the same metrics and says the same.

    A length penalty can pay a policy to say nothing: accuracy then falls within a few steps, together with
        length (GRPO-λ, arXiv
    2505.18086, figure 1). A sharpened policy loses its entropy and stops learning (UloRL, arXiv 2507.19766,
    section 3.3).

    Args:
        config: The recipe's ``length.guard``.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._recent: list[dict[str, float]] = []
        self._best: dict[str, float] = {}
        self._collapsed: list[str] = []

    def observe(self, metrics: dict[str, Any]) -> str | None:
        """Takes in a step. Returns one line when a collapse begins.

        Args:
            metrics: Of the step; ``reward/exact``, ``length/mean`` and ``update/entropy`` are read,
                ``guard/collapsed`` is added: how many kinds of collapse there are.
        """
        if self._config.action == "off":
            return None
        seen = {name: float(metrics[name]) for name in ("reward/exact", "length/mean", "update/entropy")}
        self._recent = [*self._recent, seen][-self._config.window :]
        now = {name: sum(step[name] for step in self._recent) / len(self._recent) for name in seen}
        found = self._found(now) if len(self._recent) == self._config.window else {}
        new = [line for kind, line in found.items() if kind not in self._collapsed]
        self._collapsed = list(found)
        if (
            now["reward/exact"] > self._best.get("reward/exact", -1.0)
            and len(self._recent) == self._config.window
        ):
            self._best = now
        metrics["guard/collapsed"] = len(found)
        return "; ".join(new) or None

    def _found(self, now: dict[str, float]) -> dict[str, str]:
        found, config = {}, self._config
        best = self._best.get("reward/exact", 0.0)
        if best > 0 and now["reward/exact"] <= (1 - config.accuracy_fall) * best:
            found["accuracy"] = (
                f"accuracy collapse: {now['reward/exact']:.2f} of the last {config.window} steps' "
                "completions are correct, "
                f"{best:.2f} at best, while the mean length went from {self._best['length/mean']:.0f} to "
                f"{now['length/mean']:.0f} "
                "tokens; weaken length.rewards, or take grpo_lambda, which spares what is not solved yet"
            )
        if now["update/entropy"] < config.entropy_floor:
            found["entropy"] = (
                f"entropy collapse: {now['update/entropy']:.3g} nats a token over the last {config.window} "
                "steps, under "
                f"length.guard.entropy_floor {config.entropy_floor:g}; write update.mask_mastered, "
                "update.entropy_coef or a lower "
                "update.lr"
            )
        return found

    def state(self) -> dict[str, Any]:
        """What was seen, as JSON."""
        return {"recent": self._recent, "best": self._best, "collapsed": self._collapsed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._recent, self._best = list(state.get("recent", [])), dict(state.get("best", {}))
        self._collapsed = list(state.get("collapsed", []))
