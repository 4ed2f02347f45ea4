"""Builds the kernels for a processor that is not this one, and runs them in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

from paceline.rollout.native import build


@pytest.mark.slow
def test_rows_on_arm(tmp_path):
    """Debian has both programs in g++-aarch64-linux-gnu and qemu-user."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    program, source = tmp_path / "rows_alone", Path(__file__).with_name("rows_alone.cpp")
    flags = [flag for flag in build._FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(
        [compiler, *flags, "-march=armv8-a", f"-I{build.SOURCE.parent}", source, "-o", program], check=True
    )
    ran = subprocess.run(
        [emulator, "-L", "/usr/aarch64-linux-gnu", program], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "0 wrong, parts of 16 bytes\n"
