"""The drafter's training as users reach it: the warm-up command, a start from its drafter, losses side by
side.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.decoding.served import ServedRow
from paceline.benchmarks.main import main as benchmark
from paceline.benchmarks.training import context, parallel_drafts
from paceline.benchmarks.training.idle import idle_row
from paceline.benchmarks.training.losses import VARIANTS, CollectionRow, compare_losses
from paceline.benchmarks.training.online import VARIANTS as ONLINE
from paceline.benchmarks.training.online import compare_online
from paceline.cli.drafter import warm_up_drafter
from paceline.drafter_trainer import learner
from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.drafter_trainer.trace_buffer import TraceBuffer
from paceline.rl.drafting import factory
from paceline.rl.drafting.factory import reward_weights
from paceline.rl.process import process_tuning
from paceline.rl.recipe import load_config
from paceline.rollout import Request, SamplingParams
from tests.engines import engine_for, tiny_eagle3, tiny_llama
from tests.support import ROOT, train_here
from tests.test_end_to_end import finish, steps_of, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def warm_up(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """``paceline warmup --drafter`` in this process, whose threads and allocator stay as they are."""
    monkeypatch.setattr(process_tuning, "fit_process", lambda local_world_size: None)
    warm_up_drafter(str(ROOT / "configs" / "tiny.yaml"), out, minutes=0.02)


@pytest.mark.parametrize("fast", [True, False])
def test_a_drafter_is_trained_in_bfloat16_where_the_machine_multiplies_it(monkeypatch, fast):
    """Its traces are bfloat16 in both cases; an update in float32 is not rounded to it."""
    target = tiny_llama(sharpness=8.0)
    engine = engine_for(target, slots=4, context=60, dtype=torch.bfloat16, collect_traces=True)
    config = load_config(ROOT / "configs/tiny.yaml", ["policy.mixed_precision=bf16"])
    monkeypatch.setattr(factory, "multiplies_bfloat16", lambda device: fast)
    trainer = factory.spot_trainer(config, target, tiny_eagle3(target), factory.trace_buffer(config, 0))
    seen, product = set(), torch.nn.functional.linear

    def linear(x, weight, bias=None):
        made = product(x, weight, bias)
        seen.add(made.dtype)
        return made

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    wanted = [Request([1 + i, 2, 3], SamplingParams(max_tokens=20), seed=i) for i in range(6)]
    trainer.buffer.begin_step()
    trainer.buffer.add(engine.generate(wanted))
    seen.clear()
    asked = iter(range(40))
    assert trainer.run(lambda: next(asked, None) is None).updates > 0
    assert seen == {torch.bfloat16 if fast else torch.float32}


@pytest.mark.parametrize("tokens", [0, 7])
def test_a_recipes_context_is_what_the_drafter_sees_before_a_piece(monkeypatch, tokens):
    target = tiny_llama()
    engine = engine_for(target, slots=2, context=60, collect_traces=True)
    config = load_config(ROOT / "configs/tiny.yaml", [f"drafter.context_tokens={tokens}"])
    trainer = factory.spot_trainer(config, target, tiny_eagle3(target), factory.trace_buffer(config, 0))
    seen, pack = [], learner.pack
    monkeypatch.setattr(
        learner, "pack", lambda *args, **options: seen.append(pack(*args, **options)) or seen[-1]
    )
    trainer.buffer.begin_step()
    trainer.buffer.add(engine.generate([Request([1, 2, 3] * 5, SamplingParams(max_tokens=8), seed=1)]))
    trainer.run(lambda: len(seen) == 1)
    positions = [] if tokens == 0 else [0, 1, 2, 3, *range(14 - tokens, 14)]
    assert seen[0].context.positions.tolist() == positions


def test_the_rounds_of_a_warm_up_are_of_one_policy(tmp_path, cache, monkeypatch):
    seen, begin = [], TraceBuffer.begin_step
    monkeypatch.setattr(
        TraceBuffer, "begin_step", lambda self, *same: seen.append(same) or begin(self, *same)
    )
    warm_up(monkeypatch, tmp_path / "drafter")
    assert set(seen) == {(True,)}


@pytest.mark.ci
def test_a_warmed_up_drafter_starts_a_run(tmp_path, cache, monkeypatch, capsys):
    """Then the very first step drafts with it, every rank alike; a run that never trains keeps it as it
    is."""
    out = tmp_path / "drafter"
    command = [sys.executable, "launch/warmup_drafter.py", "configs/tiny.yaml", str(out), "--minutes", "0.05"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "warmup.json").read_text())
    assert report["updates"] > 0 and 1 <= report["greedy"] <= 5 and 1 <= report["sampled"] <= 5
    load_drafter(out, 99, 64)
    with pytest.raises(SystemExit) as again:
        warm_up(monkeypatch, out)
    assert again.value.code == 2 and "exists already; name a new directory" in capsys.readouterr().err

    run = tmp_path / "run"
    options = ("speculation.strategy=eagle3:2", "drafter.schedule=never", f"drafter.start={out}", "steps=2")
    finish(train("configs/tiny.yaml", f"out={run}", *options))
    steps = steps_of(run)
    assert "rollout/acceptance_length_eagle3" in steps[0]
    assert all("drafter/updates" not in step for step in steps)
    kept, started = load_drafter(run / "drafter", 99, 64), load_drafter(out, 99, 64)
    # exported in bfloat16
    assert (kept.fc.weight - started.fc.weight).abs().max() <= started.fc.weight.abs().max() * 2**-8


def test_a_start_that_does_not_fit_is_one_line(tmp_path, cache, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train_here(monkeypatch, "configs/tiny.yaml", f"out={tmp_path / 'r'}", f"drafter.start={tmp_path}")
    error = capsys.readouterr().err
    assert "drafter.start" in error and "config.json: missing" in error


@pytest.mark.ci
def test_losses_side_by_side(cache):
    bench = RolloutBench(load_config(ROOT / "configs/tiny.yaml"), None, 1, 64)
    lines: list[str] = []
    rows = compare_losses(bench, seconds=1.5, sequences=16, log=lines.append)
    assert [row.variant for row in rows] == list(VARIANTS) and len(lines) == len(rows)
    assert all(row.updates > 0 and 1 <= row.drawn <= 5 and 1 <= row.likeliest <= 5 for row in rows)


def test_contexts_side_by_side(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(context, "fit_process", lambda local_world_size: None)
    options = ["--contexts", "0", "64", "--microbatches", "64", "16", "--seconds", "1", "--sequences", "16"]
    options += ["--random-positions", "--trained-until", "6"]
    recipe, out = str(ROOT / "configs/tiny.yaml"), tmp_path / "context.json"
    benchmark(["context", "--config", recipe, *options, "--out", str(out)], "paceline bench")
    found = json.loads(out.read_text())
    assert "unfinished" not in found and 0 < found["lengths"]["median"] <= found["lengths"]["longest"] <= 24
    rows = found["rows"]
    expected = itertools.product((0, 64), (64, 16), (False, True))
    assert [(r["context"], r["microbatch"], r["moved"]) for r in rows] == list(expected)
    for row in rows:
        assert row["updates"] > 0 and row["anchors"] > 0 and set(row["by_part"]) == {"0"}
        assert 1 <= row["drawn"] <= 5
        assert row["by_part"]["0"] == pytest.approx([row["drawn"], row["likeliest"]])


def test_drafts_in_one_pass_beside_those_of_a_pass_a_token(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_drafts, "fit_process", lambda local_world_size: None)
    options = ["--depth", "3", "--seconds", "1", "--sequences", "16", "--rounds", "1", "--workloads", "4"]
    recipe, out = str(ROOT / "configs/tiny.yaml"), tmp_path / "parallel.json"
    benchmark(["parallel-drafts", "--config", recipe, *options, "--out", str(out)], "paceline bench")
    found = json.loads(out.read_text())
    assert "unfinished" not in found
    trained = {row["trained"]: row for row in found["trained"]}
    assert set(trained) == {"a pass a token", "one pass", "both"}
    assert trained["a pass a token"]["parallel"] is None
    assert all(row["updates"] > 0 and 1 <= row["chain"] <= 4 for row in trained.values())
    assert [len(trained[name]["parallel_by_position"]) for name in ("one pass", "both")] == [3, 3]
    decoded = [(row["trained"], row["strategy"]) for row in found["decoded"]]
    assert ("both", "eagle3:3") in decoded and ("both", "parallel:3") in decoded and len(decoded) == 5
    assert all(row["over_plain"] > 0 and row["acceptance_length"] >= 1 for row in found["decoded"])


def test_ratios():
    assert ServedRow("eagle3", 64, 4, engine=2.0, vllm=1.9).ratio == pytest.approx(0.95)
    assert CollectionRow(without=9.8, collecting=10.0).share == pytest.approx(0.02)


def test_weights_follow_rewards():
    assert reward_weights([0.0, 1.0], 0.0) == [1.0, 1.0]
    assert reward_weights([0.0, 1.0], 1.0) == [0.0, 2.0]
    assert sum(reward_weights([0.0, 0.5, 1.0], 0.5)) == pytest.approx(3.0)
    assert reward_weights([0.7, 0.7], 1.0) == [1.0, 1.0]


@pytest.mark.ci
def test_a_corrupted_drafter_costs_acceptance_not_the_run(tmp_path, cache):
    """Checkpoint and snapshots are cut short while the job is down: it goes on, says so, and makes
    another."""
    run = tmp_path / "run"
    finish(
        train(
            "configs/tiny.yaml",
            f"out={run}",
            "steps=3",
            "save_every=3",
            "drafter.schedule=always",
            "drafter.ensemble=[0.5,2]",
        )
    )
    assert len(steps_of(run)[1]["drafter/ensemble"]) == 2
    broken = [run / "checkpoint" / "drafter", *(run / "drafters").iterdir()]
    assert len(broken) >= 2
    for path in broken:
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 5}))
    output = finish(train("--resume", str(run)))
    assert output.count("a fresh one is made") == 1 and "bytes, " in output and "were written" in output
    assert [step["step"] for step in steps_of(run)] == list(range(5))
    load_drafter(run / "checkpoint" / "drafter", 99, 64)


@pytest.mark.ci
def test_online_learners_beside_each_other(tmp_path, cache, monkeypatch):
    config = load_config(ROOT / "configs/tiny.yaml", ["steps=2", "speculation.strategy=eagle3:2"])
    start = tmp_path / "drafter"
    warm_up(monkeypatch, start)
    rows = compare_online(config, start, 0.2, tmp_path / "run", lambda line: None, lambda rows: None)
    assert [row.variant for row in rows] == ["frozen", *ONLINE]
    assert all(len(row.lengths) == len(row.regret) == 2 and min(row.lengths) >= 1 for row in rows)
    assert rows[0].updates == 0 and rows[1].updates > 0
    assert rows[0].lengths[0] == rows[1].lengths[0]  # nothing learned before the first step
    # it is the best fixed drafter where there are no others
    assert rows[0].regret == pytest.approx([0.0, 0.0])


def test_steps_are_paired():
    def metrics(step: float, training: float) -> dict:
        names = (
            "rollout/seconds",
            "rollout/acceptance_length",
            "reward/mean",
            "drafter/seconds_on_path",
            "drafter/snapshot_seconds",
        )
        off = {"drafter/seconds": training, "drafter/seconds_off_path": training / 2}
        return {**dict.fromkeys(names, 1.0), **off, "time/step": step, "time/update": 2.0}

    frozen, trained = (
        [metrics(step, 0.1) for step in (9, 10, 20)],
        [metrics(step, 2.0) for step in (30, 11, 23)],
    )
    assert idle_row("never", frozen, frozen).training == 0
    row = idle_row("idle", trained, frozen)
    assert (
        row.inside == 0.5
        and row.longer == pytest.approx(2 / 15)
        and row.longer_error == pytest.approx(1 / 15)
    )
    assert row.update_longer == 0
