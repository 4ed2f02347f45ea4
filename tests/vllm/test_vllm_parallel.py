"""A drafter that drafts in one pass drafts in vLLM what it drafts in the engine (``make test-vllm``)."""

from functools import partial

import pytest
import torch

pytest.importorskip("vllm")

import vllm

from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.drafter_trainer.storage.stored_trace import StoredTrace
from paceline.drafter_trainer.trace_buffer import Entry, Piece
from paceline.rollout import (
    Request,
    SamplingParams,
    Strategy,
    default_tap_layers,
    mean_acceptance_length,
)
from paceline.rollout.drafter_factory import DrafterParts, build_drafter
from paceline.rollout.drafters.eagle3_model import eagle3_config
from tests.engines import engine_for, tiny_llama

pytestmark = pytest.mark.vllm
DEPTH = 3


def trained(policy, rollouts):
    """A drafter that has learned the rollouts, so that some of its drafts are accepted and some are not."""
    vocabulary = torch.arange(60)
    config = eagle3_config(policy.config, len(vocabulary), default_tap_layers(8), parallel=True)
    learner = DrafterLearner(
        initial_drafter(config, vocabulary, policy, seed=0),
        policy.model.embed_tokens,
        policy.lm_head,
        Objective(unroll=DEPTH, parallel=DEPTH),
        lr=3e-3,
        temperature=1.0,
        autocast=partial(torch.autocast, "cpu", enabled=False),
        context=512,
    )
    pieces = [Piece(Entry(StoredTrace(r.trace)), 3, len(r.trace.token_ids) - 1) for r in rollouts]
    for _ in range(60):
        assert learner.update(pieces, [1.0] * len(pieces)) is not None
    return learner.model


def served_length(folder, prompts, tokens, **options) -> tuple[list[list[int]], float]:
    """What vLLM decodes greedily, and its acceptance length."""
    llm = vllm.LLM(
        str(folder / "policy"),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        speculative_config={
            "method": "eagle3",
            "model": str(folder / "drafter"),
            "num_speculative_tokens": DEPTH,
            **options,
        },
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    accepted = counted["vllm:spec_decode_num_accepted_tokens"]
    llm.llm_engine.engine_core.shutdown()
    return [o.outputs[0].token_ids for o in outputs], 1 + accepted / counted["vllm:spec_decode_num_drafts"]


def test_vllm_accepts_what_the_engine_accepts(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    policy = tiny_llama(64, layers=8, sharpness=8.0, hidden=256)
    params = SamplingParams(max_tokens=40, temperature=0)
    requests = [Request([1 + i % 7, 5, 6, i % 11], params, seed=i) for i in range(12)]
    engine = engine_for(policy, slots=12, collect_traces=True)
    drafter = trained(policy, engine.generate(requests)[:8])
    policy.save_pretrained(tmp_path / "policy")
    save_drafter(drafter, tmp_path / "drafter", torch.float32)
    engine = engine_for(policy, slots=12)
    parts = DrafterParts(eagle3=drafter)
    for name in ("eagle3", "parallel"):
        engine.add_drafter(build_drafter(name, engine, parts))
    lengths = {}
    for name, options in (("parallel", {"parallel_drafting": True}), ("eagle3", {})):
        engine.use_strategy(Strategy(name, DEPTH))
        rollouts = engine.generate(requests)
        here = mean_acceptance_length(rollouts)
        tokens, there = served_length(tmp_path, [r.prompt_ids for r in requests], 40, **options)
        assert [list(t) for t in tokens] == [r.token_ids for r in rollouts]
        assert there == pytest.approx(here, rel=0.05)
        lengths[name] = here
    assert 1.3 < lengths["parallel"] < DEPTH and 1.3 < lengths["eagle3"] < DEPTH + 1
