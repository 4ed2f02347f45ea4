"""What a directory must hold to be a policy, told from its files before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paceline.rl.errors import UserError, one_line

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FROM_CODE = "the engine runs transformers' own classes only"


def check_policy_files(path: Path) -> None:
    """Checks config, weights and adapters of a local policy.

    Args:
        path: An existing directory.

    Raises:
        UserError: in one line, for what is missing, empty, pickled or ambiguous.
    """
    if (path / "adapter_config.json").is_file() and (path / "config.json").is_file():
        raise UserError(
            f"policy.model {path}: the directory holds a base model and a peft adapter, and which of them to "
            "train is not said: "
            "merge them with peft's merge_and_unload() and name the directory of the merged model, or move "
            "adapter_config.json "
            "and the adapter's weights away"
        )
    config = _read_json(path / "config.json")
    check_kind(config, f"policy.model {path}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = next((file.name for pattern in _PICKLED for file in path.glob(pattern)), None)
        if pickled is not None:
            raise UserError(
                f"policy.model {path}: {pickled} is pickled, which may run code when it is read: load it "
                "where you trust it and "
                "save it again with save_pretrained, which writes safetensors"
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
    """The configuration of a causal language model.

    Args:
        path: A directory, or its config.json.

    Raises:
        UserError: when it is broken, or of another kind of model.
    """
    file = path / "config.json" if path.is_dir() else path
    check_kind(_read_json(file), f"policy.model {file.parent}")
    try:
        return AutoConfig.from_pretrained(file)
    except Exception as error:  # each class of config checks its values in ways of its own
        raise UserError(
            f"policy.model {file.parent}: {file.name} is wrong ({one_line(error)}): fetch it again"
        ) from None


def check_kind(config: dict[str, Any], where: str) -> None:
    """Checks that a config is one of a causal language model that transformers knows.

    Args:
        config: The contents of a config.json.
        where: What the error's line begins with.

    Raises:
        UserError: when it is not.
    """
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{where}: {kind} has an encoder, and policies are decoders only: choose a causal language model"
        )
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        code = f" (it brings code of its own: {_FROM_CODE})" if config.get("auto_map") else ""
        raise UserError(
            f"{where}: transformers knows no causal language model of model_type {kind!r}{code}: choose "
            "another, docs/models.md "
            "lists the families that are tested"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"policy.model {file.parent}: the directory has no {file.name}; name one that save_pretrained "
            "wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"policy.model {file.parent}: {file.name} is not JSON ({one_line(error)}): fetch it again"
        ) from None
    if not isinstance(read, dict):
        raise UserError(f"policy.model {file.parent}: {file.name} holds no JSON object: fetch it again")
    return read


def _check_shards(path: Path, index: dict[str, Any]) -> None:
    named = index.get("weight_map")
    if not isinstance(named, dict):
        raise UserError(
            f"policy.model {path}: model.safetensors.index.json has no weight_map: fetch it again"
        )
    missing = sorted(
        {str(name) for name in named.values()} - {file.name for file in path.glob("*.safetensors")}
    )
    if missing:
        raise UserError(
            f"policy.model {path}: {first_names(missing)} of its index are not there: fetch it again"
        )


def check_loaded(path: Path, found: dict[str, Any]) -> None:
    """Checks what transformers says that it loaded.

    Args:
        path: Of the policy.
        found: The loading info of ``from_pretrained``.

    Raises:
        UserError: when a weight of the model was not in the files, or one in the files is not the model's.
    """
    missing, surplus = (sorted(map(str, found.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    # a buffer, which old releases saved
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]
    if not missing and not surplus:
        return
    lacks = f"lacks {len(missing)} of the model's weights ({first_names(missing)})" if missing else ""
    has = f"has {len(surplus)} that are not the model's ({first_names(surplus)})" if surplus else ""
    raise UserError(
        f"policy.model {path}: the directory {' and '.join(part for part in (lacks, has) if part)}: it would "
        "be trained from other "
        "weights than were saved; save the whole model with save_pretrained (after merge_and_unload, where "
        "it had adapters)"
    )


def first_names(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
