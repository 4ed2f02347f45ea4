"""Compiles ``kernels.cpp`` and the headers beside it once for each machine type, into the user's cache.

Plain C symbols called through ctypes: two seconds to build, no torch headers, no ABI to match.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_TIMEOUT_SECONDS = 120


class NativeUnavailable(RuntimeError):
    """The kernels cannot be built here; torch's operators are used instead."""


def build_library() -> Path:
    """The shared library for this machine, built unless it is there.

    Raises:
        NativeUnavailable: without a compiler, or when it fails; one line.
    """
    compiler = next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (path := shutil.which(name))), None
    )
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found: install g++ (or set CXX) for the native decode kernels")
    runtime = _openmp_runtime()
    text = "\0".join(
        (
            *(path.read_text() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]),
            *_FLAGS,
            compiler,
            str(runtime),
            _instruction_sets(),
        )
    )
    target = _cache_directory() / f"kernels-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile(compiler, runtime, target)
    return target


def _compile(compiler: str, runtime: Path | None, target: Path) -> None:
    """Into a temporary file that is renamed: two ranks may build at once, and a killed one leaves nothing half written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *_FLAGS, str(SOURCE), *([str(runtime)] if runtime else []), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
            if result.returncode != 0:
                reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-200:])
                raise NativeUnavailable(f"{compiler} could not build the native decode kernels: {reason.strip()}")
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the native decode kernels could not be built: {error}") from None


def _openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded. A second one would mean a second team of threads, spinning on the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    for line in maps.read_text(encoding="utf-8").splitlines():
        path = Path(line.rpartition(" ")[2])
        if path.name.startswith("libgomp"):
            return path
    return None


def _instruction_sets() -> str:
    """What tells machines with different -march=native apart: a home directory may be shared between them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline" / "native"
