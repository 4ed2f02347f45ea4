"""A length-aware reward and a benchmark are one file and one line: their registries import them by name.

What else can be added is added by docs/development.md, whose examples test_readme.py runs.
"""

import sys
import types
from dataclasses import dataclass

import pytest

from paceline.benchmarks.main import STUDIES, docstring, main
from paceline.rl.recipe import load_config
from paceline.rl.rewards.registry import TERMS, LengthAware
from paceline.rl.rewards.terms import RewardTerm


@dataclass(frozen=True, slots=True)
class Halved(RewardTerm):
    """Halves the reward of completions longer than ``limit``."""

    limit: int = 4

    def rewards(self, samples):
        return samples.rewards * (1 - 0.5 * (samples.lengths > self.limit))


def test_a_length_aware_reward_is_a_class_and_a_line(monkeypatch):
    module = types.ModuleType("paceline.rl.rewards.halved")
    module.Halved = Halved
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(TERMS, "halved", "halved:Halved")
    assert load_config("tiny", ["length.rewards=[{name: halved, limit: 3}]"]).length.rewards
    reward = LengthAware(
        lambda prompts, completions, **columns: [1.0] * len(completions),
        [{"name": "halved", "limit": 3}],
        2,
        8,
    )
    ids = [[1, 2], [1, 2, 3, 4]]
    assert reward(prompts=["a", "a"], completions=["b", "c"], completion_ids=ids) == [1.0, 0.5]


def test_a_benchmark_is_a_module_and_a_line(tmp_path, monkeypatch, capsys):
    import paceline.benchmarks.decoding as room

    source = '''"""Counts to a number."""


def add_arguments(parser):
    parser.add_argument("--to", type=int, default=3)


def run(args):
    print("counted to", args.to)
'''
    (tmp_path / "counting.py").write_text(source)
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    monkeypatch.setitem(STUDIES, "counting", "decoding.counting")
    monkeypatch.setattr(
        "paceline.benchmarks.main.docstring",
        lambda name: "Counts." if name == "counting" else docstring(name),
    )
    main(["counting", "--to", "5"])
    assert "counted to 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "counting" in capsys.readouterr().out
