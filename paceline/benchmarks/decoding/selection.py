"""The bandit against every fixed strategy, and what speculation can give on a whole batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

from paceline.benchmarks.common.harness import Measurement, RolloutBench, Workload
from paceline.benchmarks.common.results import Keep, ignore
from paceline.rollout import PLAIN, RolloutEngine, Strategy
from paceline.rollout.strategy import FixedSelector, Selector, default_arms

_LEAST_STEPS = 200
_FINALISTS, _FINAL_PASSES = 3, 3


@dataclass(frozen=True, slots=True)
class SelectionRow:
    """One batch size: every fixed strategy once, then the best of them and the bandit in turn.

    The fastest of many single passes is also the luckiest, so the first few are measured again, as often as
    the bandit and in alternation with it.

    Attributes:
        batch: Concurrent sequences.
        search: Tokens a second of every fixed strategy, one pass each.
        finals: Tokens a second of plain decoding, of the search's best three and of the bandit
            (``adaptive``), three passes each.
        chosen: How often the bandit chose what, in its last pass.
    """

    batch: str
    search: dict[str, float]
    finals: dict[str, list[float]]
    chosen: dict[str, int] = field(default_factory=dict)

    def speed(self, method: str) -> float:
        """Median tokens a second of the final passes: one of them may have had company on the machine."""
        return median(self.finals[method])

    @property
    def best(self) -> str:
        """The fastest fixed strategy."""
        return max((name for name in self.finals if name != "adaptive"), key=self.speed)

    @property
    def share_of_best(self) -> float:
        """The bandit's speed over the best fixed strategy's."""
        return self.speed("adaptive") / self.speed(self.best)

    @property
    def over_plain(self) -> float:
        """The bandit's speed over plain decoding's."""
        return self.speed("adaptive") / self.speed("plain")


def compare_selection(
    bench: RolloutBench, batches: list[str], say: Callable[[str], None], keep: Keep = ignore
) -> list[SelectionRow]:
    """Exhaustive search over the default arms at each batch size, then the bandit once it has seen 200 steps
    of other requests.
    """
    rows = []
    for w in bench.workloads(batches):
        engine = bench.engine(w.slots, max(r.params.max_tokens for r in w.timed))
        arms = [PLAIN, *(arm for name in engine.drafters for arm in default_arms(name, engine.max_nodes))]
        search = {str(arm): bench.measure(w, str(arm), arm, engine).tokens_per_second for arm in arms}
        best = sorted(search, key=search.__getitem__, reverse=True)[:_FINALISTS]
        bandit = _taught(bench, w, engine)
        finals: dict[str, list[float]] = {name: [] for name in dict.fromkeys(("plain", *best, "adaptive"))}
        chosen: Counter[str] = Counter()
        for _ in range(_FINAL_PASSES):
            for name, speeds in finals.items():
                engine.speculation.selector = (
                    bandit if name == "adaptive" else FixedSelector(Strategy.parse(name))
                )
                speeds.append(bench.measure(w, name, None, engine).tokens_per_second)
            chosen = Counter(r.strategy for r in engine.records)
        row = SelectionRow(w.name, search, finals, dict(chosen))
        say(
            f"{w.name:>3}: best {row.best} {row.speed(row.best):.1f} tokens/s, bandit "
            f"{row.speed('adaptive'):.1f} "
            f"({row.share_of_best:.1%} of it, {row.over_plain:.2f} x plain)"
        )
        rows.append(row)
        keep(row)
    return rows


def _taught(bench: RolloutBench, w: Workload, engine: RolloutEngine) -> Selector:
    engine.use_strategy("adaptive")
    seen = passes = 0
    # a text that drafters have seen before would teach it that they are always right
    while seen < _LEAST_STEPS:
        bench.forget(engine)
        engine.generate([replace(r, seed=r.seed + passes) for r in w.warm])
        seen, passes = seen + len(engine.records), passes + 1
    return engine.speculation.selector


@dataclass(frozen=True, slots=True)
class AmdahlRow:
    """A whole batch, and the most that speculation could give on it.

    Attributes:
        workload: Its name.
        plain_seconds, adaptive_seconds: Wall time.
        ratio: Of the two.
        bound: Plain time over what would be left if every decode forward committed a whole draft of
            ``max_nodes`` tokens at the
            price of a plain one: prefill and 1 / (max_nodes + 1) of the decoding.
        tail_ratio: Of the time with at most four sequences active; None where plain decoding never had so
            few.
    """

    workload: str
    plain_seconds: float
    adaptive_seconds: float
    ratio: float
    bound: float
    tail_ratio: float | None


def measure_whole_batch(bench: RolloutBench, w: Workload) -> AmdahlRow:
    """Plain and adaptive, twice in turn and the faster of each, on a batch whose sequences end at different
    times.
    """
    engine = bench.engine(w.slots, max(r.params.max_tokens for r in w.timed))
    engine.use_strategy("adaptive")
    selectors = {"adaptive": engine.speculation.selector, "plain": FixedSelector(PLAIN)}
    best: dict[str, tuple[Measurement, float]] = {}
    engine.generate(w.warm)
    for _ in range(2):
        for name, selector in selectors.items():
            engine.speculation.selector = selector
            measured = bench.measure(w, name, None, engine)
            if name not in best or measured.seconds < best[name][0].seconds:
                best[name] = measured, _tail_seconds(engine)
    (plain, tail_plain), (adaptive, tail) = best["plain"], best["adaptive"]
    assert plain.prefill_seconds is not None
    least = plain.prefill_seconds + (plain.seconds - plain.prefill_seconds) / (engine.max_nodes + 1)
    tail_ratio = tail_plain / tail if tail_plain > 0 and tail > 0 else None
    return AmdahlRow(
        w.name,
        plain.seconds,
        adaptive.seconds,
        plain.seconds / adaptive.seconds,
        plain.seconds / least,
        tail_ratio,
    )


def _tail_seconds(engine: RolloutEngine) -> float:
    return sum(r.feedback.total_seconds for r in engine.records if r.active <= 4)
