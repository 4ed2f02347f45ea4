"""TRL trainers with our rollouts on several ranks, for tests: one with whole weights, then one with ZeRO 3.

Its arguments are an output directory, a policy and a DeepSpeed file. What each rank saw is written to
``<output>/whole/rank-N.json`` and ``<output>/parts/rank-N.json``.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from paceline.cli.trial import share_of_digits
from paceline.rl.integrations.trl import paceline_rollouts
from paceline.rl.sharding.gathering import full_parameters

OUT, POLICY, DEEPSPEED = sys.argv[1:4]


def train(out: Path, deepspeed: str | None) -> None:
    AcceleratorState._reset_state()
    args = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=24,
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_steps=2,
        deepspeed=deepspeed,
    )
    drafter = {
        "draft_vocab_size": 48,
        "unroll": 2,
        "tokens_per_microbatch": 64,
        "held_out_every": 0,
        "schedule": "always",
    }
    rollouts = paceline_rollouts(speculation={"drafters": ["suffix", "eagle3"]}, drafter=drafter)
    errors, tokens = [], []

    def watched(prompts, trainer):
        found = rollouts(prompts, trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {name: tensor.clone() for name, tensor in full_parameters(model, lambda name: True)}
        decoded = dict(rollouts._hosted.policy.decoded.named_parameters())
        errors.append(max(float((weights[name] - p).abs().max()) for name, p in decoded.items()))
        tokens.append(found["completion_ids"])
        return found

    trainer = GRPOTrainer(
        model=POLICY,
        reward_funcs=share_of_digits,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{i} + 1 ="} for i in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(POLICY),
        rollout_func=watched,
    )
    trainer.train()
    rank = trainer.accelerator.process_index
    if rank == 1:
        # as if weights had changed on one rank alone: both must gather them
        rollouts._hosted._decoded_with = None
    watched([f"{i} + 1 =" for i in range(3)], trainer)
    answers = [None, "?"]  # rank 0's conversations end with their first turn, and it plays on with rank 1
    found = rollouts.converse(["4 + 1 ="], trainer, lambda talk: answers[rank], turns=3, turn_tokens=4)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    report = {
        "errors": errors,
        "tokens": tokens[:3],
        "talk": found["env_mask"][0],
        "losses": losses,
        "norms": norms,
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(OUT, "whole"), None)
    train(Path(OUT, "parts"), DEEPSPEED)
