"""A run's drafter: the start directory as it is, a broken one that costs acceptance, never the run, and
training that stops where it costs other ranks too much.
"""

import json
import math
import platform
import shutil
import time

import pytest
import torch
from torch.distributed import HashStore
from transformers import LlamaConfig

from paceline.drafter_trainer.coordinator import Coordinator
from paceline.drafter_trainer.slowdown.neighbours import Neighbours
from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.drafter_trainer.storage.checkpoint import load_drafter, save_drafter
from paceline.drafter_trainer.storage.optimizer_state import save_optimizer
from paceline.rl.checkpointing.checkpoint import Checkpoint
from paceline.rl.dry_run.description import describe
from paceline.rl.errors import UserError
from paceline.rl.models.initial import starting_drafter, tap_layers
from paceline.rl.recipe import load_config
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from tests.engines import tiny_llama
from tests.support import ROOT, tiny_trainer

TINY = ROOT / "configs" / "tiny.yaml"
DRAFTS = (
    "speculation.drafters=[eagle3]",
    "drafter.schedule=always",
    "drafter.draft_vocab_size=24",
    "rollout.prompts_per_step=2",
)


def drafter_for(layers=(1, 2, 2)) -> Eagle3Model:
    """For the tiny policy: it drafts the last 24 of its 99 tokens, which no run would choose."""
    torch.manual_seed(0)
    return Eagle3Model(eagle3_config(tiny_llama(99).config, 24, layers), torch.arange(75, 99))


@pytest.fixture
def start(tmp_path):
    drafter = drafter_for()
    save_drafter(drafter, tmp_path / "start", torch.float32)
    save_optimizer(torch.optim.AdamW(drafter.parameters()), tmp_path / "start" / "optimizer")
    return tmp_path / "start"


def test_a_run_keeps_the_vocabulary_of_its_start_and_survives_broken_drafters(start, tmp_path, monkeypatch):
    said: list[str] = []
    with tiny_trainer(
        tmp_path, monkeypatch, "[0.0 for c in completions]", *DRAFTS, f"drafter.start={start}"
    ) as trainer:
        trainer.step(0)
        shared, worker, local = trainer.drafter, trainer.worker, trainer.drafter.local
        assert local.spot is not None and local.spot.serving.vocabulary.tolist() == list(range(75, 99))
        shared._log = said.append

        # what was trained turns out not to be finite: the engine keeps what it has, and so does the next step
        good = local.spot.serving.fc.weight.clone()
        with torch.no_grad():
            local.spot.approved.fc.weight.fill_(float("nan"))
        done, report = worker.rollout(trainer.choice.choose(1, 2), 1), local.train(lambda: True)
        report.approved = 1
        shared.share(done, report, 1)
        assert "NaN or infinite values; the last good drafter stays in use" in said.pop()
        assert torch.equal(local.spot.serving.fc.weight, good)
        assert torch.equal(
            worker.engine.drafters["eagle3"]._weights.fc.weight.float(), good.to(worker.dtype).float()
        )
        with torch.no_grad():
            local.spot.serving.fc.weight[0, 0] = float("inf")
        assert "fc.weight has NaN or infinite values" in local.swap_in()

        # resuming: a broken checkpoint leads back to the start, broken moments begin anew, and without a
        # start a fresh one is made
        kept = tmp_path / "kept"
        shutil.copytree(start, kept / "drafter")
        (kept / "drafter_optimizer.json").write_text("[]")
        snapshots = tmp_path / "run" / "drafters"
        shared.finish()
        shutil.rmtree(snapshots, ignore_errors=True)

        def resumed(path) -> list[str]:
            said.clear()
            local.spot = None
            shared.resume(Checkpoint(path, 1))
            return said

        assert "its optimizer begins anew" in resumed(kept)[-1] and local.spot is not None
        for broken in (b"", b"{}", (start / "model.safetensors").read_bytes()[:-9]):
            (kept / "drafter" / "model.safetensors").write_bytes(broken)
            assert f"it begins again from {start}" in resumed(kept)[-1]
            assert local.spot is not None and local.spot.serving.vocabulary.tolist() == list(range(75, 99))
        (start / "config.json").write_text("[]")
        assert resumed(kept)[-1] == "drafter: a fresh one is made" and len(said) == 3
        assert local.spot is None and local.missing
        assert all("\n" not in line for line in said)


