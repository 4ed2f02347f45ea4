"""Runs the README's two commands as on a new machine: ``python tests/fresh.py``.

What is committed is cloned into an empty directory, and the home directory is empty, too: there is no cache
of pip, of the hub, of policies or of compiled kernels. Settings of package sources stay.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LEFT_OUT = (
    "PACELINE_CACHE",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "PIP_CACHE_DIR",
    "MAKEFLAGS",
)


def run(targets: Sequence[str], folder: Path) -> bool:
    """Runs make targets in a new clone, each whatever the one before said, and prints how long they took.

    Args:
        targets: Names of targets.
        folder: An empty directory.

    Returns:
        Whether all of them succeeded.
    """
    clone, home = folder / "paceline", folder / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    environment["HOME"] = str(home)
    took = []
    for target in targets:
        begin = time.monotonic()
        status = subprocess.run(["make", target], cwd=clone, env=environment, check=False).returncode
        took.append((target, status, time.monotonic() - begin))
    print("\nin an empty clone with an empty home")
    for target, status, seconds in took:
        print(
            f"make {target}: {'succeeded' if status == 0 else f'failed with status {status}'} in "
            f"{seconds / 60:.1f} min"
        )
    return not any(status for _, status, _ in took)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=["quickstart", "test"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paceline-fresh-") as folder:
        sys.exit(0 if run(args.targets, Path(folder)) else 1)


if __name__ == "__main__":
    main()
