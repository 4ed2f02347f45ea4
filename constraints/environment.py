"""Makes a virtual environment with Paceline and what its tests need:
``python constraints/environment.py FOLDER``. With ``--over BASE`` it makes one that sees the packages of
another.

Only the standard library is used, so that any Python from 3.11 on can run it. torch comes in its CPU build
where the machine has no
NVIDIA GPU: from the configured package sources, else from PyTorch's own index, else whatever PyPI has for the
    platform.
"""

from __future__ import annotations

import argparse
import json
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
# Python compiles a module when it is first imported; to compile all of them takes pip a minute
_OPTIONS = ("--quiet", "--disable-pip-version-check", "--no-compile")
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
    pip = [str(python), "-m", "pip", "install", *_OPTIONS]
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


def make_over(folder: Path, base: Path, wanted: Sequence[str]) -> Path:
    """Makes an environment over another one's packages, with its torch.

    Args:
        folder: Directory of the environment.
        base: Directory of the environment whose packages it sees.
        wanted: Requirements to install, with what they need in other versions than the base has.

    Returns:
        The environment's Python.

    Raises:
        InstallFailed: with pip's last line.
    """
    python, pip = _layer(folder, base)
    _run([*pip, f"torch=={installed(python)['torch']}", *wanted])
    return python


def make_newest_over(folder: Path, base: Path) -> Path:
    """Makes an environment with the newest transformers, trl, peft and accelerate over another one's rest.

    Beside them, only what they need newer is installed. torch is renewed in its CPU build or stays: other
    builds are gigabytes. For arguments, result and errors see `make_over`.
    """
    python, pip = _layer(folder, base)
    pip.append("--upgrade")
    if not _install_cpu_torch(pip, "torch"):
        pip.append(f"torch=={installed(python)['torch']}")
    _run([*pip, *(name for name in REACHED_INTO if name != "torch")])
    return python


def _layer(folder: Path, base: Path) -> tuple[Path, list[str]]:
    """Makes an empty environment that sees the base's packages; returns its Python and pip's command."""
    venv.create(folder, clear=True)
    python = folder / "bin" / "python"
    packages = next((base / "lib").glob("python*/site-packages")).resolve()
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "over.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    return python, [str(base / "bin" / "python"), "-m", "pip", "--python", str(python), "install", *_OPTIONS]


def installed(python: Path) -> dict[str, str]:
    """Returns the versions of the packages of `REACHED_INTO` in an environment, given its Python."""
    script = (
        f"import importlib.metadata as m, json; "
        f"print(json.dumps({{n: m.version(n) for n in {REACHED_INTO}}}))"
    )
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _install_torch(pip: Sequence[str], version: str) -> None:
    """torch of a version, or the newest for an empty one."""
    wanted = f"torch=={version}" if version else "torch"
    if shutil.which("nvidia-smi") is None:
        if version and _succeeds([*pip, f"{wanted}+cpu"]):
            return
        if _install_cpu_torch(pip, wanted):
            return
    _run([*pip, wanted])


def _install_cpu_torch(pip: Sequence[str], wanted: str) -> bool:
    """From PyTorch's index alone: with a second source, pip would take whichever has the newer release."""
    alone = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")
    }
    command = [*pip, "--retries", "1", "--timeout", "30", "--index-url", _CPU_INDEX, wanted]
    return _succeeds(command, {**alone, "PIP_CONFIG_FILE": os.devnull})


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
    parser.add_argument("wanted", nargs="*", help="with --over: requirements to install")
    parser.add_argument("--versions", default="locked", help="locked, oldest, newest, or package==version,…")
    parser.add_argument("--over", type=Path, help="environment whose packages this one sees")
    args = parser.parse_intermixed_args()
    if (args.over is None) == bool(args.wanted):
        parser.error("requirements and --over go together: write both or neither")
    try:
        if args.over is None:
            make(args.folder, args.versions)
        else:
            make_over(args.folder, args.over, args.wanted)
    except InstallFailed as error:
        sys.exit(f"{args.folder}: {error}")


if __name__ == "__main__":
    main()
