"""Warms a policy up by supervised training on worked solutions; the result is cached by its settings."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.rl.config.run import RunConfig
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import PromptRow, Sample, pack, plan
from paceline.rl.models.initial import warmed_policy_path
from paceline.rl.models.loading import copy_tokenizer, load_policy, load_tokenizer
from paceline.rl.models.policies import fetch_policy
from paceline.rl.process.made_once import rename_into_place
from paceline.rl.tasks.gym_problems import reasoning_gym_problems
from paceline.rl.tasks.prompts import encode_problem
from paceline.rl.tasks.worked_solutions import with_rechecks, worked_solution


def make_warmed_policy(config: RunConfig, on_step: Callable[[int, int, float], None]) -> None:
    """Fine-tunes the policy on worked solutions of its task and writes it to `warmed_policy_path`.

    A ``warmup.json`` beside it holds the loss of each step and the time taken in seconds. The caller makes
    sure that no other process does the same.

    Args:
        config: A recipe with ``policy.warmup``.
        on_step: Called with (step, steps, loss).
    """
    final = warmed_policy_path(config)
    source = fetch_policy(config.policy.model)
    tokenizer = load_tokenizer(source)
    policy = load_policy(source, "cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    losses = fine_tune(config, policy, tokenizer, on_step)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
        building = Path(scratch) / "model"
        policy.save_pretrained(building)
        copy_tokenizer(source, building)
        report = {"seconds": time.perf_counter() - started, "losses": losses}
        (building / "warmup.json").write_text(json.dumps(report))
        rename_into_place(building, final)


def fine_tune(
    config: RunConfig,
    policy: PreTrainedModel,
    tokenizer: Any,
    on_step: Callable[[int, int, float], None] | None,
) -> list[float]:
    """Trains a policy on worked solutions of the recipe's problems. Returns the loss of each step."""
    warmup = config.policy.warmup
    assert warmup is not None
    prompts, solutions = _examples(config, tokenizer)
    steps = len(prompts) // warmup.batch_size
    model = PolicyLogProbs(policy).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=warmup.lr, weight_decay=0.0, fused=True)
    rise = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rise, (steps - i) / max(steps - rise, 1))
    )
    losses = []
    for step in range(steps):
        chosen = range(step * warmup.batch_size, (step + 1) * warmup.batch_size)
        rows = [PromptRow(prompts[i], (Sample(i, solutions[i]),)) for i in chosen]
        total, count = 0.0, sum(len(solutions[i]) for i in chosen)
        for members in plan(rows, config.update.tokens_per_microbatch):
            with torch.autocast(
                policy.device.type, dtype=torch.bfloat16, enabled=config.policy.mixed_precision == "bf16"
            ):
                logprobs, _ = model(pack(members).to(policy.device), 1.0)
            loss = -logprobs.sum() / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)  # kept gradients are added to in place
        losses.append(total)
        if on_step is not None:
            on_step(step + 1, steps, total)
    return losses


def _examples(config: RunConfig, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    warmup = config.policy.warmup
    assert warmup is not None
    problems = reasoning_gym_problems(config.task, warmup.examples, warmup.seed)
    generator = torch.Generator().manual_seed(warmup.seed)
    prompts, solutions = [], []
    for i in torch.randperm(len(problems), generator=generator).tolist():
        problem = problems[i]
        times = 0
        while float(torch.rand((), generator=generator)) < warmup.rechecks:
            times += 1
        text = with_rechecks(worked_solution(problem.dataset, problem.entry), times)
        prompts.append(encode_problem(tokenizer, problem, config.task))
        solutions.append([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    return prompts, solutions
