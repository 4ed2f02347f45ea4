"""An ensemble is restored as it was, or refused in a line that names the file."""

import json

import pytest
import torch

from paceline.drafter_trainer.errors import DrafterError, OptimizerStateError
from paceline.drafter_trainer.storage.ensemble import EnsembleState, read_ensemble, write_ensemble
from tests.drafter_trainer.storage.test_snapshots import trained


@pytest.fixture
def stored(tmp_path):
    drafters = [trained() for _ in range(2)]
    with torch.no_grad():
        drafters[1][0].fc.weight.fill_(3.0)
    state = EnsembleState(
        [0.75, 0.25], [model for model, _ in drafters], [optimizer.state_dict() for _, optimizer in drafters]
    )
    write_ensemble(state, tmp_path / "ensemble")
    return state, tmp_path / "ensemble"


def test_what_is_read_is_what_was_written(stored):
    state, folder = stored
    found = read_ensemble(folder, 97, 64)
    assert found.weights == [0.75, 0.25]
    for written, read in zip(state.models, found.models, strict=True):
        for name, parameter in written.named_parameters():
            assert torch.equal(parameter, read.get_parameter(name))
    for written, read in zip(state.optimizers, found.optimizers, strict=True):
        assert written["state"].keys() == read["state"].keys()
        assert torch.equal(written["state"][0]["exp_avg"], read["state"][0]["exp_avg"])


@pytest.mark.parametrize("weights", [None, 1, [0.5, "a"], [0.5, 0.6], [1.5, -0.5], [float("nan"), 0.5]])
def test_weights_that_are_none_are_refused(stored, weights):
    _, folder = stored
    (folder / "weights.json").write_text(json.dumps({"weights": weights}))
    with pytest.raises(DrafterError, match=r"weights.json: weights"):
        read_ensemble(folder, 97, 64)


def test_a_truncated_file_is_named(stored):
    _, folder = stored
    moments = folder / "optimizer-1.safetensors"
    moments.write_bytes(moments.read_bytes()[:-9])
    with pytest.raises(OptimizerStateError, match="optimizer-1: truncated"):
        read_ensemble(folder, 97, 64)
    drafter = folder / "drafter-0" / "model.safetensors"
    drafter.write_bytes(drafter.read_bytes()[:-9])
    with pytest.raises(DrafterError, match=r"drafter-0/model.safetensors"):
        read_ensemble(folder, 97, 64)
