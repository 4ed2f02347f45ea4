"""A run's files: optimizers without pickle, checkpoints swapped whole, metrics cut back to the checkpoint."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from paceline.drafter_trainer.storage.checksums import changed_files, write_checksums
from paceline.drafter_trainer.storage.optimizer_state import save_optimizer
from paceline.rl.checkpointing.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from paceline.rl.checkpointing.parts import restore_selector, write_policy, write_speculation
from paceline.rl.checkpointing.run_logs import keep_first_lines
from paceline.rl.errors import UserError
from paceline.rl.learner.moments import restore_moments
from paceline.rl.process.files import write_atomically
from paceline.rl.sharding import AdamWSettings, FullState
from paceline.rl.sharding.replicated import Replicated
from paceline.rollout.strategy import BanditSelector, CostModel, Strategy
from tests.engines import tiny_eagle3, tiny_llama


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for i in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[1, 2, 3 + i]])).logits.square().mean().backward()
        optimizer.step()
    return optimizer


def trained(model) -> Replicated:
    return Replicated(model, AdamWSettings(1.0, 1e-2, 1e9, "no"), Accelerator(cpu=True))


def test_optimizer_round_trip(tmp_path):
    a = tiny_llama()
    optimizer = stepped(a)
    save_optimizer(optimizer, tmp_path / "optimizer")
    b = tiny_llama()
    b.load_state_dict(a.state_dict())
    again = trained(b)
    restore_moments(again, tmp_path / "optimizer")
    again.set_rate(1e-2)
    optimizer.zero_grad()
    a(torch.tensor([[4, 5]])).logits.square().mean().backward()
    optimizer.step()
    again.backward(b(torch.tensor([[4, 5]])).logits.square().mean())
    again.step()
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_truncated_optimizer_is_named(tmp_path):
    save_optimizer(stepped(tiny_llama()), tmp_path / "optimizer")
    data = (tmp_path / "optimizer.safetensors").read_bytes()
    (tmp_path / "optimizer.safetensors").write_bytes(data[:1000])
    with pytest.raises(UserError, match="optimizer: truncated"):
        restore_moments(trained(tiny_llama()), tmp_path / "optimizer")


def save(run, steps_done, tokenizer):
    model = tiny_llama()
    drafter = tiny_eagle3(model)
    state = FullState(dict(model.named_parameters()), stepped(model).state_dict())
    optimizer = torch.optim.AdamW(drafter.parameters())
    writers = [
        partial(write_policy, policy=model, tokenizer_from=tokenizer, state=state),
        partial(write_speculation, drafter=drafter, optimizer=optimizer, selector={"cost": {}}),
    ]
    save_checkpoint(run, steps_done, writers)


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")
    return path


def test_checkpoints_replace_each_other_whole(tmp_path, tokenizer):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no checkpoint there"):
        find_checkpoint(run)
    for steps in (1, 2):
        save(run, steps, tokenizer)
        assert find_checkpoint(run).steps_done == steps
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint",
        "checkpoint.old",
    ]  # the last one stays, in case this one breaks
    assert (run / "checkpoint" / "policy" / "tokenizer.json").is_file()


def test_a_kill_between_the_two_renames_leaves_the_old_one(tmp_path, tokenizer):
    run = tmp_path / "run"
    save(run, 3, tokenizer)
    (run / "checkpoint").rename(run / "checkpoint.old")
    (run / "checkpoint.new").mkdir()
    assert find_checkpoint(run).steps_done == 3
    save(run, 4, tokenizer)
    assert find_checkpoint(run).steps_done == 4


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, tokenizer, monkeypatch):
    run = tmp_path / "run"
    save(run, 1, tokenizer)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paceline.rl.checkpointing.parts.write_state", full)
    with pytest.raises(UserError, match="No space left"):
        save(run, 2, tokenizer)
    assert find_checkpoint(run).steps_done == 1
    assert not (run / "checkpoint.new").exists()


def test_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "rew')
    keep_first_lines(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    keep_first_lines(tmp_path / "absent.jsonl", 3)


@pytest.mark.parametrize(
    "broken",
    [
        '{"cost": ',
        "[]",
        "",
        "{}",
        '{"cost": {"forward": 3}, "windows": [], "spent": []}',
        '{"cost": {"forward": [], "draft": [], "level": [], "rest": [], "acceptance": []}, '
        '"windows": [[1]], "spent": []}',
        '{"cost": {"forward": [], "draft": [], "level": [], "rest": [[1, NaN]], "acceptance": []}, '
        '"windows": [], "spent": []}',
    ],
)
def test_a_broken_selector_state_is_said_and_nothing_of_it_stays(tmp_path, broken):
    cost = CostModel(lambda batch, tokens, context: 1.0, lambda drafter, batch: 1.0)
    selector = BanditSelector(lambda name: [Strategy(name, 2)], ["suffix"], cost)
    fresh = selector.state()
    assert restore_selector(Checkpoint(tmp_path, 1), selector) is None  # there is none
    (tmp_path / "selector.json").write_text(broken)
    said = restore_selector(Checkpoint(tmp_path, 1), selector)
    assert (
        said.startswith(f"{tmp_path}/selector.json: ") and said.endswith("measured anew") and "\n" not in said
    )
    assert selector.state() == fresh


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    assert write_atomically(path, "one")
    before = path.stat()
    # nothing is written that is there
    assert not write_atomically(path, "one") and path.stat().st_ino == before.st_ino
    monkeypatch.setattr("paceline.rl.process.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "two")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def test_every_flipped_bit_is_found(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(bytes(range(64)))
    (tmp_path / "b").write_bytes(b"")
    write_checksums(tmp_path)
    assert changed_files(tmp_path) == {}
    for bit in range(64 * 8):
        data = bytearray(range(64))
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "below" / "a").write_bytes(data)
        assert list(changed_files(tmp_path)) == ["below/a"]
    (tmp_path / "b").unlink()
    assert changed_files(tmp_path)["b"] == "missing"
    for broken in ((tmp_path / "checksums.json").read_text().replace('"b"', '"c"'), "{}"):
        (tmp_path / "checksums.json").write_text(broken)
        assert changed_files(tmp_path) is None


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, tokenizer, monkeypatch):
    """A power cut after the rename must not find files without their content."""
    run, order = tmp_path / "run", []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        "os.fsync", lambda file: (order.append(str(Path(f"/proc/self/fd/{file}").readlink())), sync(file))
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, target: (order.append(f"renamed {path.name}"), rename(path, target))[1]
    )
    save(run, 1, tokenizer)
    before = order[: order.index("renamed checkpoint.new")]
    synced = {
        Path(place).relative_to(run / "checkpoint.new")
        for place in before
        if place.startswith(str(run / "checkpoint.new"))
    }
    files = {path.relative_to(run / "checkpoint") for path in (run / "checkpoint").rglob("*")}
    assert files <= synced
    assert order[-1] == str(run)


@pytest.mark.parametrize(
    "content", ["", "3", "{}", '{"scalars": {}, "param_groups": 3}', '{"scalars": [], "param_groups": []}']
)
def test_an_optimizers_json_that_is_none_is_one_line(tmp_path, content):
    model = tiny_llama()
    save_optimizer(stepped(model), tmp_path / "optimizer")
    (tmp_path / "optimizer.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/optimizer") as refused:
        restore_moments(trained(model), tmp_path / "optimizer")
    assert "\n" not in str(refused.value)


def test_moments_of_another_shape_are_refused(tmp_path):
    save_optimizer(stepped(tiny_llama(hidden=32)), tmp_path / "optimizer")
    with pytest.raises(UserError, match="of another optimizer"):
        restore_moments(trained(tiny_llama()), tmp_path / "optimizer")
