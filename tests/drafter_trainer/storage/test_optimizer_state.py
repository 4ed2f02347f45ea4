"""An optimizer's files: what AdamW left is taken over, anything else is one line and changes nothing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.drafter_trainer.storage.optimizer_state import (
    OptimizerStateError,
    load_optimizer,
    read_state,
    save_optimizer,
)


def stepped(lr: float = 1e-3) -> torch.optim.AdamW:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def stem(tmp_path):
    save_optimizer(stepped(), tmp_path / "optimizer")
    return tmp_path / "optimizer"


def test_moments_are_taken_over_and_settings_stay(stem):
    wanted = stepped().state_dict()["state"]
    other = stepped(lr=0.5)
    other.state.clear()
    load_optimizer(other, stem)
    for index, entry in wanted.items():
        for name, value in entry.items():
            assert torch.equal(
                torch.as_tensor(other.state_dict()["state"][index][name]), torch.as_tensor(value)
            )
    assert other.param_groups[0]["lr"] == 0.5


def test_a_parameter_without_a_gradient_has_no_moments(stem):
    tensors = load_file(stem.with_suffix(".safetensors"))
    save_file({k: v for k, v in tensors.items() if not k.startswith("2.")}, stem.with_suffix(".safetensors"))
    optimizer = stepped()
    load_optimizer(optimizer, stem)
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 3]


TENSORS = {
    "another shape": (
        {"0.exp_avg": torch.zeros(3, 5)},
        r"parameter 0: exp_avg has the shape \(3, 5\), not \(3, 4\)",
    ),
    "whole numbers": ({"0.exp_avg": torch.zeros(3, 4, dtype=torch.int64)}, "exp_avg is a torch.int64"),
    "NaN": ({"1.exp_avg_sq": torch.full((3,), float("nan"))}, "parameter 1: exp_avg_sq has NaN"),
    "below zero": ({"1.exp_avg_sq": torch.full((3,), -1.0)}, "exp_avg_sq has values below zero"),
    "no count": ({"0.step": torch.tensor(float("inf"))}, "parameter 0: step is not a number from 0"),
    "many counts": ({"0.step": torch.ones(3)}, "step is not a number from 0"),
    "more parameters": ({"9.exp_avg": torch.zeros(1)}, "it has 10 parameters, not 4"),
    "no number": ({"x.exp_avg": torch.zeros(1)}, "'x.exp_avg' is not a parameter's number"),
    "half an entry": ({"0.exp_avg": None}, "parameter 0: it has no exp_avg"),
}


@pytest.mark.parametrize("changed, said", TENSORS.values(), ids=TENSORS)
def test_tensors_of_another_optimizer_are_one_line(stem, changed, said):
    tensors = {**load_file(stem.with_suffix(".safetensors")), **changed}
    save_file({k: v for k, v in tensors.items() if v is not None}, stem.with_suffix(".safetensors"))
    optimizer = stepped()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerStateError, match=said) as found:
        load_optimizer(optimizer, stem)
    assert "\n" not in str(found.value)
    assert all(
        torch.equal(optimizer.state_dict()["state"][i]["exp_avg"], e["exp_avg"])
        for i, e in before["state"].items()
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"scalars": []}',
        '{"scalars": {}}',
        '{"scalars": {}, "param_groups": {}}',
        "\xff",
        "[" * 9999,
    ],
)
def test_json_that_is_not_a_state_is_one_line(stem, text):
    stem.with_suffix(".json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OptimizerStateError, match="another checkpoint") as found:
        read_state(stem)
    assert "\n" not in str(found.value)


def test_other_scalars_are_one_line(stem):
    kept = json.loads(stem.with_suffix(".json").read_text())
    stem.with_suffix(".json").write_text(json.dumps({**kept, "scalars": {"0.exp_avg": "much"}}))
    with pytest.raises(OptimizerStateError, match="exp_avg is a str"):
        load_optimizer(stepped(), stem)
