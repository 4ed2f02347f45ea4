"""Budget guidance: the head fits a Gamma, steering shortens, and nothing of it can be reached from
training."""

import subprocess
import sys

import pytest
import torch
from scipy import stats

from paceline.rl.evaluation.evaluate import Evaluator
from paceline.rl.lengths.guidance import (
    BudgetGuidance,
    RemainingLength,
    TokenStates,
    recording_states,
    token_states,
    train_remaining,
)
from paceline.rl.models.policies import fetch_policy
from paceline.rl.recipe import load_config
from paceline.rollout import Request, SamplingParams
from tests.engines import engine_for, tiny_llama
from tests.support import ROOT

HIDDEN = 8


def test_the_head_finds_a_gamma_distribution():
    """Shape 4 and a mean of 10 after one token, 40 after another."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2, (4000,), generator=g)
    torch.manual_seed(0)
    left = (torch.distributions.Gamma(4.0, 0.4).sample((4000,)) * torch.where(tokens == 1, 4.0, 1.0)).floor()
    head = RemainingLength(HIDDEN, torch.randn(2, HIDDEN, generator=g))
    losses = train_remaining(
        head, TokenStates(torch.randn(4000, HIDDEN, generator=g), tokens, left), updates=300
    )
    assert losses[-1] < losses[0]
    states, tokens = torch.randn(200, HIDDEN, generator=g), torch.arange(200) % 2
    shape, rate = (x.detach() for x in head(states, tokens))
    assert [float((shape / rate)[i::2].mean()) for i in range(2)] == pytest.approx([10, 40], rel=0.2)
    found = head.fits(states, tokens, torch.full((200,), 9.0))
    wanted = [stats.gamma.cdf(9.5, float(a), scale=float(1 / b)) for a, b in zip(shape, rate, strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)


def test_steps_are_those_of_the_rollouts():
    engine = engine_for(tiny_llama(97), collect_traces=True)
    rollout = engine.generate([Request([3, 1, 4], SamplingParams(max_tokens=5), seed=0)])[0]
    steps = token_states([rollout])
    assert steps.tokens.tolist() == rollout.token_ids
    assert steps.left.tolist() == [4, 3, 2, 1, 0]
    torch.testing.assert_close(steps.states, rollout.trace.final[2:].float())


def test_what_fits_is_preferred_and_the_unlikely_left_out():
    model = tiny_llama(97)
    head = RemainingLength(64, model.get_input_embeddings().weight)
    head.fits = lambda states, tokens, room: (tokens == 5).float()  # only token 5 leads to an end in time
    guidance = BudgetGuidance(head, budget=4, prompt=3, candidates=97)
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad(), recording_states(model, guidance):
        logits = model(ids).logits[:, -1]
        steered = guidance(ids, logits).softmax(-1)
    plain = logits.softmax(-1)
    assert steered[0, 5] / (1 - steered[0, 5]) == pytest.approx(
        1000 * float(plain[0, 5] / (1 - plain[0, 5])), rel=1e-3
    )
    few = BudgetGuidance(head, 4, 3, candidates=2)
    few.states = guidance.states
    assert int((few(ids, logits) > -float("inf")).sum()) == 2


def test_steering_shortens_and_says_that_it_is_lossy(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    config = load_config(ROOT / "configs" / "tiny.yaml", ["rollout.max_tokens=60", "policy.warmup=null"])
    evaluator = Evaluator(config, fetch_policy("tiny-llama"), prompts=6, samples=4)
    exact, head = evaluator.exact(), evaluator.predictor(12)
    torch.nn.init.zeros_(head.net[-1].weight)
    eos = evaluator.tokenizer.eos_token_id
    head.fits = lambda states, tokens, room: torch.where(tokens == eos, 1.0, (room / 60).clamp(0, 1) ** 4)
    steered = evaluator.steered(head, budget=10)
    assert exact.completions == steered.completions == 24
    assert steered.length < exact.length and steered.median <= 10 + 2 < exact.median
    assert "LOSSY" in steered.way and "LOSSY" not in exact.way


def test_training_cannot_reach_it():
    code = "import sys, paceline.rl.run; print([m for m in sys.modules if 'guidance' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
