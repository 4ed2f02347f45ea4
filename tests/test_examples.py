"""Every example runs as it stands, and stays short."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

EXAMPLES = ROOT / "examples"
SHORT = ["engine", "own_data", "own_drafter", "own_reward", "pause_and_resume", "trl_grpo"]

# run in tests/rl/integrations/test_turns.py
CALCULATOR = ("calculator", "calculator_environment")


def run_here(name, monkeypatch, tmp_path, *arguments):
    """Runs an example in this process, which has torch loaded already, in an empty directory."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_engine(monkeypatch, tmp_path, capsys):
    run_here("engine", monkeypatch, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("32 tokens in ")]
    assert len(lines) == 8


def test_own_drafter(monkeypatch, tmp_path, capsys):
    run_here("own_drafter", monkeypatch, tmp_path)  # asserts that the completions are those of plain decoding
    assert "draft tokens were accepted" in capsys.readouterr().out


def test_own_data(monkeypatch, tmp_path, capsys):
    run_here("own_data", monkeypatch, tmp_path)
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["1", "1", "0"]


def test_pause_and_resume(monkeypatch, tmp_path, capsys):
    run_here("pause_and_resume", monkeypatch, tmp_path)
    assert "8 of 8 samples are paused" in capsys.readouterr().out


def test_trl_grpo(monkeypatch, tmp_path):
    pytest.importorskip("trl")
    trainer = run_here("trl_grpo", monkeypatch, tmp_path, "--steps", "1", "--out", "out")["trainer"]
    assert trainer.state.global_step == 1
    assert (tmp_path / "out" / "paceline" / "drafter" / "model.safetensors").is_file()


@pytest.mark.ci
def test_own_reward(tmp_path):
    shutil.copy(EXAMPLES / "own_reward.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "own_reward.py", "--out", "run", "steps=1", "speculation.drafters=[suffix]"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PACELINE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 0: reward -0." in done.stdout  # a random policy is never right, and length costs


@pytest.mark.parametrize("name", [*SHORT, *CALCULATOR])
def test_an_example_fits_a_page(name):
    """At most 40 lines of code: blank lines and docstrings are not counted."""
    text = (EXAMPLES / f"{name}.py").read_text()
    docstrings = [
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    ]
    assert sum(bool(line.strip()) for line in text.splitlines()) - len(docstrings) <= 40


def test_every_example_is_listed_and_tested():
    listed = (EXAMPLES / "README.md").read_text()
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SHORT, *CALCULATOR}
    missing = [
        path.name for path in EXAMPLES.iterdir() if path.name[0] not in "._" and path.name not in listed
    ]
    assert [name for name in missing if name not in ("README.md",)] == []


def test_shell_examples_parse():
    for script in Path(EXAMPLES).rglob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
