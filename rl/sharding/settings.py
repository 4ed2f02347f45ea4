"""DeepSpeed's settings, as a user keeps them in a file: what a recipe decides must not stand there too."""

from __future__ import annotations

import json
from typing import Any

from paceline.rl.config.paths import shipped_or_own
from paceline.rl.errors import UserError

_OURS = {
    "bf16": "policy.mixed_precision",
    "fp16": "policy.mixed_precision",
    "torch_autocast": "policy.mixed_precision",
    "optimizer": "update.lr and update.weight_decay",
    "scheduler": "update.schedule",
    "gradient_clipping": "update.grad_clip",
    "gradient_accumulation_steps": "update.tokens_per_microbatch",
    "train_batch_size": "rollout.prompts_per_step",
    "train_micro_batch_size_per_gpu": "update.tokens_per_microbatch",
}


def read_settings(path: str) -> dict[str, Any]:
    """DeepSpeed's settings from its JSON file, without what the recipe decides.

    Raises:
        UserError: not there, not JSON, or with keys that belong to the recipe.
    """
    try:
        settings = json.loads(shipped_or_own(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"scale.deepspeed {path}: {error.strerror}; configs/deepspeed/ has one file a stage"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"scale.deepspeed {path}: not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"scale.deepspeed {path}: not an object of DeepSpeed's settings")
    for key, ours in _OURS.items():
        if key in settings:
            raise UserError(f"scale.deepspeed {path}: leave out {key!r}; {ours} of the recipe decides that")
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """0 to 3; 0 where nothing is said."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def zero_stage(path: str) -> int:
    """The stage that a file asks for; see `read_settings`."""
    return stage_of(read_settings(path))
