"""How far faults move a view's logits, and how far rounding does: what the bounds of
`paceline.rollout.model.view_check` stand between.
"""

import copy

import pytest
import torch

from paceline.rl.models.loading import load_policy
from paceline.rl.models.policies import fetch_policy
from paceline.rl.models.smollm2 import SMOLLM2
from paceline.rollout.model import fusion_check
from paceline.rollout.model.attention import chain_seats
from paceline.rollout.model.inference_view import InferenceView
from paceline.rollout.model.runner import ModelRunner
from paceline.rollout.model.view_check import _TOLERANCES, logit_gap
from tests.engines import tiny_llama


def sees_the_future(positions: torch.Tensor) -> torch.Tensor:
    seats = chain_seats(positions)
    seats[2] = positions.max() + 1
    return seats


def past_is_not_read(positions: torch.Tensor) -> torch.Tensor:
    seats = chain_seats(positions)
    seats[2] = positions - positions[0, 0] + 1
    return seats


def later_tokens_one_too_far(positions: torch.Tensor) -> torch.Tensor:
    seats = chain_seats(positions)
    seats[0] += int(positions[0, 0] > 0)
    return seats


def softmax_scale_off_by_a_tenth(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.9


def rotary_frequencies_off_by_a_tenth(model: torch.nn.Module) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.9


SEATS = [sees_the_future, past_is_not_read, later_tokens_one_too_far]
CHANGES = [softmax_scale_off_by_a_tenth, rotary_frequencies_off_by_a_tenth]


def gaps(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Gap by fault, in float32, and by rounding: ``float32``, ``bfloat16``, ``float16``."""
    shape = ModelRunner(model, dtype=torch.float32, slots=1, capacity=16).cache.shape
    found = {}
    for dtype in _TOLERANCES:
        runner = ModelRunner(model, dtype=dtype, slots=1, capacity=16)
        found[str(dtype).removeprefix("torch.")] = logit_gap(runner.view, model, runner.cache.shape)
    unfused = InferenceView(model, torch.float32, fuse=False)
    for seats in SEATS:
        with monkeypatch.context() as patched:
            patched.setattr(fusion_check, "chain_seats", seats)
            found[seats.__name__] = logit_gap(unfused, model, shape)
    for change in CHANGES:
        changed = copy.deepcopy(model)
        change(changed)
        found[change.__name__] = logit_gap(InferenceView(changed, torch.float32), model, shape)
    return found


def check(found: dict[str, float]) -> None:
    for dtype, bound in _TOLERANCES.items():
        assert found.pop(str(dtype).removeprefix("torch.")) < bound / 3
    assert all(gap > 3 * _TOLERANCES[torch.float32] for gap in found.values()), found
    assert found["sees_the_future"] > 3 * _TOLERANCES[torch.bfloat16]
    assert found["past_is_not_read"] > 3 * _TOLERANCES[torch.bfloat16]


def test_bounds_are_between_rounding_and_faults(monkeypatch):
    model = tiny_llama()
    with torch.no_grad():
        # attention that matters, as it does in a policy that has learned something
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
            layer.self_attn.v_proj.weight.mul_(10)
    check(gaps(model, monkeypatch))


@pytest.mark.slow
def test_bounds_on_a_pretrained_policy(monkeypatch):
    """Prints the table of docs/versions.md with ``-s``."""
    found = gaps(load_policy(fetch_policy(SMOLLM2)), monkeypatch)
    print("\n" + "\n".join(f"{name}: {gap:.2g}" for name, gap in found.items()))
    check(found)
