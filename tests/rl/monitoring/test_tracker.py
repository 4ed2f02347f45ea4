"""A run that goes on is the same run for wandb and TensorBoard."""

import json
import sys
import types

from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.recipe import load_config
from tests.support import ROOT


def test_wandb_goes_on_under_the_runs_id(tmp_path, monkeypatch):
    started = []
    run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda exit_code: None)
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = load_config(ROOT / "configs" / "tiny.yaml", ["tracking.wandb=offline"])
    for first in (0, 2):
        with Tracker(config, tmp_path, active=True, first_step=first):
            pass
    assert started[0]["id"] == started[1]["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert [s["resume"] for s in started] == ["allow", "allow"]
    (tmp_path / "wandb.json").write_text("broken")
    with Tracker(config, tmp_path, active=True):
        pass
    assert started[2]["id"] != started[0]["id"]


def test_tensorboard_takes_back_what_was_lost(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(ROOT / "configs" / "tiny.yaml", ["tracking.tensorboard=true"])
    for first, steps, value in ((0, range(4), 1.0), (2, range(2, 3), 5.0)):
        with Tracker(config, tmp_path, active=True, first_step=first) as tracker:
            for step in steps:
                tracker.log(step, {"reward/mean": value}, [])
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [e.value for e in shown.Scalars("reward/mean")] == [1.0, 1.0, 5.0]
