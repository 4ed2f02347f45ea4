"""Trains a recipe's task in TRL's own GRPOTrainer, with its generation or with Paceline's rollouts.

Run it as ``python -m paceline.benchmarks.training.trl_run RECIPE --rollouts paceline --drafter DIR
out=runs/trl``, or under torchrun. The two lines that a script has to change are marked. The seconds, reward
and length of each step go to ``<out>/steps.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import user_errors
from paceline.rl.integrations.trl import paceline_rollouts  # marked: one import
from paceline.rl.models.initial import starting_policy
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rl.tasks.prompts import messages_of
from paceline.rl.tasks.task import Task, load_task


class StepClock(TrainerCallback):
    """Writes the seconds of each step, and those of its generation, once the step's metrics are logged.

    Args:
        path: File to append a JSON line per step to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin = self.generation = self.step_seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of a step."""
        self.begin, self.generation = time.perf_counter(), 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock of a step."""
        self.step_seconds = time.perf_counter() - self.begin

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends the step's seconds and TRL's numeric metrics to the file, on the first rank."""
        if not state.is_world_process_zero or logs is None or "reward" not in logs:
            return
        measured = {
            "step": state.global_step,
            "seconds": self.step_seconds,
            "generation": self.generation,
        }
        numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
        with self.path.open("a") as file:
            file.write(json.dumps({**measured, **numbers}) + "\n")

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its time is counted as generation."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.generation += time.perf_counter() - begin
            return result

        return run


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="recipe: policy, task, sampling, learning rate and steps")
    parser.add_argument("--rollouts", choices=["trl", "paceline"], default="paceline", help="who generates")
    parser.add_argument("--drafter", help="directory of the initial drafter")
    parser.add_argument(
        "--schedule", choices=["idle", "always", "never"], default="idle", help="when the drafter is trained"
    )
    parser.add_argument(
        "--weights", choices=["float32", "bfloat16"], default="float32", help="dtype of the policy in TRL"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")
    return parser.parse_intermixed_args()


def grpo_config(config: RunConfig, dtype: str) -> GRPOConfig:
    """Returns TRL's arguments for a recipe.

    Args:
        config: Recipe.
        dtype: Dtype of the policy's weights in TRL.
    """
    r = config.rollout
    return GRPOConfig(
        output_dir=config.out,
        model_init_kwargs={"dtype": dtype},
        per_device_train_batch_size=r.group_size,
        gradient_accumulation_steps=r.prompts_per_step // int(os.environ.get("WORLD_SIZE", "1")),
        num_generations=r.group_size,
        max_completion_length=r.max_tokens,
        chat_template_kwargs=config.task.chat_template_kwargs,
        temperature=r.temperature,
        learning_rate=config.update.lr,
        lr_scheduler_type="constant",
        max_steps=config.steps,
        beta=config.update.kl_coef,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=config.policy.mixed_precision == "bf16",
    )


def correctness_reward(task: Task) -> Callable[..., list[float | None]]:
    """Returns a TRL reward function that scores completions with a task's own scorer."""

    def correct(
        prompts: list[Any], completions: list[list[dict[str, str]]], problem: list[str], **columns: Any
    ) -> list[float | None]:
        return [
            task.find(key).score(text[0]["content"]) for key, text in zip(problem, completions, strict=True)
        ]

    return correct


def main() -> None:
    """Trains the recipe's task in TRL."""
    args = parse_arguments()
    config = load_config(args.config, args.overrides)
    task = load_task(config.task, config.seed)
    rows = [{"prompt": list(messages_of(p, config.task.system)), "problem": p.key} for p in task.problems]
    source, clock = starting_policy(config), StepClock(Path(config.out) / "steps.jsonl")
    clock.path.parent.mkdir(parents=True, exist_ok=True)
    fit_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    arguments = grpo_config(config, args.weights)
    rollouts = paceline_rollouts(
        arguments,
        drafter={
            "draft_vocab_size": config.drafter.draft_vocab_size,
            "schedule": args.schedule,
            "start": args.drafter,
        },
        rollout={"max_slots": config.rollout.max_slots, "max_context": config.rollout.max_context},
    )
    trainer = GRPOTrainer(
        model=str(source),
        reward_funcs=correctness_reward(task),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[clock],
        rollout_func=rollouts if args.rollouts == "paceline" else None,  # marked: one argument
    )
    trainer._generate = clock.timed(trainer._generate)  # type: ignore[method-assign]
    trainer.train()


if __name__ == "__main__":
    with user_errors():
        main()
