"""Length prediction: heads that learn, quantiles by hand, loops, and what the scheduler makes of it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from paceline.rl.checkpointing.checkpoint import find_checkpoint
from paceline.rl.lengths.estimate import PredictedLengths
from paceline.rl.lengths.predictor import Example, LengthPredictor
from paceline.rl.lengths.statistics import is_loop, pinball, prompt_statistics
from paceline.rollout import Request
from tests.engines import engine_for, tiny_llama
from tests.support import tiny_trainer

HIDDEN = 16
STOPS = "rollout.stop_strings=['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']"  # so that lengths differ


def heavy_tailed(prompts: int, samples: int, seed: int) -> list[Example]:
    """Log-normal lengths around a median that the state shows in one of its numbers."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(prompts):
        state = torch.randn(HIDDEN, generator=g)
        lengths = torch.exp(3 + 0.7 * state[0] + 0.6 * torch.randn(samples, generator=g)).clamp(1, 500)
        made.append(Example(state, tuple(int(n) for n in lengths)))
    return made


def trained(kind: str) -> LengthPredictor:
    head = LengthPredictor(HIDDEN, 500, kind, seed=1)
    for start in range(0, 192, 8):
        head.learn(heavy_tailed(192, 8, seed=0)[start : start + 8])
    return head


def losses(kind: str, q: float) -> float:
    held_out = heavy_tailed(200, 16, seed=9)
    predicted = trained(kind).quantile(torch.stack([e.state for e in held_out]), q).numpy()
    return pinball(predicted, np.array([e.lengths for e in held_out]), q)


def test_a_distribution_beats_one_shot_labels_and_no_prompt_at_all():
    lengths = np.array([e.lengths for e in heavy_tailed(200, 16, seed=9)])
    constant = pinball(np.full(200, np.quantile(lengths, 0.9)), lengths, 0.9)
    assert losses("prod_d", 0.9) < losses("one_shot", 0.9)
    assert losses("prod_d", 0.9) < 0.9 * constant


def test_the_median_head_predicts_medians():
    held_out = heavy_tailed(200, 16, seed=9)
    predicted = trained("prod_m").quantile(torch.stack([e.state for e in held_out]), 0.5)
    true = torch.stack([torch.exp(3 + 0.7 * e.state[0]) for e in held_out]).clamp(1, 500)
    assert (predicted.log() - true.log()).abs().mean() < 0.35


def test_quantiles_rise_and_stay_within_the_limit():
    head = trained("prod_d")
    states = torch.randn(20, HIDDEN)
    found = [head.quantile(states, q) for q in (0.05, 0.5, 0.95, 0.999)]
    assert all((a <= b).all() for a, b in pairwise(found))
    assert (found[0] >= 1).all() and (found[-1] <= 500).all()


def test_pinball_by_hand():
    """Median of 10 predicted, lengths 6 and 20: (0.5 · 4 + 0.5 · 10) / 2; at 0.9: (0.1 · 4 + 0.9 · 10) /
    2."""
    assert pinball(np.array([10.0]), np.array([[6, 20]]), 0.5) == pytest.approx(3.5)
    assert pinball(np.array([10.0]), np.array([[6, 20]]), 0.9) == pytest.approx(4.7)


def test_it_goes_on_from_its_state():
    head = trained("prod_d")
    other = LengthPredictor(HIDDEN, 500, "prod_d", seed=5)
    other.load_state(head.state(), head.seen)
    states = torch.randn(4, HIDDEN)
    assert torch.equal(head.quantile(states, 0.5), other.quantile(states, 0.5)) and other.seen == 192


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 40, True),
        ([*range(50), *([1, 2, 3] * 12)], True),
        ([*range(50), *([1, 2, 3] * 5)], False),  # 15 tokens only
        (list(range(100)), False),
        ([*([1, 2, 3] * 20), 9], False),  # it got out
        ([*range(40)] * 3, False),  # three times is not four
        ([*range(40)] * 4, True),
        ([], False),
    ],
)
def test_loops(tokens, loops):
    assert is_loop(tokens) is loops


def test_prompt_statistics():
    metrics = prompt_statistics(["a", "b"], np.array([[10, 20, 30], [5, 5, 5]]))
    assert metrics["length/by_problem"]["a"][:3] == [15, 20, 25]
    assert metrics["length/prompt_p50"] == pytest.approx(12.5)
    assert metrics["length/prompt_variation"] == pytest.approx(np.std([10, 20, 30]) / 20 / 2)


@pytest.mark.parametrize("prefill", [8, 512])
def test_prompt_states_are_a_full_forwards(prefill):
    model = tiny_llama(97)
    engine = engine_for(model, prefill_tokens=prefill)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3], [5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6], [2, 6]]
    states = engine.prompt_states(prompts)
    with torch.no_grad():
        for prompt, state in zip(prompts, states, strict=True):
            expected = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-4)
    request = Request(prompts[0], seed=1)
    assert engine.generate([request])[0].token_ids == engine_for(model).generate([request])[0].token_ids


def test_the_trainer_predicts_orders_and_learns(tmp_path, monkeypatch):
    options = (
        "length.predictor=prod_d",
        "length.quantile=0.5",
        "rollout.max_tokens=12",
        "task.size=40",
        STOPS,
    )
    asked = []
    with tiny_trainer(tmp_path, monkeypatch, "[1.0 * len(c) for c in completions]", *options) as trainer:
        predict = trainer.worker.groups.lengths.predict

        def watched(request):
            asked.append(predict(request))
            return asked[-1]

        monkeypatch.setattr(trainer.worker.groups.lengths, "predict", watched)
        steps = [trainer.step(number)[0] for number in range(7)]
        trainer._save(7)
        kept, head = find_checkpoint(tmp_path / "run").path, trainer.worker.groups.lengths.head
        other = PredictedLengths(trainer.config.length, 64, 12, seed=9)
        other.restore(kept / "lengths.safetensors", 7)
        states = torch.randn(3, 64)
        assert torch.equal(other.head.quantile(states, 0.5), head.quantile(states, 0.5))
        other.restore(kept / "nothing.safetensors", 7)
        assert other.head.seen == 0
    assert trainer.worker.groups.lengths.head.seen == 7 * 4
    assert "length/pinball" not in steps[0] and steps[-1]["length/pinball"] < 6
    assert asked[-1] is not None and asked[-1] != asked[-5]
