"""A step's order: what an idle rank can do, it does before it waits for the others."""

import sys
from functools import partial

from paceline.rl.process.process_tuning import release_freed_memory
from tests.support import tiny_trainer


def noted(events, name, function):
    """Returns the function with its calls appended to ``events`` by name."""

    def run(*arguments, **options):
        events.append(name)
        return function(*arguments, **options)

    return run


def test_no_rank_waits_for_another_before_it_trains_the_drafter(tmp_path, monkeypatch):
    """Until then nothing is collective: neither generating, nor scoring, nor the reference's log-probs."""
    events: list[str] = []
    recorded = partial(noted, events)
    options = (
        "update.kl_coef=0.1",
        "drafter.schedule=always",
        "speculation.drafters=[eagle3]",
        "rollout.resample=1",
    )
    with tiny_trainer(tmp_path, monkeypatch, "[0.0 for c in completions]", *options) as trainer:
        for module in [m for name, m in sys.modules.items() if name.startswith("paceline.rl.")]:
            if hasattr(module, "gather_object"):
                monkeypatch.setattr(module, "gather_object", recorded("collective", module.gather_object))
        for name in ("reduce", "gather", "wait_for_everyone"):
            method = recorded("collective", getattr(trainer.accelerator, name))
            monkeypatch.setattr(trainer.accelerator, name, method)
        monkeypatch.setattr(trainer.worker, "rollout", recorded("rollout", trainer.worker.rollout))
        monkeypatch.setattr(trainer.drafter.local, "train", recorded("drafter", trainer.drafter.local.train))
        trainer.step(0)
    assert events[0] == "rollout" and "collective" not in events[: events.index("drafter")]
    assert "collective" in events


def test_memory_is_released_after_each_update(tmp_path, monkeypatch):
    """Before new weights are packed, which fill what the update has freed."""
    events: list[str] = []
    recorded = partial(noted, events)
    with tiny_trainer(tmp_path, monkeypatch, "[float('e' in c) for c in completions]") as trainer:
        monkeypatch.setattr(trainer.learner, "learn", recorded("learn", trainer.learner.learn))
        release = recorded("release", release_freed_memory)
        monkeypatch.setattr("paceline.rl.trainer.release_freed_memory", release)
        refresh = recorded("refresh", trainer.worker.refresh_weights)
        monkeypatch.setattr(trainer.worker, "refresh_weights", refresh)
        trainer.step(0)
        trainer.step(1)
    assert events == ["learn", "release", "refresh"] * 2
