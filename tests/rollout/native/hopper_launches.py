"""Decodes on a pretended GPU and compiles each Triton program for Hopper as it is launched.

``python -m tests.rollout.native.hopper_launches`` runs without Triton's interpreter; it prints the name and
the number of variants of each program. A launch decides more of a program than its source does: a number that
is 1 becomes a constant, and alignment is compiled in.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from paceline.rollout import Request, SamplingParams
from paceline.rollout.native import draw_programs, product_programs, triton_programs
from tests.engines import engine_for, tiny_llama
from tests.fake_cuda import fake_cuda, kernels, to_cuda
from tests.fake_cuda.device import to_host

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Hopper:
    """Stands in for Triton's driver of a Hopper GPU, as far as compiling asks it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled_launches() -> dict[str, set[str]]:
    """Decodes with every kind of step and returns the variants compiled of each program."""
    variants: dict[str, set[str]] = defaultdict(set)
    stand_in = kernels._Launcher.__getitem__

    def launcher(self: Any, grid: Any) -> Any:
        launch, name = stand_in(self, grid), self._kernel.__name__.removeprefix("_")
        modules = (triton_programs, product_programs, draw_programs)
        program = next(getattr(module, name) for module in modules if hasattr(module, name))

        def compile_and_launch(*args: Any, **kwargs: Any) -> None:
            variants[name].add(program.run(*map(to_host, args), grid=(1,), warmup=True, **kwargs).hash)
            launch(*args, **kwargs)

        return compile_and_launch

    driver.set_active(Hopper())
    kernels._Launcher.__getitem__ = launcher
    with_biases = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with_head_norms = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    for model in (with_biases, with_head_norms):
        decode(model.eval().to(torch.bfloat16), torch.bfloat16)
    decode(tiny_llama(layers=1), torch.float32)
    return variants


def decode(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Decodes plainly, with chains and with trees, long and short prompts side by side."""
    with fake_cuda():
        engine = engine_for(to_cuda(model), slots=4, context=60, dtype=dtype)
        for strategy in ("plain", "eagle3:3", "eagle3:4x3/8", "parallel:3"):
            engine.use_strategy(strategy)
            cut = 5 if strategy == "plain" else 0
            params = [SamplingParams(temperature=i % 2, top_k=cut, max_tokens=6) for i in range(4)]
            engine.generate([Request([1 + i] * (3 + 12 * i), p, seed=i) for i, p in enumerate(params)])
            assert set(engine.drafters) == {"suffix", "eagle3", "parallel", "adversarial"}
        assert engine.runner.kernels is not None
        assert not engine.runner.graphs.fallbacks


if __name__ == "__main__":
    for name, found in sorted(compiled_launches().items()):
        print(name, len(found))
