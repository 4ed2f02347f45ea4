"""Builds what a recipe's drafter training is made of: trace buffer, learners, and weights of completions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.spot_trainer import SpotTrainer
from paceline.drafter_trainer.trace_buffer import TraceBuffer
from paceline.rl.config.drafter import DrafterConfig
from paceline.rl.config.run import RunConfig
from paceline.rl.process.process_tuning import multiplies_bfloat16
from paceline.rl.tasks.prompts import stable_seed
from paceline.rollout.drafters.eagle3_model import Eagle3Model


def trace_buffer(config: RunConfig, rank: int) -> TraceBuffer:
    """Returns an empty trace buffer.

    Each rank spills to its own directory and visits traces in its own order.
    """
    d = config.drafter
    return TraceBuffer(
        memory_tokens=d.memory_tokens,
        disk_tokens=d.disk_tokens,
        spill=Path(config.out) / f"traces-{rank}",
        previous_steps=d.previous_steps,
        previous_share=d.previous_share,
        age_decay=d.age_decay,
        held_out_every=d.held_out_every,
        passes=d.passes,
        seed=stable_seed(config.seed, 0, "drafter", rank),
    )


def spot_trainer(
    config: RunConfig, policy: PreTrainedModel, model: Eagle3Model, buffer: TraceBuffer
) -> SpotTrainer:
    """Returns a trainer that starts from copies of ``model`` and distils ``policy`` into them."""
    d, device = config.drafter, policy.device
    autocast = drafter_autocast(device, config.policy.mixed_precision == "bf16")
    learners = [
        DrafterLearner(
            copy.deepcopy(model).to(device),
            policy.get_input_embeddings(),
            policy.get_output_embeddings(),
            objective_of(d),
            lr=d.lr * multiple,
            optimistic=d.optimistic,
            temperature=config.rollout.temperature,
            autocast=autocast,
            context=d.context_tokens,
            positions=config.rollout.max_context if d.random_positions else None,
        )
        for multiple in d.ensemble
    ]
    likeliest = config.speculation.draw == "likeliest"
    return SpotTrainer(
        learners, buffer, budget=d.tokens_per_microbatch, judge_every=d.judge_every, likeliest=likeliest
    )


def objective_of(d: DrafterConfig) -> Objective:
    """Returns what a recipe's drafter is trained for."""
    return Objective(
        d.loss,
        d.unroll,
        d.decay,
        d.mask_top,
        d.feedback_only,
        d.on_policy,
        parallel=d.parallel_positions,
    )


def drafter_autocast(device: torch.device, mixed: bool = True) -> Callable[[], torch.autocast]:
    """Returns the factory of the autocast in which a drafter trains on a device.

    Args:
        device: Device of the drafter.
        mixed: Whether training is in mixed precision. It is in float32 all the same where torch has no
            instructions for bfloat16.
    """
    enabled = mixed and multiplies_bfloat16(device)
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled)


def reward_weights(rewards: Sequence[float], strength: float) -> list[float]:
    """Returns a weight for each completion, 1 on average, that grows with its reward.

    This is ReSpec's reward-weighted distillation: at strength 1 the weights lie between 0 and 2.

    Args:
        rewards: The reward of each completion.
        strength: How far the weights spread; 0 weighs all alike.
    """
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    if strength == 0 or high == low:
        return [1.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [max(1 + 2 * strength * (reward - mean) / (high - low), 0.0) for reward in rewards]
