"""Trains new drafters on the same traces for a given time: what comparisons of drafter training share."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.runs import deadline_passed
from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.spot_trainer import LearnerReport, SpotTrainer
from paceline.drafter_trainer.trace_buffer import TraceBuffer
from paceline.drafter_trainer.vocabulary import choose_vocabulary
from paceline.rl.drafting.factory import drafter_autocast
from paceline.rl.drafting.warmup import warmup_rate
from paceline.rollout import Rollout
from paceline.rollout.drafters.eagle3_model import eagle3_config

_UNLIMITED = 10**6  # passes, updates and tokens: only the time limits training


class NewDrafters:
    """Makes drafters for a policy from its completions, and trains them.

    Args:
        bench: Policy and recipe.
        rollouts: The policy's completions with their traces; every fourth group is held out.
    """

    def __init__(self, bench: RolloutBench, rollouts: Sequence[Rollout]) -> None:
        self._bench, self._rollouts = bench, rollouts
        texts = [[*r.request.prompt_ids, *r.token_ids] for r in rollouts]
        policy = bench.policy.config.get_text_config()
        self._vocabulary = choose_vocabulary(texts, bench.config.drafter.draft_vocab_size, policy.vocab_size)

    def learner(
        self,
        objective: Objective,
        context: int,
        seed: int = 0,
        optimistic: bool = False,
        positions: int | None = None,
    ) -> DrafterLearner:
        """Returns a learner of an untrained drafter, at the recipe's learning rate.

        Args:
            objective: Loss and its options.
            context: Number of tokens of left context.
            seed: Seed of the first weights.
            optimistic: Whether updates use the last one as a hint.
            positions: Number of positions within which pieces are moved by random distances; None moves none.
        """
        bench, vocabulary = self._bench, self._vocabulary
        shape = eagle3_config(
            bench.policy.config, len(vocabulary), bench.taps, parallel=objective.parallel > 0
        )
        return DrafterLearner(
            initial_drafter(shape, vocabulary, bench.policy, seed),
            bench.policy.get_input_embeddings(),
            bench.policy.get_output_embeddings(),
            objective,
            lr=bench.config.drafter.lr,
            temperature=bench.config.rollout.temperature,
            autocast=drafter_autocast(torch.device("cpu")),
            context=context,
            positions=positions,
            optimistic=optimistic,
        )

    def buffer(self, seed: int = 0) -> TraceBuffer:
        """Returns the traces in an order that the seed decides, with every fourth group held out."""
        buffer = TraceBuffer(passes=_UNLIMITED, memory_tokens=_UNLIMITED, seed=seed)
        buffer.begin_step()
        buffer.add(self._rollouts)
        return buffer

    def train(
        self,
        learner: DrafterLearner,
        microbatch: int,
        seconds: float,
        seed: int = 0,
        as_warmup: bool = False,
    ) -> tuple[LearnerReport, TraceBuffer]:
        """Trains for a given time.

        Args:
            learner: Learner to train.
            microbatch: Tokens of a micro-batch.
            seconds: Wall time.
            seed: Seed of the order of the traces.
            as_warmup: Whether the learning rate falls as in a warm-up before a run.

        Returns:
            What was trained, and the buffer, which has the held-out sequences.
        """
        buffer = self.buffer(seed)
        spot = SpotTrainer([learner], buffer, budget=microbatch, judge_every=_UNLIMITED)
        start = time.perf_counter()

        def stop() -> bool:
            if as_warmup:
                learner.scale_rate(warmup_rate((time.perf_counter() - start) / seconds))
            return deadline_passed(start + seconds)

        with torch.enable_grad():
            report = spot.run(stop)
        return report, buffer
