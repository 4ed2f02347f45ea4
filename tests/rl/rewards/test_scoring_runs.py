"""What a run does with scores: special tokens, several rewards, completions without a score, and steps in
which none has one.
"""

from pathlib import Path

import pytest

from paceline.rl.checkpointing.checkpoint import find_checkpoint
from paceline.rl.errors import UserError
from paceline.rl.monitoring.tracker import Tracker
from tests.support import ROOT, tiny_trainer, train_here


@pytest.mark.ci
def test_a_reward_sees_special_tokens_and_ids_on_request(tmp_path, monkeypatch):
    """The token "1" is made a special one, as those around thoughts are. Each reward function has its own
    line of metrics.
    """
    shown = "[1.0 if '1' in text else None for text in completions]"
    name = f"reward_{tmp_path.name}"
    (tmp_path / "lengths.py").write_text(
        "def ids(completion_ids, **_):\n    return [len(ids) for ids in completion_ids]\n"
    )
    rewards = f"task.reward=[{{reward: {name}:score}}, {{reward: lengths:ids, weight: 0.5}}]"
    with tiny_trainer(
        tmp_path, monkeypatch, shown, rewards, "task.reward_sees_special_tokens=true"
    ) as trainer:
        trainer.tokenizer.add_special_tokens({"additional_special_tokens": ["1"]})
        metrics, (record,) = trainer.step(0)
    seen = record["reward_parts"]["score"]
    assert record["reward_parts"]["ids"] == record["lengths"]
    assert seen.count(1.0) >= 2 and seen.count(None) >= 2
    assert record["rewards"] == [0.5 * n + (s or 0) for n, s in zip(record["lengths"], seen, strict=True)]
    assert metrics["rewards/score/mean"] == 1.0
    assert metrics["rewards/ids/mean"] == pytest.approx(metrics["length/mean"])


@pytest.mark.ci
def test_a_share_of_failures_is_said(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Tracker, "say", lambda self, line: said.append(line))
    with tiny_trainer(tmp_path, monkeypatch, "[float('nan'), *range(len(completions) - 1)]") as trainer:
        said.clear()  # what the set-up says
        metrics, _ = trainer.step(0)
    assert metrics["reward/errors"] == 4
    assert said == [
        "reward: 4 of 16 completions have no score (score returned nan, which is not a finite number); they "
        "get 0"
    ]


def test_a_step_without_any_score_stops_the_run_and_keeps_what_was_learned(tmp_path, monkeypatch):
    reward = "1 / 0 if __import__('os').path.exists('broken') else [float(len(text)) for text in completions]"
    with tiny_trainer(tmp_path, monkeypatch, reward, "save_every=100", "steps=4") as trainer:
        monkeypatch.setattr(
            trainer.tracker, "log", lambda step, *_: (tmp_path / "broken").touch() if step == 1 else None
        )
        with pytest.raises(
            UserError,
            match=r"^step 3: none of the 16 completions has a reward: .*ZeroDivisionError.*; the run stops",
        ):
            trainer.run()
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.steps_done == 2


@pytest.mark.ci
def test_a_dry_run_scores_an_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dry_reward.py").write_text(
        "def good(**_):\n    return [0.25] * 4\ndef bad(**_):\n    return [1]\n"
    )
    tiny = [str(ROOT / "configs" / "tiny.yaml"), "--dry-run", f"out={tmp_path / 'run'}"]
    train_here(monkeypatch, *tiny, "task.reward=dry_reward:good")
    assert "scores 0.25, 'I do not know.' 0.25" in capsys.readouterr().out
    for name, says in (("bad", "returned 1 rewards for 4 completions"), ("absent", "write module:function")):
        with pytest.raises(SystemExit) as ended:
            train_here(monkeypatch, *tiny, f"task.reward=dry_reward:{name}")
        error = capsys.readouterr().err
        assert ended.value.code == 2 and says in error and error.count("\n") == 1
    assert not Path(tmp_path / "run").exists()
