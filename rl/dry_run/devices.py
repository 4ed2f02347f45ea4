"""Determines memory and speed of a rank's device, by measuring this machine or from published data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from paceline.rollout.machine_limits import memory_limit

_TIMED_TOKENS = 128
_TIMED_VOCABULARY = 8192
_TIMED_SECONDS = 3.0  # a measurement is not repeated after this time
# Name, bytes/s and dense bfloat16 FLOP/s of a GPU by its memory in GB, from NVIDIA's data sheets. If several
# cards have one size, this is the slowest of them.
_PUBLISHED_GPUS = {
    24: ("RTX 4090", 1.008e12, 165e12),
    40: ("A100 40 GB", 1.555e12, 312e12),
    48: ("L40S", 0.864e12, 362e12),
    80: ("A100 80 GB", 2.039e12, 312e12),
    141: ("H200", 4.8e12, 989e12),
    192: ("B200", 8.0e12, 2250e12),
}


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Memory and speed of one rank's device.

    Attributes:
        name: Name to show to the user.
        memory: Bytes that the rank may use.
        bandwidth: Bytes per second that decoding reads; None if it is not known.
        flops: Operations per second of an update; None if they are not known.
        speed_from: Origin of ``bandwidth`` and ``flops``, as text.
        device: Type of the device, ``cpu`` or ``cuda``.
    """

    name: str
    memory: int
    bandwidth: float | None
    flops: float | None
    speed_from: str
    device: str


def this_machine(local_ranks: int, policy: PreTrainedConfig, dtype: torch.dtype) -> DeviceSpec:
    """Measures the device that a rank has on this machine: its own GPU, or its share of the CPU and memory.

    Args:
        local_ranks: Number of ranks on this machine.
        policy: Configuration of the policy; layers of its shape are timed.
        dtype: Precision of the update's matrix products.
    """
    bandwidth, flops = reading_speed() * _READ_SHARE, layer_speed(policy.to_json_string(), dtype)
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        return DeviceSpec(name, memory, bandwidth, flops, _MEASURED, "cuda")
    name = f"1/{local_ranks} of this machine" if local_ranks > 1 else "this machine"
    return DeviceSpec(
        name, memory_limit() // local_ranks, bandwidth / local_ranks, flops / local_ranks, _MEASURED, "cpu"
    )


def published_gpu(gigabytes: float) -> DeviceSpec:
    """Returns a GPU of this size with the speeds of its data sheet, times the shares assumed to be reached.

    Args:
        gigabytes: Memory in units of 10^9 bytes. Speeds are None for a size that is not in the table.
    """
    published = _PUBLISHED_GPUS.get(round(gigabytes))
    if published is None:
        return DeviceSpec(f"a GPU of {gigabytes:g} GB", int(gigabytes * 1e9), None, None, "", "cuda")
    name, bandwidth, flops = published
    return DeviceSpec(
        name, int(gigabytes * 1e9), bandwidth * _READ_SHARE, flops * _PRODUCT_SHARE, _ASSUMED, "cuda"
    )


# Share of the memory's bandwidth that decoding reaches; measured with one sequence on a CPU
# (docs/benchmarks.md).
_READ_SHARE = 0.5
_PRODUCT_SHARE = 0.4  # assumed share of a GPU's dense operations that an update reaches
_ASSUMED = f"{_READ_SHARE:.0%} and {_PRODUCT_SHARE:.0%} of its data sheet, assumed"
_MEASURED = f"{_READ_SHARE:.0%} of reading speed, and a layer's forward and backward, measured just now"


@cache
def layer_speed(policy: str, dtype: torch.dtype) -> float:
    """Measures the operations per second of forward and backward passes through up to two layers of a policy.

    The layers have the policy's shape; the output head is small.

    Args:
        policy: The policy's configuration as JSON.
        dtype: Precision of the matrix products, under autocast.
    """
    config = AutoConfig.for_model(**json.loads(policy))
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, 2)
    # a part of the vocabulary gives the same speed without taking gigabytes
    if text.vocab_size > _TIMED_VOCABULARY:
        text.vocab_size, text.pad_token_id = _TIMED_VOCABULARY, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
        tokens = torch.zeros(1, _TIMED_TOKENS, dtype=torch.long)
    # an embedding lookup does no arithmetic; a tied embedding counts as output head
    embedding = 0 if text.tie_word_embeddings else model.get_input_embeddings().weight.numel()

    def work() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            model(tokens).logits.float().logsumexp(-1).sum().backward()

    return 6 * (model.num_parameters() - embedding) * _TIMED_TOKENS / _fastest_seconds(work, device)


@cache
def reading_speed() -> float:
    """Measures the bytes per second of reading memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.ones(64 << 20, dtype=torch.float32, device=device)
    return values.nbytes / _fastest_seconds(values.sum, device)


def product_speed(dtype: torch.dtype) -> float:
    """Measures the operations per second of a product of two 2048 × 2048 matrices.

    Args:
        dtype: Precision of the matrices.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(2048, 2048, dtype=dtype, device=device)
    return 2 * 2048**3 / _fastest_seconds(lambda: matrix @ matrix, device)


def _fastest_seconds(work: Callable[[], object], device: str) -> float:
    """Returns the seconds of the fastest of up to three calls."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < _TIMED_SECONDS:
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
