"""Compiles ``kernels.cpp`` and ``gradients.cpp`` once for each instruction set, into the user's cache.

The libraries have plain C symbols that are called through ctypes, without torch headers or an ABI to match.
Each builds in ten to thirty seconds, when it is first needed: only training needs the gradients.

A library runs with the rights of whoever loads it. One from the cache is therefore loaded only if the file
and its directory belong to this user, nobody else can write to them, and the file still has the digest in its
name. Otherwise it is built again: in the cache, or in a temporary directory if the cache is not exclusively
this user's.
"""

from __future__ import annotations

import atexit
import ctypes
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
GRADIENTS_SOURCE = Path(__file__).with_name("gradients.cpp")
# PACELINE_ISA → flags of the compiler, and what the processor must have for them; the best comes last
_BF16 = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
_ISAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "generic": (("-O2",), ()),  # -O3 takes three times as long, for processors that are slow in any case
    "avx2": (("-march=x86-64-v3",), ("avx2", "fma", "bmi2")),
    "avx512": (("-march=x86-64-v4",), ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")),
    "avx512_bf16": (_BF16, ("avx512_bf16", "avx512_vnni")),
    "amx": ((*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), ("amx_tile", "amx_bf16")),
}
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_TIMEOUT_SECONDS = 300  # only a hung compiler takes this long
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)
_privately_built: dict[str, Path] = {}


def instruction_set() -> str:
    """Returns the instruction set that the kernels are built for.

    It is the one that ``PACELINE_ISA`` names, or the best that the processor has; on processors other than
    x86-64 it is ``native``, whatever the compiler finds there.

    Raises:
        ValueError: The name is unknown, or this processor lacks something that the set needs.
    """
    runnable = runnable_instruction_sets()
    name = os.environ.get("PACELINE_ISA", "native")
    if name == "native":
        return runnable[-1] if platform.machine() == "x86_64" else "native"
    if name not in _ISAS:
        raise ValueError(f"PACELINE_ISA is {name!r}: write one of native, {', '.join(_ISAS)}")
    if name not in runnable:
        features = _processor_features().split()
        missing = next(feature for feature in _needs(name) if feature not in features)
        raise ValueError(
            f"PACELINE_ISA is {name}, but this processor has no {missing}: write another, or unset it"
        )
    return name


def runnable_instruction_sets() -> list[str]:
    """Returns the instruction sets that ``PACELINE_ISA`` may name on this processor; the best is the last."""
    features = _processor_features().split()
    return [name for name in _ISAS if all(feature in features for feature in _needs(name))]


def _needs(name: str) -> list[str]:
    """Returns what a processor must have for an instruction set and for those before it."""
    names = list(_ISAS)
    return [feature for earlier in names[: names.index(name) + 1] for feature in _ISAS[earlier][1]]


class NativeUnavailable(RuntimeError):
    """Signals that the kernels cannot be built here; torch operators are used instead."""


def open_library(source: Path = SOURCE) -> ctypes.CDLL:
    """Returns the loaded library of a source, see `build_library`.

    Raises:
        NativeUnavailable: It cannot be built or loaded; the message is one line.
    """
    try:
        return ctypes.CDLL(str(build_library(source)))
    except OSError as error:
        raise NativeUnavailable(f"the native decode kernels could not be loaded: {error}") from None


def build_library(source: Path = SOURCE) -> Path:
    """Returns the shared library of a source for this processor, and builds it if the cache has none.

    Without a usable cache it is built for this process alone.

    Args:
        source: ``SOURCE`` or ``GRADIENTS_SOURCE``.

    Raises:
        NativeUnavailable: There is no compiler, or it fails; the message is one line.
    """
    compiler = next(
        (path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))),
        None,
    )
    if compiler is None:
        raise NativeUnavailable(
            "no C++ compiler was found: install g++ (or set CXX) for the native decode kernels"
        )
    runtime = _openmp_runtime()
    name = f"{source.stem}-{_key(source, compiler, runtime)}"
    try:
        directory = _cache_directory()
        return _cached(directory, name) or _compile(source, compiler, runtime, directory, name)
    except OSError as error:
        return _build_privately(source, compiler, runtime, name, str(error))


def _build_privately(source: Path, compiler: str, runtime: Path | None, name: str, reason: str) -> Path:
    """Returns a library in a temporary directory that is removed when the process exits.

    It is built once per process, with one logged warning.

    Args:
        source: Source of the library.
        compiler: Path of the compiler.
        runtime: OpenMP library to link, or None.
        name: Name of the library in the cache.
        reason: Reason why the cache cannot be used, for the warning.
    """
    if name not in _privately_built:
        _log.warning(
            "the native decode kernels are built for this process alone: their cache cannot be used (%s)",
            reason,
        )
        try:
            folder = tempfile.mkdtemp(prefix="paceline-native-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _privately_built[name] = _compile(source, compiler, runtime, Path(folder), name)
        except OSError as error:
            raise NativeUnavailable(f"the native decode kernels could not be built: {error}") from None
    return _privately_built[name]


def _key(source: Path, compiler: str, runtime: Path | None) -> str:
    """Returns a hash of what a library is built from.

    A cache may be shared between machines: one library serves all those with its instruction set.
    """
    sources = [path.read_text() for path in [source, *sorted(source.parent.glob("*.h"))]]
    machine = _processor_features() if instruction_set() == "native" else instruction_set()
    text = "\0".join((*sources, *_flags(), compiler, str(runtime), machine))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    name = instruction_set()
    return *_FLAGS, *(("-march=native",) if name == "native" else _ISAS[name][0])


def _cache_directory() -> Path:
    """Returns the cache directory and creates it if it is missing.

    Raises:
        PermissionError: It does not belong to this user, or others can write to it.
        OSError: It cannot be created.
    """
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline" / "native"
    except RuntimeError as error:  # a user without a home directory
        raise FileNotFoundError(str(error)) from None
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    problem = _ownership_problem(directory)
    if problem is not None:
        raise PermissionError(problem)
    return directory


def _ownership_problem(path: Path) -> str | None:
    """Returns why a file or directory may hold what another user put there, or None."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid():
        return f"{path} does not belong to this user: remove it, or set XDG_CACHE_HOME"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"others can write to {path}: run chmod go-w on it, or set XDG_CACHE_HOME"
    return None


def _cached(directory: Path, name: str) -> Path | None:
    """Returns an intact library of this name, or None; removes broken ones.

    Raises:
        PermissionError: A library does not belong to this user, or others can write to it.
    """
    for path in sorted(directory.glob(f"{name}-*.so")):
        problem = _ownership_problem(path)
        if problem is not None:
            raise PermissionError(problem)
        if path.stem.rpartition("-")[2] == _digest(path):
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    """Returns the first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(source: Path, compiler: str, runtime: Path | None, directory: Path, name: str) -> Path:
    """Compiles the library into a temporary file and renames it.

    Two ranks may therefore build at once, and a killed one leaves no partial file behind.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        library = Path(folder) / "kernels.so"
        command = [compiler, *_flags(), str(source), *([str(runtime)] if runtime else []), "-o", str(library)]
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
        library.chmod(0o700)
        return library.rename(directory / f"{name}-{_digest(library)}.so")


def _openmp_runtime() -> Path | None:
    """Returns the OpenMP library that torch has loaded, or None.

    A second one would start a second team of threads, which would spin on the same cores.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    for line in maps.read_text(encoding="utf-8").splitlines():
        path = Path(line.rpartition(" ")[2])
        if path.name.startswith("libgomp"):
            return path
    return None


def _processor_features() -> str:
    """Returns what Linux says that this processor has, or its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
