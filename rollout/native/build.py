"""Compiles ``kernels.cpp`` and the headers beside it once for each machine type, into the user's cache.

Plain C symbols called through ctypes: two seconds to build, no torch headers, no ABI to match.

A library runs with the rights of whoever loads it. One from the cache is loaded only where the file and its
directory belong to this user and nobody else can write to them, and where the file still has the digest that
its name carries; otherwise it is built anew, in the cache or, where that is not this user's alone, in a
temporary directory.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_TIMEOUT_SECONDS = 120
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)
_privately_built: dict[str, Path] = {}


class NativeUnavailable(RuntimeError):
    """The kernels cannot be built here; torch's operators are used instead."""


def build_library() -> Path:
    """The shared library for this machine, built unless the cache has it; without a usable cache, for this
    process alone.

    Raises:
        NativeUnavailable: without a compiler, or when it fails; one line.
    """
    compiler = next(
        (
            path
            for name in (os.environ.get("CXX"), "g++", "clang++", "c++")
            if name and (path := shutil.which(name))
        ),
        None,
    )
    if compiler is None:
        raise NativeUnavailable(
            "no C++ compiler was found: install g++ (or set CXX) for the native decode kernels"
        )
    runtime = _openmp_runtime()
    key = _key(compiler, runtime)
    try:
        directory = _own_directory()
        return _cached(directory, key) or _compile(compiler, runtime, directory, key)
    except OSError as error:
        return _private(compiler, runtime, key, str(error))


def _private(compiler: str, runtime: Path | None, key: str, reason: str) -> Path:
    """A library in a directory of this process's own, built once and removed at its end; ``reason`` is said
    once.
    """
    if key not in _privately_built:
        _log.warning(
            "the native decode kernels are built for this process alone, their cache cannot be used: %s",
            reason,
        )
        try:
            folder = tempfile.mkdtemp(prefix="paceline-native-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _privately_built[key] = _compile(compiler, runtime, Path(folder), key)
        except OSError as error:
            raise NativeUnavailable(f"the native decode kernels could not be built: {error}") from None
    return _privately_built[key]


def _key(compiler: str, runtime: Path | None) -> str:
    """What a library was built from, by whom and for which machine."""
    sources = [path.read_text() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]]
    text = "\0".join((*sources, *_FLAGS, compiler, str(runtime), _instruction_sets()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _own_directory() -> Path:
    """The cache's directory, made where it is missing.

    Raises:
        PermissionError: where it is not this user's, or others can write to it.
        OSError: where it cannot be made.
    """
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline" / "native"
    except RuntimeError as error:  # a user without a home directory
        raise FileNotFoundError(str(error)) from None
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    problem = _not_ours(directory)
    if problem is not None:
        raise PermissionError(problem)
    return directory


def _not_ours(path: Path) -> str | None:
    """Why a file or directory may hold what another user put there, or None."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
        return f"{path} is not this user's: remove it, or set XDG_CACHE_HOME"
    if found.st_mode & _OTHERS_WRITE:
        return f"others can write to {path}: chmod go-w it, or set XDG_CACHE_HOME"
    return None


def _cached(directory: Path, key: str) -> Path | None:
    """A whole library of that key; broken ones are removed, others' are an error."""
    for path in sorted(directory.glob(f"kernels-{key}-*.so")):
        problem = _not_ours(path)
        if problem is not None:
            raise PermissionError(problem)
        if path.stem.rpartition("-")[2] == _digest(path):
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(compiler: str, runtime: Path | None, directory: Path, key: str) -> Path:
    """Into a temporary file that is renamed: two ranks may build at once, and a killed one leaves nothing
    half written.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        made = Path(folder) / "kernels.so"
        command = [compiler, *_FLAGS, str(SOURCE), *([str(runtime)] if runtime else []), "-o", str(made)]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailable(f"the native decode kernels could not be built: {error}") from None
        if result.returncode != 0:
            reason = next(
                (line for line in result.stderr.splitlines() if "error" in line), result.stderr[-200:]
            )
            raise NativeUnavailable(f"{compiler} could not build the native decode kernels: {reason.strip()}")
        made.chmod(0o700)
        return made.rename(directory / f"kernels-{key}-{_digest(made)}.so")


def _openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded. A second one would mean a second team of threads, spinning on
    the same cores.
    """
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
