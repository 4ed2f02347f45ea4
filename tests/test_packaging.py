"""What is built is whole: a wheel and an sdist that install elsewhere."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.ci, pytest.mark.timeout(600)]
EXTRAS = ("trl", "deepspeed", "vllm", "peft", "verl")
CHECK = f"""
import importlib
import pathlib

for name in {EXTRAS}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " is there")

from paceline import drafter_trainer, rl, rollout
from paceline.cli import main
from paceline.rl.integrations import host
from paceline.rollout.backends import vllm_server
from paceline.rl.recipe import load_config
from paceline.rollout.native.build import SOURCE

assert "site-packages" in rl.__file__, rl.__file__
assert SOURCE.is_file() and SOURCE.with_name("tiles.h").is_file()
assert load_config("quickstart").steps == 20 and load_config("length/rewards/pear").length.rewards
assert pathlib.Path(rl.__file__).parents[1].joinpath("py.typed").is_file()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of what git knows of, built with this environment's tools: a release of theirs is no reason for
    this test to fail.
    """
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():  # paceline/ links to the folders beside it
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return folder


def test_the_sdist_has_what_the_wheel_needs(built):
    with tarfile.open(next((built / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert {"paceline/configs/quickstart.yaml", "paceline/rollout/native/kernels.cpp"} <= names
    wheel = next((built / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        metadata = archive.read(next(name for name in inside if name.endswith("METADATA"))).decode()
    modules = {
        f"paceline/{path.relative_to(ROOT)}"
        for package in ("rl", "rollout", "drafter_trainer")
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules <= set(inside)
    assert {"paceline/py.typed", "paceline/configs/quickstart.yaml"} <= set(inside)
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/", "launch/"))]
    assert "License-Expression: Apache-2.0" in metadata
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert not [
        line for line in required if any(name in line for name in ("trl", "deepspeed", "vllm", "peft"))
    ]


def test_the_wheel_runs_without_the_extras(built):
    """In an environment with this one's libraries, but neither this checkout nor the extras."""
    home = built / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    wheel = next((built / "dist").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    site = next((home / "lib").glob("python*/site-packages"))
    left_out = (*EXTRAS, "paceline", "__editable__")
    for entry in Path(next(path for path in sys.path if path.endswith("site-packages"))).iterdir():
        if not entry.name.startswith(left_out) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(built), "PACELINE_CACHE": str(built / "cache")}
    environment["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))

    def run(*command):
        done = subprocess.run(
            command, cwd=built, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-1000:]
        return done.stdout

    run(python, "-c", CHECK)
    assert "the main job runs here" in run(home / "bin" / "paceline", "doctor")  # from training to report
