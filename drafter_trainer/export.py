"""From a run to a drafter directory for others to serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from drafter_trainer.checkpoint import DrafterError, load_drafter, save_drafter


def export_drafter(run: Path, out: Path) -> Path:
    """Writes a run's last drafter to ``out``, in bfloat16, with a model card.

    Args:
        run: A run's directory, with ``checkpoint/drafter`` and ``checkpoint/policy``.
        out: New directory.

    Raises:
        DrafterError: when the run has no whole drafter.
    """
    source = run / "checkpoint" / "drafter"
    if not source.is_dir():
        raise DrafterError(f"{run}: no checkpoint/drafter; was the run made with the eagle3 drafter, and did it save a step?")
    policy = AutoConfig.from_pretrained(run / "checkpoint" / "policy").get_text_config()
    drafter = load_drafter(source, policy.vocab_size, policy.hidden_size)
    if out.exists() and any(out.iterdir()):
        raise DrafterError(f"{out}: exists and is not empty; name a new directory")
    save_drafter(drafter, out, torch.bfloat16)
    (out / "README.md").write_text(_model_card(run))
    return out


def _model_card(run: Path) -> str:
    config = json.loads((run / "config.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = steps[-1] if steps else {}
    acceptance = ", ".join(f"{a:.2f}" for a in last.get("drafter/acceptance", []))
    return f"""# EAGLE-3 drafter

Distilled by Paceline while its target was trained.

- Target: `{config["policy"]["model"]}`, after {len(steps)} RL steps (weights: `checkpoint/policy` of the run)
- Data: the target's own rollouts, sampled at temperature {config["rollout"]["temperature"]}
- Draft vocabulary: {config["drafter"]["draft_vocab_size"]} tokens
- Expected acceptance at draft positions 1, 2, …: {acceptance or "not measured"} (Σ min(p, q) on the last step's rollouts)
- Format: `LlamaForCausalLMEagle3`. The input embedding is the target's and is not stored here.
"""
