"""Loads a policy and its tokenizer from a directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paceline.rl.errors import UserError, one_line
from paceline.rl.models.policy_files import check_loaded, check_policy_files


def load_policy(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Loads a causal language model from a directory.

    Args:
        path: Directory that ``save_pretrained`` wrote.
        device: Device to put the model on.
        dtype: Precision of the parameters.

    Raises:
        UserError: If weights or config are missing or truncated, or the weights are not exactly the model's.
    """
    check_policy_files(Path(path))
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, loading_info = load(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many types for a broken directory; each is the user's
        raise UserError(
            f"policy {path}: cannot be loaded ({one_line(error)}); name a directory that save_pretrained "
            "wrote, or fetch it again"
        ) from None
    check_loaded(Path(path), loading_info)
    return model.to(device)


def load_tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a policy's directory.

    Raises:
        UserError: If there is no tokenizer, or its files are broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # for the reason given in `load_policy`
        raise UserError(
            f"policy {path}: its tokenizer cannot be loaded ({one_line(error)}); copy the model's tokenizer "
            "files there"
        ) from None
    if not tokenizer.get_vocab():
        raise UserError(
            f"policy {path}: the directory has no tokenizer; copy the model's tokenizer files into it"
        )
    return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies everything but weights and the model's configs, which completes a directory of saved weights.

    Args:
        source: The policy's directory.
        target: Directory that ``save_pretrained`` of the model has written.
    """
    for file in source.iterdir():
        is_weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if file.is_file() and not is_weights and file.name not in ("config.json", "generation_config.json"):
            shutil.copy2(file, target / file.name)


def recompute_activations(model: PreTrainedModel) -> None:
    """Turns activation checkpointing on, under whichever of its two names this transformers release has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
