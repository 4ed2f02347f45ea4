"""Makes a virtual environment with Paceline and what its tests need:
``python constraints/environment.py FOLDER``.

Only the standard library is used, so that any Python from 3.11 on can run it. torch comes in its CPU build
where the machine has no
NVIDIA GPU: from the configured package sources, else from PyTorch's own index, else whatever PyPI has for the
    platform.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints" / "locked.txt"
REACHED_INTO = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
)  # their new releases have broken Paceline, or could
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class InstallFailed(Exception):
    """pip could not install something; the message is the last line that it printed."""


def make(folder: Path, versions: str = "locked") -> Path:
    """Makes an environment, or goes on with one that was not finished.

    Args:
        folder: Directory of the environment.
        versions: Which versions to install:
            ``locked``: those of constraints/locked.txt.
            ``oldest``: the lowest versions of torch, transformers, trl, peft and accelerate that
                pyproject.toml allows.
            ``newest``: the newest versions of these five, ignoring the upper bounds in pyproject.toml.
            ``name==version``, several joined by commas: these versions, and the locked ones of everything
            else. With ``oldest`` and ``newest``, pip chooses the other packages within the bounds of
            pyproject.toml.

    Returns:
        The environment's Python.

    Raises:
        InstallFailed: with pip's last line.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-c", str(LOCK), "pip"])
    if versions not in ("oldest", "newest"):
        others = [] if versions == "locked" else versions.split(",")
        torch = next((o.partition("==")[2] for o in others if _name(o) == "torch"), _locked("torch"))
        _install_torch(pip, _locked("torch"))
        _run([*pip, "-c", str(LOCK), "--build-constraint", str(LOCK), "-e", f"{ROOT}[dev]"])
        if torch != _locked("torch"):
            _install_torch(pip, torch)
        if others:
            _run([*pip, *others])
        return python
    wanted = list(_unbounded(oldest=versions == "oldest"))
    _install_torch(pip, next(w for w in wanted if _name(w) == "torch").partition("==")[2])
    _run([*pip, "--build-constraint", str(LOCK), *wanted])
    _run([*pip, "--no-deps", "--build-constraint", str(LOCK), "-e", str(ROOT)])
    return python


def _install_torch(pip: Sequence[str], version: str) -> None:
    """torch of a version, or the newest for an empty one."""
    wanted = f"torch=={version}" if version else "torch"
    if shutil.which("nvidia-smi") is None:
        if version and _succeeds([*pip, f"{wanted}+cpu"]):
            return
        # that index alone: with a second source, pip would take whichever has the newer release
        alone = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")
        }
        if _succeeds(
            [*pip, "--retries", "1", "--index-url", _CPU_INDEX, wanted],
            {**alone, "PIP_CONFIG_FILE": os.devnull},
        ):
            return
    _run([*pip, wanted])


def _succeeds(command: Sequence[str], environment: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, capture_output=True, check=False, env=environment).returncode == 0


def _locked(package: str) -> str:
    """The version that the lock has of a package."""
    found = re.search(rf"^{package}==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    if found is None:
        raise InstallFailed(f"{LOCK.relative_to(ROOT)} has no {package}: run make lock")
    return found.group(1)


def _unbounded(oldest: bool) -> Iterator[str]:
    """Yields the requirements of pyproject.toml, with the packages of `REACHED_INTO` at their lowest versions
    or without bounds.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = [name for name in extras["dev"] if not name.startswith("paceline")]
    for asked in [*project["dependencies"], *extras["deepspeed"], *extras["lora"], *extras["trl"], *own]:
        name = _name(asked)
        if name not in REACHED_INTO:
            yield asked
        elif oldest:
            yield f"{name}=={asked.partition('>=')[2].partition(',')[0]}"
        else:
            yield name


def _name(requirement: str) -> str:
    found = _NAME.match(requirement)
    assert found is not None
    return found.group()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["pip gave no reason"]
        raise InstallFailed(last[0])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versions", default="locked", help="locked, oldest, newest, or package==version,…")
    args = parser.parse_args()
    try:
        make(args.folder, args.versions)
    except InstallFailed as error:
        sys.exit(f"{args.folder}: {error}")


if __name__ == "__main__":
    main()