def test_a_drafter_of_a_pass_a_token_learns_to_draft_in_one(start, tmp_path, monkeypatch):
    """It gets a mask, its optimizer begins anew, drafts are made in one pass, and a resume keeps the mask."""
    said: list[str] = []
    parallel = (
        "speculation.drafters=[eagle3,parallel]",
        "speculation.strategy=parallel:2",
        "drafter.parallel_positions=3",
        "drafter.passes=1",
    )
    with tiny_trainer(
        tmp_path, monkeypatch, "[0.0 for c in completions]", *DRAFTS, *parallel, f"drafter.start={start}"
    ) as trainer:
        local = trainer.drafter.local
        assert local.spot.serving.mask_hidden.shape == (1, 192)
        assert torch.equal(local.spot.serving.fc.weight, drafter_for().fc.weight)
        assert not local.spot.learner.optimizer.state
        untrained = local.spot.serving.mask_hidden.clone()
        trainer.step(0)
        assert {str(r.feedback.strategy) for r in trainer.worker.engine.records} == {"parallel:2"}
        assert not torch.equal(local.spot.learner.model.mask_hidden, untrained)
        kept = tmp_path / "kept"
        save_drafter(local.spot.learner.model, kept / "drafter", torch.float32)
        save_optimizer(local.spot.learner.optimizer, kept / "drafter_optimizer")
        trained = local.spot.learner.model.mask_hidden.detach().clone()
        trainer.drafter.finish()
        shutil.rmtree(tmp_path / "run" / "drafters", ignore_errors=True)
        trainer.drafter._log = said.append
        local.spot = None
        trainer.drafter.resume(Checkpoint(kept, 1))
        assert torch.equal(local.spot.learner.model.mask_hidden, trained)
        assert local.spot.learner.optimizer.state
    assert said == []


def test_an_ensemble_survives_in_checkpoints_and_snapshots(start, tmp_path, monkeypatch):
    said: list[str] = []
    with tiny_trainer(
        tmp_path,
        monkeypatch,
        "[0.0 for c in completions]",
        *DRAFTS,
        f"drafter.start={start}",
        "drafter.ensemble=[1.0, 0.3]",
        "drafter.held_out_every=2",
        "drafter.judge_every=1",
    ) as trainer:
        for step in range(2):
            trainer.step(step)
        shared, local = trainer.drafter, trainer.drafter.local
        shared._log = said.append
        spot = local.spot
        shared.finish()
        trainer._save(2)
        checkpoint, snapshots = tmp_path / "run" / "checkpoint", tmp_path / "run" / "drafters"

        def resumed(steps: int) -> list[torch.Tensor]:
            local.spot = None
            shared.resume(Checkpoint(checkpoint, steps))
            assert local.spot.weights == spot.weights
            return [learner.model.fc.weight for learner in local.learners]

        trained = [learner.model.fc.weight for learner in spot.learners]
        assert not torch.equal(*trained)
        assert spot.weights != [0.5, 0.5]
        assert (snapshots / "step-2" / "ensemble").is_dir()
        for steps in (2, 3):  # from a snapshot, and from the checkpoint, which is newer than all of them
            assert all(map(torch.equal, resumed(steps), trained))
        assert not said
        shutil.rmtree(snapshots)
        (checkpoint / "drafter_ensemble" / "weights.json").write_text("{}")
        local.spot = None
        shared.resume(Checkpoint(checkpoint, 3))
        assert "its ensemble begins anew from the served drafter" in said.pop()
        assert local.spot.weights == [0.5, 0.5]


