"""The drafter on disk: the EAGLE-3 directory that vLLM and SGLang load."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from rollout.drafters.eagle3_model import ARCHITECTURE, Eagle3Model


class DrafterError(Exception):
    """A drafter directory that cannot be used: one line with the file and what is wrong."""


def save_drafter(model: Eagle3Model, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes ``config.json`` and ``model.safetensors`` beside ``directory`` and renames them into it: never half a drafter.

    Args:
        model: The drafter.
        directory: Replaced when it exists.
        dtype: Of the stored weights; float32 for going on with training.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        config = model.config.to_dict()
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        config.pop("dtype", None)
        # Readers older than transformers 5 look for the flat key.
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (building / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tensors = {n: p.detach().to(dtype).contiguous() for n, p in model.named_parameters()}
        tensors |= {"d2t": model.d2t, "t2d": model.t2d}
        save_file(tensors, building / "model.safetensors")
        building.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load_drafter(directory: Path, target_vocab_size: int, target_hidden_size: int) -> Eagle3Model:
    """Reads a drafter as float32 and checks that it fits the target.

    Raises:
        DrafterError: missing or truncated files, another architecture, another vocabulary or width.
    """
    config = _read_config(directory)
    if config.vocab_size != target_vocab_size:
        raise DrafterError(f"{directory}: the drafter was made for {config.vocab_size} tokens, the policy has {target_vocab_size}")
    if config.hidden_size != target_hidden_size:
        raise DrafterError(f"{directory}: the drafter is {config.hidden_size} wide, the policy {target_hidden_size}")
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise DrafterError(f"{weights}: missing; copy the whole directory that export_drafter.py wrote")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise DrafterError(f"{weights}: truncated or not safetensors ({error}); export the drafter again") from None
    if "d2t" not in tensors or len(tensors["d2t"]) != config.draft_vocab_size:
        raise DrafterError(f"{weights}: no d2t of {config.draft_vocab_size} entries; export the drafter again")
    model = Eagle3Model(config, tensors["d2t"] + torch.arange(config.draft_vocab_size))
    missing, unexpected = model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, strict=False
    )
    missing = [name for name in missing if not name.startswith("rotary.")]
    if missing or unexpected:
        raise DrafterError(f"{weights}: does not match its config (missing {missing[:2]}, unexpected {unexpected[:2]})")
    return model


def _read_config(directory: Path) -> LlamaConfig:
    path = directory / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DrafterError(f"{path}: missing; name a directory that export_drafter.py wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DrafterError(f"{path}: not JSON ({error})") from None
    if data.get("architectures") != [ARCHITECTURE]:
        raise DrafterError(f"{path}: architectures is {data.get('architectures')}, not [{ARCHITECTURE!r}]")
    for key in ("model_type", "torch_dtype", "rope_theta", "transformers_version"):
        data.pop(key, None)
    return LlamaConfig(**data)
