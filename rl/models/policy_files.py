"""Checks a policy's directory by its files before anything is loaded, and its weights after loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paceline.rl.errors import UserError, one_line

_PICKLED_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_policy_files(path: Path) -> None:
    """Checks config, weights and adapters of a local policy.

    Args:
        path: Existing directory.

    Raises:
        UserError: If a file is missing, empty or pickled, or the directory is ambiguous.
    """
    if (path / "adapter_config.json").is_file() and (path / "config.json").is_file():
        raise UserError(
            f"policy.model {path}: the directory holds a base model and a peft adapter, and it is unclear "
            "which to train: merge them with peft's merge_and_unload() and name the directory of the merged "
            "model, or move adapter_config.json and the adapter's weights elsewhere"
        )
    config = _read_json(path / "config.json")
    check_kind(config, f"policy.model {path}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = next((file.name for pattern in _PICKLED_FILES for file in path.glob(pattern)), None)
        if pickled is not None:
            raise UserError(
                f"policy.model {path}: {pickled} is pickled, which may run code when it is loaded: if you "
                "trust it, load it yourself and save it again with save_pretrained, which writes safetensors"
            )
        raise UserError(
            f"policy.model {path}: cannot be loaded, the directory has no *.safetensors; name one that "
            "save_pretrained wrote"
        )
    empty = next((file.name for file in weights if file.stat().st_size == 0), None)
    if empty is not None:
        raise UserError(f"policy.model {path}: {empty} is empty: fetch it again")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        _check_shards(path, _read_json(index))


def read_config(path: Path) -> PreTrainedConfig:
    """Reads the configuration of a causal language model.

    Args:
        path: Directory of a model, or its config.json.

    Raises:
        UserError: If the configuration is broken, or belongs to another kind of model.
    """
    file = path / "config.json" if path.is_dir() else path
    check_kind(_read_json(file), f"policy.model {file.parent}")
    try:
        return AutoConfig.from_pretrained(file)
    except Exception as error:  # each config class raises its own types
        raise UserError(
            f"policy.model {file.parent}: {file.name} is invalid ({one_line(error)}): fetch it again"
        ) from None


def check_kind(config: dict[str, Any], where: str) -> None:
    """Checks that a config describes a causal language model of transformers' own.

    Args:
        config: Contents of a config.json.
        where: Beginning of the error message, such as a key and a path.

    Raises:
        UserError: If the model has an encoder, or transformers has no class for it.
    """
    model_type = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{where}: {model_type} has an encoder, and a policy must be decoder-only: choose a causal "
            "language model"
        )
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own_code = (
            " (it brings code of its own, and the engine runs only transformers' classes)"
            if config.get("auto_map")
            else ""
        )
        raise UserError(
            f"{where}: transformers has no causal language model of model_type {model_type!r}{own_code}: "
            "choose another; docs/models.md lists the families that are tested"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"policy.model {file.parent}: the directory has no {file.name}; name one that save_pretrained "
            "wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"policy.model {file.parent}: {file.name} is not JSON ({one_line(error)}): fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"policy.model {file.parent}: {file.name} holds no JSON object: fetch it again")
    return content


def _check_shards(path: Path, index: dict[str, Any]) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(
            f"policy.model {path}: model.safetensors.index.json has no weight_map: fetch it again"
        )
    missing = sorted(
        {str(name) for name in weight_map.values()} - {file.name for file in path.glob("*.safetensors")}
    )
    if missing:
        raise UserError(
            f"policy.model {path}: {first_names(missing)} of its index are missing: fetch them again"
        )


def check_loaded(path: Path, loading_info: dict[str, Any]) -> None:
    """Checks that the files held exactly the model's weights.

    Args:
        path: Directory of the policy.
        loading_info: What ``from_pretrained`` returns with ``output_loading_info``.

    Raises:
        UserError: If the files lack a weight of the model, or hold one that is not the model's.
    """
    missing, surplus = (
        sorted(map(str, loading_info.get(key) or ())) for key in ("missing_keys", "unexpected_keys")
    )
    # old releases of transformers saved this buffer, which is recomputed
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]
    if not missing and not surplus:
        return
    lacks = f"lacks {len(missing)} of the model's weights ({first_names(missing)})" if missing else ""
    has = f"has {len(surplus)} that are not the model's ({first_names(surplus)})" if surplus else ""
    raise UserError(
        f"policy.model {path}: the directory {' and '.join(part for part in (lacks, has) if part)}: it would "
        "be trained from other weights than were saved; save the whole model with save_pretrained (after "
        "merge_and_unload if it had adapters)"
    )


def first_names(names: list[str]) -> str:
    """Returns the first three names, separated by commas."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
