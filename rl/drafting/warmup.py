"""Distils a first drafter from a policy's own samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from paceline.drafter_trainer.spot_trainer import SpotTrainer
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.drafter_trainer.storage.optimizer_state import save_optimizer
from paceline.drafter_trainer.vocabulary import coverage
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.errors import UserError
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.models.initial import starting_policy
from paceline.rl.models.loading import load_policy, load_tokenizer
from paceline.rl.tasks.problems import Problem
from paceline.rl.tasks.task import load_task
from paceline.rollout import Strategy, mean_acceptance_length

_CHAIN_DEPTH = 4  # draft tokens of the chains that measure the acceptance length
_MEASURED_PROBLEMS = 16
_MIN_MICROBATCHES = 16  # trained at least, however little time sampling leaves
_FIRST_LR, _LAST_LR = 3.0, 0.3  # multiples of the recipe's learning rate


@dataclass(slots=True)
class WarmupReport:
    """Times and results of a drafter's warm-up.

    Attributes:
        sampling_seconds: Wall time of sampling.
        training_seconds: Wall time of training.
        rounds: Rounds of sampling and training.
        updates: Optimizer steps.
        tokens: Anchor positions trained on.
        coverage: Share of the last round's tokens that are in the draft vocabulary.
        greedy: Acceptance length of greedy decoding with chains of four, on held-out problems.
        sampled: Acceptance length on these problems at the recipe's temperature.
        curve: (seconds, expected acceptance length on held-out sequences) after each round.
    """

    sampling_seconds: float = 0.0
    training_seconds: float = 0.0
    rounds: int = 0
    updates: int = 0
    tokens: int = 0
    coverage: float = 0.0
    greedy: float = 1.0
    sampled: float = 1.0
    curve: list[tuple[float, float]] = field(default_factory=list)


def warmup_rate(spent: float) -> float:
    """Returns the learning rate of a new drafter as a multiple of the recipe's.

    Args:
        spent: Share of its training time that is over.
    """
    return max(_FIRST_LR * (1 - spent), _LAST_LR)


OnRound = Callable[[float, str], None]


def warm_drafter(
    config: RunConfig, minutes: float, out: Path, on_round: OnRound | None = None
) -> WarmupReport:
    """Samples from the recipe's starting policy and distils, in turn, and writes the drafter to ``out``.

    The learning rate falls linearly with time, from three times the recipe's to a third of it. The drafter
    that is written is the last one that did better on held-out sequences.

    Args:
        config: The recipe, whose starting policy exists.
        minutes: Wall time of sampling and training together.
        out: Directory to create.
        on_round: Called after each round with the seconds so far and a line about the round.

    Raises:
        UserError: for a recipe without the eagle3 drafter.
    """
    if "eagle3" not in config.speculation.drafters:
        raise UserError("speculation.drafters has no eagle3, and no other drafter is trained: add eagle3")
    source = starting_policy(config)
    policy = (
        load_policy(source, "cuda" if torch.cuda.is_available() else "cpu")
        .to(getattr(torch, config.rollout.dtype))
        .eval()
    )
    worker = RolloutWorker(config, policy.requires_grad_(False), load_tokenizer(source))
    drafter = RankDrafter(config, policy, worker)
    task = load_task(config.task, config.seed)
    report, started = WarmupReport(), time.perf_counter()

    def spent() -> float:
        return (time.perf_counter() - started) / (60 * minutes)

    microbatches = 0

    def stop(spot: SpotTrainer) -> bool:
        nonlocal microbatches
        for learner in spot.learners:
            learner.scale_rate(warmup_rate(spent()))
        microbatches += 1
        return spent() >= 1 and microbatches > _MIN_MICROBATCHES

    while report.rounds == 0 or spent() < 1:
        batch = worker.rollout(task.batch(report.rounds, config.rollout.prompts_per_step), report.rounds)
        report.sampling_seconds += batch.seconds
        spot = drafter.spot or drafter.create(drafter.choose_vocabulary(batch.texts))
        report.coverage = coverage(batch.texts, spot.serving.vocabulary)
        drafter.learn_from(batch, [0.0] * len(batch.rollouts), same_policy=True)
        trained = drafter.train(partial(stop, spot))
        report.rounds += 1
        report.updates += trained.updates
        report.tokens += trained.tokens
        report.training_seconds += trained.seconds
        if trained.approved:
            drafter.serve_approved()
            report.curve.append((time.perf_counter() - started, trained.candidate_length))
        if on_round is not None:
            seen = f"{report.updates} updates  expected acceptance length {trained.candidate_length:.2f}"
            on_round(60 * minutes * spent(), seen)
    held_out = load_task(replace(config.task, size=_MEASURED_PROBLEMS), config.seed + 1).problems[
        :_MEASURED_PROBLEMS
    ]
    report.greedy, report.sampled = (
        _measure(worker, config, held_out, t) for t in (0.0, config.rollout.temperature)
    )
    save_drafter(spot.serving, out, torch.float32)
    save_optimizer(spot.learner.optimizer, out / "optimizer")
    return report


def _measure(
    worker: RolloutWorker, config: RunConfig, problems: Sequence[Problem], temperature: float
) -> float:
    """Decodes problems with chains of four draft tokens and returns the acceptance length."""
    worker.engine.use_strategy(Strategy("eagle3", _CHAIN_DEPTH))
    requests = [
        replace(r, params=replace(r.params, temperature=temperature))
        for r in worker.groups.requests(problems, step=0)
    ]
    return mean_acceptance_length(worker.engine.generate(requests[:: config.rollout.group_size]))
