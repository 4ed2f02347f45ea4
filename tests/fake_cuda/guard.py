"""A device guard for CUDA in a CPU build of torch, which has none and therefore refuses the device's name."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct PretendedGuard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
};
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)
}
"""


@functools.cache
def install_guard() -> None:
    """Registers a guard that does nothing, compiled on the first call on a machine."""
    name = hashlib.sha256(f"{_SOURCE}{torch.__version__}{torch.__file__}".encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"paceline-fake-cuda-{os.getuid()}-{name}.so"
    if not built.is_file():
        root, new = Path(torch.__file__).parent, built.with_suffix(f".{os.getpid()}")
        source = new.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(_SOURCE)
        subprocess.run(
            ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include", str(source), "-o", str(new),
             f"-L{root}/lib", "-Wl,--no-as-needed", "-lc10"],
            check=True,
        )  # fmt: skip
        source.unlink()
        new.replace(built)
    ctypes.CDLL(str(built))
