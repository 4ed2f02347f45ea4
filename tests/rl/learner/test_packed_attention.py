"""Packed attention without padding, as on a GPU: the log-probs and gradients of attention on rectangles.

Flash attention itself has a stand-in here that computes what its interface promises; the test at the end asks
the real one, on a GPU.
"""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from paceline.rl.learner import packed_attention
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import pack
from tests.engines import tiny_llama
from tests.rl.learner.test_packing import make_rows

ROWS = [(5, [7, 3, 9]), (2, [4]), (6, [1, 8]), (1, [1])]


def attend_each(
    query, key, value, query_ends, key_ends, most_queries, most_keys, *, scale, window_size, enable_gqa
):
    """Attention of each sequence alone, whose last query stands at its last key."""
    assert enable_gqa and window_size[1] == 0
    out, group = [], query.shape[1] // key.shape[1]
    assert int(query_ends.diff().max()) == most_queries and int(key_ends.diff().max()) == most_keys
    assert int(query_ends[-1]) == len(query) and int(key_ends[-1]) == len(key) == len(value)
    for i in range(len(query_ends) - 1):
        q = query[query_ends[i] : query_ends[i + 1]]
        k, v = (x[key_ends[i] : key_ends[i + 1]].repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        at = torch.arange(len(q))[:, None] + len(k) - len(q)
        seen = torch.arange(len(k)) <= at
        if window_size[0] >= 0:
            seen &= torch.arange(len(k)) >= at - window_size[0]
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(out)


def scores_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = pack(make_rows(ROWS)).to(model.device)
    logprobs, _ = PolicyLogProbs(model, fuse=False)(batch, 1.0)
    weights = torch.linspace(0.5, 1.5, len(logprobs), device=model.device)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_without_padding_give_what_rectangles_give(monkeypatch, window):
    def made():
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=window,
        )  # fmt: skip
        return MistralForCausalLM(config).eval()

    expected, gradients = scores_and_gradients(made())
    monkeypatch.setattr(packed_attention, "flash_serves", lambda line: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", attend_each)
    found, others = scores_and_gradients(made())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flash", [True, False])
def test_a_gpu_gives_what_float32_gives(monkeypatch, flash):
    """Bfloat16 within its rounding, by flash attention and with a mask."""
    expected, gradients = scores_and_gradients(tiny_llama(hidden=128).cuda())
    monkeypatch.setattr(packed_attention, "flash_serves", lambda line: flash)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found, others = scores_and_gradients(tiny_llama(hidden=128).cuda())
    assert (found - expected).abs().max() < 0.05
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-3, name
