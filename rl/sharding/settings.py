"""Reads a user's DeepSpeed settings; keys that the recipe decides must not be in the file."""

from __future__ import annotations

import json
from typing import Any

from paceline.rl.errors import UserError
from paceline.rl.process.shipped_files import shipped_or_own

_RECIPE_KEYS = {  # key of DeepSpeed: key of the recipe that decides it
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
    """Reads DeepSpeed's settings from a JSON file.

    Raises:
        UserError: The file is missing, is not JSON, or has keys that the recipe decides.
    """
    try:
        settings = json.loads(shipped_or_own(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"scale.deepspeed {path}: {error.strerror}; configs/deepspeed/ has a file for each stage"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"scale.deepspeed {path}: not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(
            f"scale.deepspeed {path}: holds a {type(settings).__name__}; write an object of DeepSpeed's keys"
        )
    for key, recipe_key in _RECIPE_KEYS.items():
        if key in settings:
            raise UserError(f"scale.deepspeed {path}: leave out {key!r}; {recipe_key} of the recipe sets it")
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """Returns the ZeRO stage, 0 to 3; 0 if the settings do not name one."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def zero_stage(path: str) -> int:
    """Returns the ZeRO stage of a settings file; see `read_settings`."""
    return stage_of(read_settings(path))
