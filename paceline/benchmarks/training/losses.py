"""Which distillation loss wins for each second of training, and what collecting its data costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import is_over
from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.spot_trainer import SpotTrainer
from paceline.drafter_trainer.trace_buffer import TraceBuffer
from paceline.drafter_trainer.training_time_test import Objective
from paceline.drafter_trainer.vocabulary import choose_vocabulary
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rollout import PLAIN, Rollout, RolloutEngine
from paceline.rollout.drafters.eagle3_model import eagle3_config

_ENDLESS = 10**6
_JUDGED = 4096  # anchors kept back

VARIANTS: dict[str, tuple[Objective, bool]] = {
    "fkl": (Objective("fkl"), False),
    "rkl": (Objective("rkl"), False),
    "jsd": (Objective("jsd"), False),
    "tvd": (Objective("tvd"), False),
    "tvd++": (Objective("tvd++"), False),
    "log_acceptance": (Objective("log_acceptance"), False),
    "length": (Objective("length"), False),
    "fkl, hopeless tokens left out (top 10)": (Objective("fkl", mask_top=10), False),
    "fkl, all positions alike": (Objective("fkl", decay=1.0), False),
    "fkl, one position": (Objective("fkl", unroll=1), False),
    "fkl, only where drafts were refused": (Objective("fkl", feedback_only=True), False),
    "fkl, and after refused tokens": (Objective("fkl", on_policy=0.5), False),
    "fkl, optimistic": (Objective("fkl"), True),
}


@dataclass(frozen=True, slots=True)
class LossRow:
    """A fresh drafter after a fixed time of training, judged on sequences that it has not seen.

    Attributes:
        variant: What it was trained for.
        updates: Optimizer steps that fitted into the time.
        seconds: Of training.
        drawn, likeliest: Expected acceptance length of chains of four, of drawn drafts and of likeliest ones.
        by_position: Σ min(p, q) at each draft position.
    """

    variant: str
    updates: int
    seconds: float
    drawn: float
    likeliest: float
    by_position: list[float]


def compare_losses(
    bench: RolloutBench, seconds: float, sequences: int, say: Callable[[str], None], keep: Keep = ignore
) -> list[LossRow]:
    """Every variant from the same start, on the same traces, in the same order."""
    rollouts = _traced(bench, sequences)
    texts = [[*r.request.prompt_ids, *r.token_ids] for r in rollouts]
    vocabulary = choose_vocabulary(
        texts, bench.config.drafter.draft_vocab_size, bench.policy.config.get_text_config().vocab_size
    )
    rows = []
    for name, (objective, optimistic) in VARIANTS.items():
        config = eagle3_config(bench.policy.config, len(vocabulary), bench.taps)
        learner = DrafterLearner(
            initial_drafter(config, vocabulary, bench.policy, seed=0),
            bench.policy.get_input_embeddings(),
            bench.policy.get_output_embeddings(),
            objective,
            lr=bench.config.drafter.lr,
            temperature=bench.config.rollout.temperature,
            autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16),
            optimistic=optimistic,
        )
        buffer = TraceBuffer(passes=_ENDLESS, seed=0)
        buffer.begin_step()
        buffer.add(rollouts)
        spot = SpotTrainer(
            [learner], buffer, budget=bench.config.drafter.tokens_per_microbatch, judge_every=_ENDLESS
        )
        end = time.perf_counter() + seconds
        with torch.enable_grad():
            report = spot.run(partial(is_over, end))
        learner.objective = Objective(unroll=4)
        (pieces,) = buffer.held_out_batches(_JUDGED, 1)
        judged = learner.evaluate(pieces)
        rows.append(
            LossRow(
                name,
                report.updates,
                report.seconds,
                judged.length,
                judged.likeliest_length,
                judged.acceptance,
            )
        )
        keep(rows[-1])
        say(
            f"{name:<40} {report.updates:>4} updates  drawn {judged.length:.3f}  likeliest "
            f"{judged.likeliest_length:.3f}"
        )
    return rows


def _traced(bench: RolloutBench, sequences: int) -> list[Rollout]:
    engine = bench.engine(32, bench.params.max_tokens, drafters=("eagle3",), collect_traces=True)
    if "eagle3" in engine.drafters:  # so that there are drafts to refuse
        engine.use_strategy("eagle3:3")
    return engine.generate(bench.requests(bench.problems, sequences, 4))


def _collecting(bench: RolloutBench, longest: int, collects: bool) -> RolloutEngine:
    return policy_engine(
        bench.policy,
        max_slots=32,
        max_context=160 + longest,
        tap_layers=bench.taps if collects else (),
        collect_traces=collects,
    )


@dataclass(frozen=True, slots=True)
class CollectionRow:
    """Plain rollouts with and without collecting what a drafter learns from, the fastest of passes in turn.

    Attributes:
        without, collecting: Seconds.
        share: Of the collecting rollouts' time that collecting takes.
    """

    without: float
    collecting: float

    @property
    def share(self) -> float:
        return 1 - self.without / self.collecting


def collection_cost(bench: RolloutBench, passes: int) -> CollectionRow:
    """On the workload of 32 sequences."""
    (w,) = bench.workloads(("32",))
    longest = max(r.params.max_tokens for r in w.timed)
    engines = [_collecting(bench, longest, collects) for collects in (False, True)]
    best = [float("inf")] * 2
    for number in range(passes + 1):
        for i, engine in enumerate(engines):
            engine.use_strategy(PLAIN)
            begin = time.perf_counter()
            engine.generate([replace(r, seed=r.seed + number) for r in w.timed])
            if number:  # the first pass warms up
                best[i] = min(best[i], time.perf_counter() - begin)
    return CollectionRow(*best)
