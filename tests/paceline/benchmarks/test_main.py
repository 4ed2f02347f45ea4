"""Every benchmark is one module, listed once; the trainer knows nothing of benchmarks."""

import argparse
import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from paceline.benchmarks.main import STUDIES, docstring, main
from tests.support import ROOT

BENCHMARKS = ROOT / "paceline" / "benchmarks"
HELP_WITHOUT_TORCH = """
import sys
from paceline.benchmarks.main import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_arguments_a_run_and_a_summary_of_one_line(name):
    study = import_module(f"paceline.benchmarks.{STUDIES[name]}")
    summary, *rest = docstring(name).splitlines()
    assert docstring(name) == study.__doc__.strip()
    assert summary.endswith(".") and (not rest or rest[0] == "")
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    assert callable(study.run)
    assert all(action.help for action in parser._actions)


def test_results_go_to_the_folder_of_results_by_default():
    for name, module in STUDIES.items():
        parser = argparse.ArgumentParser()
        import_module(f"paceline.benchmarks.{module}").add_arguments(parser)
        out = parser.get_default("out")
        assert out is None or out.parent == Path("benchmarks/results"), name


def test_help_lists_every_study_and_loads_no_torch():
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines if words[0] in STUDIES] == list(STUDIES)


def test_a_study_has_its_own_help(capsys):
    with pytest.raises(SystemExit):
        main(["sharding", "--help"], "paceline bench")
    text = capsys.readouterr().out
    assert "usage: paceline bench sharding" in text and "--ranks" in text
    assert docstring("sharding").splitlines()[0] in text


def test_every_study_is_listed():
    """A module in a folder of studies that has ``run`` has a line in `STUDIES`."""
    folders = "decoding", "gpu", "training", "lengths"
    files = [path for folder in folders for path in (BENCHMARKS / folder).glob("*.py")]
    studies = {
        f"{path.parent.name}.{path.stem}"
        for path in files
        if "\ndef run(args: argparse.Namespace)" in path.read_text(encoding="utf-8")
    }
    assert studies == set(STUDIES.values()) - {"common.plots"}


def test_the_trainer_does_not_import_benchmarks():
    for folder in ("rl", "rollout", "drafter_trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            names = []
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names += [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names += [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if name.startswith("paceline.benchmarks")], path
