"""Reads and writes drafters as EAGLE-3 directories that vLLM and SGLang load."""

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

from paceline.drafter_trainer.errors import DrafterError, one_line
from paceline.drafter_trainer.storage.drafter_config import read_drafter_config
from paceline.drafter_trainer.storage.removal import remove_directory
from paceline.rollout.drafters.eagle3_model import MASK_TOKEN, Eagle3Model, attention_shape


def save_drafter(model: Eagle3Model, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a drafter to ``directory`` as ``config.json`` and ``model.safetensors``.

    The files are written to a temporary directory beside it, which is then renamed, so that ``directory``
    never holds a partly written drafter.

    Args:
        model: The drafter.
        directory: Directory to write; it is replaced if it exists.
        dtype: dtype of the stored weights; float32 to resume training from them.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        config = model.config.to_dict()
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        config.pop("dtype", None)
        # Readers older than transformers 5 expect the flat key.
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (building / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tensors = {n: p.detach().to(dtype).contiguous() for n, p in model.named_parameters()}
        tensors |= {"d2t": model.d2t, "t2d": model.t2d}
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        building.chmod(0o755)
        remove_directory(directory)
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
    """Reads a drafter as float32 and checks that it is complete and fits the target.

    Args:
        directory: Directory with ``config.json`` and ``model.safetensors``.
        target_vocab_size: Number of tokens of the policy's vocabulary.
        target_hidden_size: Size of the policy's hidden states.
        tap_layers: Layers whose inputs the engine keeps; None accepts the drafter's own.
        draft_vocab_size: Number of tokens that it must be able to draft; None accepts the drafter's own.

    Raises:
        DrafterError: Files are missing, truncated or invalid, weights are not finite or do not match the
            config, the architecture is another one, or the drafter was trained for another target.
    """
    config = read_drafter_config(directory)
    if config.vocab_size != target_vocab_size:
        raise DrafterError(
            f"{directory}: the drafter was made for {config.vocab_size} tokens, the policy has "
            f"{target_vocab_size}; name a drafter that was trained for this policy"
        )
    if config.hidden_size != target_hidden_size:
        raise DrafterError(
            f"{directory}: the drafter is {config.hidden_size} wide, the policy {target_hidden_size}; name a "
            f"drafter that was trained for this policy"
        )
    taps = list(config.eagle_aux_hidden_state_layer_ids)
    if tap_layers is not None and taps != list(tap_layers):
        raise DrafterError(
            f"{directory}: the drafter was trained on the inputs of layers {taps}, the engine keeps those of "
            f"{list(tap_layers)}; write drafter.tap_layers: {taps}"
        )
    if draft_vocab_size is not None and config.draft_vocab_size != draft_vocab_size:
        raise DrafterError(
            f"{directory}: the drafter drafts {config.draft_vocab_size} tokens, drafter.draft_vocab_size is "
            f"{draft_vocab_size}; write drafter.draft_vocab_size: {config.draft_vocab_size}"
        )
    weights = directory / "model.safetensors"
    tensors = _read_weights(weights)
    problem = _shape_problem(tensors, config) or _value_problem(tensors, config)
    if problem is not None:
        raise DrafterError(f"{weights}: {problem}")
    try:
        model = Eagle3Model(config, _vocabulary(tensors))
    except Exception as error:  # transformers' modules also read keys that are not checked here
        reason = f"{type(error).__name__}: {one_line(error, 160)}"
        raise DrafterError(
            f"{directory / 'config.json'}: no drafter can be built from it ({reason})"
        ) from None
    parameters = {name: tensor.float() for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    # not strict: d2t and t2d follow from the vocabulary, the rotary table from the config
    model.load_state_dict(parameters, strict=False)
    return model


def load_drafter_of(directory: Path, policy: Path) -> Eagle3Model:
    """Reads a drafter for the policy in a directory and checks it as `load_drafter` does.

    Args:
        directory: The drafter's directory.
        policy: The policy's directory.

    Raises:
        DrafterError: The drafter cannot be used (see `load_drafter`), or the policy's config cannot be read.
    """
    try:
        target = AutoConfig.from_pretrained(policy).get_text_config()
    except Exception as error:  # transformers raises many types for an unreadable config
        raise DrafterError(
            f"{policy}: the policy's config.json cannot be read ({one_line(error, 160)})"
        ) from None
    return load_drafter(directory, target.vocab_size, target.hidden_size)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise DrafterError(f"{path}: missing; copy the complete directory that paceline export wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error, 160)
        raise DrafterError(
            f"{path}: truncated or not safetensors ({reason}); export the drafter again"
        ) from None


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the format, by name."""
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
    features = len(config.eagle_aux_hidden_state_layer_ids) * hidden
    mask = {} if getattr(config, MASK_TOKEN, None) is None else {"mask_hidden": (1, features)}
    return {
        **mask,
        "fc.weight": (hidden, features),
        **{f"midlayer.{name}.weight": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }


def _shape_problem(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> str | None:
    """Returns what does not match the config; None if everything does.

    It runs before the model is built, so that nothing of a wrong size is allocated.
    """
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
            return f"{name} is {tensor.dtype}; store it as float32, bfloat16 or float16"
    if tensors["d2t"].dtype not in (torch.int64, torch.int32) or tensors["t2d"].dtype not in (
        torch.bool,
        torch.uint8,
    ):
        return f"d2t is {tensors['d2t'].dtype} and t2d {tensors['t2d'].dtype}; store them as int64 and bool"
    return None


def _value_problem(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> str | None:
    """Returns what is wrong with the tensors' values; None if nothing is."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            return f"{name} has NaN or infinite values; export an earlier drafter"
    vocabulary = _vocabulary(tensors)
    if (
        not bool((vocabulary.diff() > 0).all())
        or not 0 <= int(vocabulary[0]) <= int(vocabulary[-1]) < config.vocab_size
    ):
        return (
            f"d2t does not map to {config.draft_vocab_size} increasing token ids below {config.vocab_size}; "
            f"export the drafter again"
        )
    known = torch.zeros(config.vocab_size, dtype=torch.bool)
    known[vocabulary] = True
    return (
        None
        if torch.equal(known, tensors["t2d"].bool())
        else "t2d marks other tokens than d2t maps to; export the drafter again"
    )


def _vocabulary(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the draft vocabulary, int64 [draft vocabulary], from ``d2t``, which holds offsets."""
    return tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