def test_a_start_of_another_recipe_says_what_to_write(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    policy = tiny_llama(99).config

    def recipe(*options: str):
        return load_config(TINY, [*DRAFTS, f"drafter.start={start}", *options])

    drafter = starting_drafter(recipe(), policy)
    assert drafter is not None and drafter.config.draft_vocab_size == 24
    assert starting_drafter(recipe("speculation.drafters=[suffix]"), policy) is None
    with pytest.raises(UserError, match=r"drafter.start: .*write drafter.draft_vocab_size: 24"):
        starting_drafter(recipe("drafter.draft_vocab_size=48"), policy)
    save_drafter(drafter_for((0, 1, 2)), start)
    with pytest.raises(
        UserError, match=r"drafter.start: .*layers \[0, 1, 2\], .*write drafter.tap_layers: \[0, 1, 2\]"
    ):
        starting_drafter(recipe(), policy)
    # --dry-run says it too
    with pytest.raises(UserError, match=r"drafter.start: .*write drafter.tap_layers: \[0, 1, 2\]"):
        describe(recipe(), TINY, 1)
    assert starting_drafter(recipe("drafter.tap_layers=[0,1,2]"), policy) is not None
    with pytest.raises(UserError, match=r"made for 99 tokens, the policy has 120"):
        starting_drafter(recipe(), tiny_llama(120).config)


@pytest.mark.parametrize("layers", ["[0,1]", "[2,1,0]", "[0,1,4]", "[-1,0,1]"])
def test_layers_that_the_policy_does_not_have_are_one_line(layers):
    config = load_config(TINY, [f"drafter.tap_layers={layers}"])
    with pytest.raises(UserError, match="write three layers from 0 to 3 in ascending order"):
        tap_layers(config.drafter, LlamaConfig(num_hidden_layers=4))


def test_a_run_reads_the_layers_that_its_recipe_names(tmp_path, monkeypatch):
    options = (*DRAFTS, "drafter.tap_layers=[0,1,2]", "steps=1", "save_every=1")
    with tiny_trainer(tmp_path, monkeypatch, "[0.0 for c in completions]", *options) as trainer:
        trainer.run()
        assert trainer.worker.engine.runner.tap_layers == (0, 1, 2)
    saved = tmp_path / "run" / "checkpoint" / "drafter"
    assert json.loads((saved / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    load_drafter(saved, 99, 64, tap_layers=(0, 1, 2))


def test_every_decode_step_is_measured_and_the_price_is_among_the_metrics(tmp_path, monkeypatch):
    with tiny_trainer(tmp_path, monkeypatch, "[0.0 for c in completions]", *DRAFTS) as trainer:
        coordinator, measured = trainer.drafter.coordinator, []
        monkeypatch.setattr(coordinator, "decoded", measured.append)
        metrics, (rank,) = trainer.step(0)
        assert [feedback.active for feedback in measured] == [active for _, active, _ in rank["tail"]]
        assert "drafter/slowdown" not in metrics and metrics["drafter/held_back_seconds"] == 0
        for ratio in (1.0, math.exp(0.2)):
            coordinator.price.add(math.log(ratio))
        metrics, _ = trainer.step(1)
        assert metrics["drafter/slowdown"] == pytest.approx(math.exp(0.1) - 1)
        assert metrics["drafter/slowdown_error"] == pytest.approx(0.1 * math.exp(0.1))


@pytest.mark.parametrize(("saved", "trains"), [(0.5, True), (0.01, False)])
def test_ranks_train_beside_others_only_where_drafts_can_save_something(tmp_path, monkeypatch, saved, trains):
    store = HashStore()
    monkeypatch.setattr("paceline.rl.drafting.shared.connect_store", lambda ranks: store)
    options = (*DRAFTS, "drafter.schedule=idle")
    with tiny_trainer(tmp_path, monkeypatch, "[0.0 for c in completions]", *options) as trainer:
        shared, asked = trainer.drafter, []
        other = Coordinator(store, 2, machine=platform.node())
        monkeypatch.setattr(shared.coordinator, "_world", 2)
        monkeypatch.setattr(shared.local, "learn_from", lambda batch, rewards: None)
        monkeypatch.setattr(trainer.worker.selector, "most_saved", lambda name: asked.append(name) or saved)
        monkeypatch.setattr(shared.local, "train", lambda stop: LearnerReport(updates=int(not stop())))
        other.begin(0)
        shared.begin_step(0)
        assert shared.train(None, [], 0).updates == trains
        assert asked == ["eagle3"]


def test_training_stops_at_the_recipes_price_and_says_how_long_it_was_held_back(tmp_path, monkeypatch):
    """Another rank decodes on this machine; the price is far above the limit."""
    store = HashStore()
    monkeypatch.setattr("paceline.rl.drafting.shared.connect_store", lambda ranks: store)
    options = (*DRAFTS, "drafter.schedule=idle", "drafter.max_slowdown=0.5")
    with tiny_trainer(tmp_path, monkeypatch, "[0.0 for c in completions]", *options) as trainer:
        shared, mine = trainer.drafter, trainer.drafter.coordinator
        other = Coordinator(store, 2, machine=platform.node())
        monkeypatch.setattr(mine, "_world", 2)
        monkeypatch.setattr(shared.local, "learn_from", lambda batch, rewards: None)
        monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: time.sleep(0.1))

        def train(stop) -> LearnerReport:
            assert neighbours() == (1, 1, 0)
            return LearnerReport(updates=0 if stop() else 1)

        def neighbours():
            return Neighbours.unpack(store.add(f"0/{platform.node()}/neighbours", 0))[:3]

        monkeypatch.setattr(shared.local, "train", train)
        found = []
        for ratio in (1.3, 1.7):
            store.delete_key("0/idle")
            store.delete_key(f"0/{platform.node()}/neighbours")
            mine.price.begin(100)  # which forgets
            other.begin(0)
            shared.begin_step(0)
            for _ in range(8):
                mine.price.add(math.log(ratio))
            report = shared.train(None, [], 0)
            assert neighbours() == (1, 0, 0)
            shared.wait(report)
            found.append((report.updates, report.held_back_seconds >= 0.1, round(report.slowdown, 6)))
        assert found == [(1, False, 0.3), (0, True, 0.7)]
