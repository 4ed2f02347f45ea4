"""A step's order: what an idle rank can do, it does before it waits for the others."""

import sys

from tests.support import tiny_trainer


def test_no_rank_waits_for_another_before_it_trains_the_drafter(tmp_path, monkeypatch):
    """Until then nothing is collective: neither generating, nor scoring, nor the reference's log-probs."""
    events: list[str] = []

    def recorded(name, function):
        def run(*arguments, **options):
            events.append(name)
            return function(*arguments, **options)

        return run

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
