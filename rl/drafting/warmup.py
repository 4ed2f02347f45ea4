"""A first drafter for a policy, from the policy's own samples."""

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
from paceline.drafter_trainer.vocabulary import choose_vocabulary, coverage
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.errors import UserError
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.models.initial import starting_policy
from paceline.rl.models.policies import load_policy, load_tokenizer
from paceline.rl.tasks.problems import Problem
from paceline.rl.tasks.task import load_task
from paceline.rollout import Strategy, mean_acceptance_length

_CHAIN = 4
_PROBLEMS = 16
_LEAST_ASKED = 16  # micro-batches, however little time sampling has left
_FIRST_LR, _LAST_LR = 3.0, 0.3


@dataclass(slots=True)
class WarmupReport:
    """What it took and what came of it.

    Attributes:
        sampling_seconds, training_seconds: Wall time.
        rounds, updates, tokens: Rounds of sampling and training; optimizer steps; anchors trained on.
        coverage: Share of the last round's tokens that can be drafted.
        greedy: Acceptance length of greedy decoding with chains of four, on problems that were not sampled
            from.
        sampled: The same at the recipe's temperature.
        curve: (seconds, expected acceptance length on sequences kept back) after each round.
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


OnRound = Callable[[float, str], None]


def warm_drafter(
    config: RunConfig, minutes: float, out: Path, on_round: OnRound | None = None
) -> WarmupReport:
    """Samples from the recipe's starting policy and distils, in turn, for so many minutes; writes the drafter
    to ``out``.

    The learning rate falls linearly with time, from three times the recipe's to a third of it. The drafter
    that is written is the last one that did better on sequences kept back.

    Args:
        config: The recipe, whose starting policy is there.
        minutes: Of sampling and training together.
        out: New directory.
        on_round: Called after each round with the seconds so far and a line about it.

    Raises:
        UserError: for a recipe without the eagle3 drafter.
    """
    if "eagle3" not in config.speculation.drafters:
        raise UserError("speculation.drafters has no eagle3: there is no drafter to warm up")
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
    size, vocab = config.drafter.draft_vocab_size, worker.runner.vocab_size

    def spent() -> float:
        return (time.perf_counter() - started) / (60 * minutes)

    asked = 0

    def stop(spot: SpotTrainer) -> bool:
        nonlocal asked
        for learner in spot.learners:
            learner.scale_rate(max(_FIRST_LR * (1 - spent()), _LAST_LR))
        asked += 1
        return spent() >= 1 and asked > _LEAST_ASKED

    while report.rounds == 0 or spent() < 1:
        batch = worker.rollout(task.batch(report.rounds, config.rollout.prompts_per_step), report.rounds)
        report.sampling_seconds += batch.seconds
        texts = [[*r.request.prompt_ids, *r.token_ids] for r in batch.rollouts]
        spot = drafter.spot or drafter.create(choose_vocabulary(texts, size, vocab))
        report.coverage = coverage(texts, spot.serving.vocabulary)
        drafter.learn_from(batch, [0.0] * len(batch.rollouts))
        trained = drafter.train(partial(stop, spot))
        report.rounds += 1
        report.updates += trained.updates
        report.tokens += trained.tokens
        report.training_seconds += trained.seconds
        if trained.approved:
            spot.adopt([p.detach() for p in spot.approved.parameters()])
            drafter.swap_in()
            report.curve.append((time.perf_counter() - started, trained.candidate_length))
        if on_round is not None:
            seen = f"{report.updates} updates  expected acceptance length {trained.candidate_length:.2f}"
            on_round(60 * minutes * spent(), seen)
    others = load_task(replace(config.task, size=_PROBLEMS), config.seed + 1).problems[:_PROBLEMS]
    report.greedy, report.sampled = (
        _measure(worker, config, others, t) for t in (0.0, config.rollout.temperature)
    )
    save_drafter(spot.serving, out, torch.float32)
    save_optimizer(spot.learner.optimizer, out / "optimizer")
    return report


def _measure(
    worker: RolloutWorker, config: RunConfig, problems: Sequence[Problem], temperature: float
) -> float:
    """Decodes problems in chains of four with the drafter as it is, and returns the acceptance length."""
    worker.engine.use_strategy(Strategy("eagle3", _CHAIN))
    requests = [
        replace(r, params=replace(r.params, temperature=temperature))
        for r in worker.groups.requests(problems, step=0)
    ]
    return mean_acceptance_length(worker.engine.generate(requests[:: config.rollout.group_size]))
