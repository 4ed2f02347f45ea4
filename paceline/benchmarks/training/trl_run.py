"""A recipe's task in TRL's own GRPOTrainer, with its generation or with Paceline's rollouts.

Run it as ``python -m paceline.benchmarks.training.trl_run RECIPE --rollouts paceline --drafter DIR
out=runs/trl``, or under torchrun. The two lines that a script has to change are marked. Each step's seconds,
reward and length go to ``<out>/steps.jsonl``.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from paceline.rl.errors import user_errors
from paceline.rl.integrations.trl import paceline_rollouts  # marked: one import
from paceline.rl.models.initial import starting_policy
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rl.tasks.prompts import messages_of
from paceline.rl.tasks.task import load_task


class Clock(TrainerCallback):
    """Writes what each step took, generation apart, once its metrics are logged."""

    def __init__(self, path: Path) -> None:
        self.path, self.begin, self.generation = path, 0.0, 0.0
        self.step_seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin, self.generation = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds = time.perf_counter() - self.begin

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "reward" in (logs or {}):
            measured = {
                "step": state.global_step,
                "seconds": self.step_seconds,
                "generation": self.generation,
            }
            with self.path.open("a") as file:
                file.write(
                    json.dumps({**measured, **{k: v for k, v in logs.items() if isinstance(v, int | float)}})
                    + "\n"
                )

    def timed(self, function):
        """The same function, its time counted as generation."""

        def run(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.generation += time.perf_counter() - begin
            return result

        return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a recipe: its policy, task, sampling, learning rate and steps")
    parser.add_argument("--rollouts", choices=["trl", "paceline"], default="paceline")
    parser.add_argument("--drafter", help="directory of a drafter to start from")
    parser.add_argument(
        "--schedule", choices=["idle", "always", "never"], default="idle", help="when the drafter is trained"
    )
    parser.add_argument(
        "--weights", choices=["float32", "bfloat16"], default="float32", help="of the policy in TRL"
    )
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    task = load_task(config.task, config.seed)
    rows = [{"prompt": list(messages_of(p, config.task.system)), "problem": p.key} for p in task.problems]

    def correct(prompts, completions, problem, **columns):
        return [
            task.find(key).score(text[0]["content"]) for key, text in zip(problem, completions, strict=True)
        ]

    r, source, clock = config.rollout, starting_policy(config), Clock(Path(config.out) / "steps.jsonl")
    clock.path.parent.mkdir(parents=True, exist_ok=True)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    fit_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    drafter = {
        "draft_vocab_size": config.drafter.draft_vocab_size,
        "schedule": args.schedule,
        "start": args.drafter,
    }
    arguments = GRPOConfig(
        output_dir=config.out,
        model_init_kwargs={"dtype": args.weights},
        per_device_train_batch_size=r.group_size,
        gradient_accumulation_steps=r.prompts_per_step // ranks,
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
    ours = paceline_rollouts(
        arguments, drafter=drafter, rollout={"max_slots": r.max_slots, "max_context": r.max_context}
    )
    trainer = GRPOTrainer(
        model=str(source),
        reward_funcs=correct,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[clock],
        rollout_func=ours if args.rollouts == "paceline" else None,  # marked: one argument
    )
    trainer._generate = clock.timed(trainer._generate)
    trainer.train()


if __name__ == "__main__":
    with user_errors():
        main()
