"""The README's Python examples run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS[number].splitlines()) <= 15
    script = tmp_path / "example.py"
    script.write_text(BLOCKS[number])
    runpy.run_path(str(script))


def test_there_are_examples_for_model_data_reward_and_drafter():
    assert len(BLOCKS) >= 4
