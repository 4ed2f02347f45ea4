"""A user's own files named like our folders neither shadow ours nor are imported by it."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

NAMES = ("rl", "rollout", "drafter_trainer", "configs", "launch")


@pytest.mark.ci
@pytest.mark.timeout(240)
def test_training_beside_own_files_of_our_folders_names(tmp_path):
    """Modules and packages."""
    for number, name in enumerate(NAMES):
        path = tmp_path / name / "__init__.py" if number % 2 else tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('the own {name} was imported')\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "PACELINE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "paceline.cli.main", "train", "tiny", "steps=1", "out=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "report.html").is_file()
