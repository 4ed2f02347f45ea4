"""The device that a rank runs on, as an estimate sees it: memory and speed, measured here or as published."""

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
_TIMED_SECONDS = 3.0  # after which a measurement is not repeated
# Bytes and dense bfloat16 operations a second by a GPU's memory in GB, from NVIDIA's data sheets; the slower
# card where there are
# several of one size: RTX 4090, A100 40, L40S, A100 80, H200, B200.
_PUBLISHED = {
    24: ("RTX 4090", 1.008e12, 165e12),
    40: ("A100 40 GB", 1.555e12, 312e12),
    48: ("L40S", 0.864e12, 362e12),
    80: ("A100 80 GB", 2.039e12, 312e12),
    141: ("H200", 4.8e12, 989e12),
    192: ("B200", 8.0e12, 2250e12),
}


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What one rank has.

    Attributes:
        name: For a reader, with where the numbers are from.
        memory: Bytes that a rank may use.
        bandwidth, flops: Bytes that decoding reads in a second, and operations of an update; None where they
            are not known.
        speed_from: Where these two are from.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    memory: int
    bandwidth: float | None
    flops: float | None
    speed_from: str
    device: str


def this_machine(local_ranks: int, policy: PreTrainedConfig, dtype: torch.dtype) -> DeviceSpec:
    """The device that a rank of ``local_ranks`` has here: a GPU of its own, or its share of the CPU's memory,
    cores and bandwidth.

    Args:
        local_ranks: Ranks on this machine.
        policy: Its configuration; layers of its shape are timed.
        dtype: Of the update's products.
    """
    reading, products = reading_speed() * _READ_SHARE, layer_speed(policy.to_json_string(), dtype)
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        return DeviceSpec(name, memory, reading, products, _MEASURED, "cuda")
    name = f"1/{local_ranks} of this machine" if local_ranks > 1 else "this machine"
    return DeviceSpec(
        name, memory_limit() // local_ranks, reading / local_ranks, products / local_ranks, _MEASURED, "cpu"
    )


def published_gpu(gigabytes: float) -> DeviceSpec:
    """A GPU with so much memory, as fast as the data sheet of one of that size and the shares assumed for it
    say.
    """
    found = _PUBLISHED.get(round(gigabytes))
    if found is None:
        return DeviceSpec(f"a GPU of {gigabytes:g} GB", int(gigabytes * 1e9), None, None, "", "cuda")
    name, bandwidth, flops = found
    return DeviceSpec(
        name, int(gigabytes * 1e9), bandwidth * _READ_SHARE, flops * _PRODUCT_SHARE, _ASSUMED, "cuda"
    )


# of memory's speed that decoding reaches: at one sequence on a CPU, by benchmarks/README.md
_READ_SHARE = 0.5
_PRODUCT_SHARE = 0.4  # of a GPU's dense operations that an update reaches: an assumption
_ASSUMED = f"{_READ_SHARE:.0%} and {_PRODUCT_SHARE:.0%} of its data sheet, assumed"
_MEASURED = f"{_READ_SHARE:.0%} of reading and a layer's forward and backward, timed here just now"


@cache
def layer_speed(policy: str, dtype: torch.dtype) -> float:
    """Operations a second of a forward and backward through two layers of a policy's shape and a small output
    head.

    Args:
        policy: The configuration as JSON.
        dtype: Of the products, under autocast.
    """
    config = AutoConfig.for_model(**json.loads(policy))
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, 2)
    # a product is as fast with some of the rows, and takes no gigabytes
    if text.vocab_size > _TIMED_VOCABULARY:
        text.vocab_size, text.pad_token_id = _TIMED_VOCABULARY, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
        tokens = torch.zeros(1, _TIMED_TOKENS, dtype=torch.long)
    # a look-up computes nothing
    embedding = 0 if text.tie_word_embeddings else model.get_input_embeddings().weight.numel()

    def work() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            model(tokens).logits.float().logsumexp(-1).sum().backward()

    return 6 * (model.num_parameters() - embedding) * _TIMED_TOKENS / _best(work, device)


@cache
def reading_speed() -> float:
    """Measures the bytes a second of reading memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = torch.ones(64 << 20, dtype=torch.float32, device=device)
    return line.nbytes / _best(line.sum, device)


def product_speed(dtype: torch.dtype) -> float:
    """Measures the operations a second of a large matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.ones(2048, 2048, dtype=dtype, device=device)
    return 2 * 2048**3 / _best(lambda: left @ left, device)


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of up to three calls."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < _TIMED_SECONDS:
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
