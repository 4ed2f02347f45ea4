"""The drafter on disk: the EAGLE-3 directory that vLLM and SGLang load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.drafter_config import read_drafter_config
from paceline.rollout.drafters.eagle3_model import Eagle3Model, attention_shape


def save_drafter(model: Eagle3Model, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes ``config.json`` and ``model.safetensors`` beside ``directory`` and renames them into it: never
    half a drafter.

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
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        building.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load_drafter(
    directory: Path,
    target_vocab_size: int,
    target_hidden_size: int,
    *,
    tap_layers: Sequence[int] | None = None,
    draft_vocab_size: int | None = None,
) -> Eagle3Model:
    """Reads a drafter as float32 and checks that it is whole and fits the target.

    Args:
        directory: With ``config.json`` and ``model.safetensors``.
        target_vocab_size, target_hidden_size: Of the policy.
        tap_layers: Layers whose inputs the engine keeps; None where the drafter's are taken.
        draft_vocab_size: Tokens that it must draft; None where its own are taken.

    Raises:
        DrafterError: for files that are missing, truncated or broken, weights that are not finite or not
            those that the config says, another architecture, and a drafter of another target.
    """
    config = read_drafter_config(directory)
    if config.vocab_size != target_vocab_size:
        raise DrafterError(
            f"{directory}: the drafter was made for {config.vocab_size} tokens, the policy has "
            f"{target_vocab_size}"
        )
    if config.hidden_size != target_hidden_size:
        raise DrafterError(
            f"{directory}: the drafter is {config.hidden_size} wide, the policy {target_hidden_size}"
        )
    taps = list(config.eagle_aux_hidden_state_layer_ids)
    if tap_layers is not None and taps != list(tap_layers):
        raise DrafterError(
            f"{directory}: the drafter was trained on the inputs of layers {taps}, the engine keeps those of "
            f"{list(tap_layers)}; "
            f"write drafter.tap_layers: {taps}"
        )
    if draft_vocab_size is not None and config.draft_vocab_size != draft_vocab_size:
        raise DrafterError(
            f"{directory}: the drafter drafts {config.draft_vocab_size} tokens, drafter.draft_vocab_size is "
            f"{draft_vocab_size}; "
            f"write drafter.draft_vocab_size: {config.draft_vocab_size}"
        )
    weights = directory / "model.safetensors"
    tensors = _read_weights(weights)
    problem = _shape_problem(tensors, config) or _value_problem(tensors, config)
    if problem is not None:
        raise DrafterError(f"{weights}: {problem}")
    try:
        model = Eagle3Model(config, _vocabulary(tensors))
    # keys beyond those that are checked, as transformers' parts of the layer read them
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise DrafterError(
            f"{directory / 'config.json'}: no drafter can be built from it ({reason})"
        ) from None
    learned = {name: tensor.float() for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    # d2t and t2d follow from the vocabulary, the rotary table from the config
    model.load_state_dict(learned, strict=False)
    return model


def load_drafter_of(directory: Path, policy: Path) -> Eagle3Model:
    """Reads a drafter for the policy in a directory, as `load_drafter` does.

    Raises:
        DrafterError: as there, and for a policy whose config cannot be read.
    """
    try:
        target = AutoConfig.from_pretrained(policy).get_text_config()
    except Exception as error:  # whatever is wrong with the file, transformers says it in its own way
        raise DrafterError(
            f"{policy}: the policy's config cannot be read ({' '.join(str(error).split())[:160]})"
        ) from None
    return load_drafter(directory, target.vocab_size, target.hidden_size)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise DrafterError(f"{path}: missing; copy the whole directory that paceline export wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DrafterError(
            f"{path}: truncated or not safetensors ({reason}); export the drafter again"
        ) from None


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the format, by name."""
    heads, kv_heads, dim = attention_shape(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    assert hidden is not None and inner is not None
    layer = {
        "self_attn.q_proj": (heads * dim, 2 * hidden),
        "self_attn.k_proj": (kv_heads * dim, 2 * hidden),
        "self_attn.v_proj": (kv_heads * dim, 2 * hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        **dict.fromkeys(("input_layernorm", "hidden_norm", "post_attention_layernorm"), (hidden,)),
    }
    return {
        "fc.weight": (hidden, len(config.eagle_aux_hidden_state_layer_ids) * hidden),
        **{f"midlayer.{name}.weight": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }


def _shape_problem(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> str | None:
    """What does not match the config, before anything of its size is made; None where all does."""
    expected = _shapes(config)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        return (
            f"does not match its config (missing {missing[:2]}, unexpected {unexpected[:2]}); export the "
            f"drafter again"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            return (
                f"{name} has the shape {tuple(tensor.shape)}, its config says {shape}; export the drafter "
                f"again"
            )
        if name not in ("d2t", "t2d") and not (tensor.is_floating_point() and tensor.itemsize >= 2):
            return f"{name} is {tensor.dtype}; write float32, bfloat16 or float16"
    if tensors["d2t"].dtype not in (torch.int64, torch.int32) or tensors["t2d"].dtype not in (
        torch.bool,
        torch.uint8,
    ):
        return f"d2t is {tensors['d2t'].dtype} and t2d {tensors['t2d'].dtype}; write int64 and bool"
    return None


def _value_problem(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> str | None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            return f"{name} has NaN or infinite values; export an earlier drafter"
    vocabulary = _vocabulary(tensors)
    if (
        not bool((vocabulary.diff() > 0).all())
        or not 0 <= int(vocabulary[0]) <= int(vocabulary[-1]) < config.vocab_size
    ):
        return (
            f"d2t does not lead to {config.draft_vocab_size} increasing token ids below {config.vocab_size}"
        )
    known = torch.zeros(config.vocab_size, dtype=torch.bool)
    known[vocabulary] = True
    return None if torch.equal(known, tensors["t2d"].bool()) else "t2d marks other tokens than d2t leads to"


def _vocabulary(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
