"""Builds the kernels for processors that are not this one, and runs them in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

from paceline.rollout.native import build

_CHECK = Path(__file__).with_name("rows_alone.cpp")
_ARM_LIBRARIES = "/usr/aarch64-linux-gnu"


def checked(folder, compiler, flags, runner=()):
    """Returns what the program prints that checks the products."""
    program = folder / "rows_alone"
    include = f"-I{build.SOURCE.parent}"
    sources = [flag for flag in build._FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run([compiler, *sources, *flags, include, str(_CHECK), "-o", str(program)], check=True)
    return subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
def test_rows_on_arm(tmp_path):
    """Debian has both programs in g++-aarch64-linux-gnu and qemu-user."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    said = checked(tmp_path, compiler, ["-march=armv8-a"], [emulator, "-L", _ARM_LIBRARIES])
    assert said == "0 wrong, parts of 16 bytes\n"
