"""What speculation rests on at low precision: on a GPU, no row's bits depend on the other rows."""

import pytest
import torch

from paceline.rollout import Request, Rollout, SamplingParams
from tests.engines import engine_for, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [((1536, 256, 256), 1536), ((1536,), 8960), ((4096,), 14336), ((17920,), 1536)],
    ids=str,
)
def test_no_row_of_a_product_depends_on_the_others(outputs, inputs, dtype):
    from paceline.rollout.native.triton_kernels import TritonKernels

    kernels, generator = TritonKernels(), torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    layers = [(random(n, inputs) * inputs**-0.5, random(n)) for n in outputs]
    x, residual = random(1, 1500, inputs), random(1, 1500, sum(outputs))
    alone = torch.cat([kernels.linear(x[:, i : i + 1], layers, residual[:, i : i + 1]) for i in range(33)], 1)
    expected = torch.cat([x.double() @ w.double().T + b.double() for w, b in layers], -1) + residual.double()
    gap = (alone.double() - expected[:, :33]).norm() / expected[:, :33].norm()
    assert gap < (0.004 if dtype == torch.bfloat16 else 1e-5)
    for rows in (2, 8, 33, 200, 1500):
        assert torch.equal(
            kernels.linear(x[:, :rows], layers, residual[:, :rows])[:, :33], alone[:, :rows]
        ), rows
    gated = [kernels.gate(x[:, :rows], layers[:1] * 2)[:, 0] for rows in (1, 2, 8, 33, 200, 1500)]
    assert all(torch.equal(gated[0], each) for each in gated)


def decoded(strategy: str, temperature: float, dtype: torch.dtype) -> list[Rollout]:
    engine = engine_for(tiny_llama(layers=2, sharpness=4.0).to("cuda", dtype), slots=5, dtype=dtype)
    engine.use_strategy(strategy)
    wanted = [
        Request([1 + i, 2, 3], SamplingParams(temperature=temperature, max_tokens=30 + 7 * i), seed=i)
        for i in range(12)
    ]
    rollouts = engine.generate(wanted)
    assert not engine.runner.graphs.fallbacks
    return rollouts


@DTYPES
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", ["eagle3:1", "eagle3:4", "suffix:4"])
def test_chains_give_the_bits_of_plain_decoding(strategy, temperature, dtype):
    plain, drafted = (decoded(each, temperature, dtype) for each in ("plain", strategy))
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert [r.logprobs for r in drafted] == [r.logprobs for r in plain]
