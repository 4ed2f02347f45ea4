"""Prepares what a run starts from: the policy, downloaded and warmed up, and a first drafter.

Preparation happens before the ranks form a process group. Each result is created once, by one of the
processes that need it, and cached. If a preparation was interrupted, running the same command again creates
what is still missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from paceline.rl.config.run import RunConfig, to_dict
from paceline.rl.drafting.warmup import WarmupReport, warm_drafter
from paceline.rl.errors import UserError
from paceline.rl.learner.sft_warmup import make_warmed_policy
from paceline.rl.models.initial import warmed_policy_path
from paceline.rl.models.policies import cache_dir, cached_policy, fetch_policy
from paceline.rl.process.invocation import command_line
from paceline.rl.process.made_once import build_once, file_lock, rename_into_place
from paceline.rl.process.process_tuning import threads_of_rank
from paceline.rl.process.progress import Display

_RANK_VARIABLES = (  # removed, because a preparing process is not a rank
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_USER_ERROR_STATUS = 2  # the process has already printed the user's error


def wants_first_drafter(config: RunConfig) -> bool:
    """Returns whether a recipe has a drafter created before the run."""
    drafter, speculation = config.drafter, config.speculation
    speculates = "eagle3" in speculation.drafters and speculation.strategy != "plain"
    return speculates and drafter.start is None and drafter.warmup_minutes is not None


def first_drafter_path(config: RunConfig) -> Path:
    """Returns the cache directory of a recipe's first drafter.

    The name depends on the policy and on every key that affects the drafter.
    """
    drafter = {
        k: v
        for k, v in asdict(config.drafter).items()
        if k not in ("start", "schedule", "snapshots", "least_idle_ranks", "max_slowdown")
    }
    parts = [asdict(config.policy), asdict(config.task), asdict(config.rollout), drafter, config.seed]
    directory = Path(config.policy.model)
    if directory.is_dir():  # the weights in it may change
        parts.append(
            [
                (f.name, f.stat().st_size, f.stat().st_mtime_ns)
                for f in sorted(directory.glob("*.safetensors"))
            ]
        )
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    name = directory.name if directory.is_dir() else config.policy.model.replace("/", "--")
    return cache_dir() / "drafters" / f"{name}-{digest}"


def prepare(config: RunConfig, display: Display, drafter: bool = True) -> RunConfig:
    """Creates what the recipe's run starts from and is not cached yet.

    Every rank of a machine may call it: one of them does the work, the others wait.

    Args:
        config: The recipe.
        display: Display that shows which other process is waited for.
        drafter: Whether to prepare a first drafter; a resumed run has its own.

    Returns:
        The recipe, with ``drafter.start`` set if a first drafter was prepared.

    Raises:
        UserError: The policy cannot be downloaded, or the preparing process failed unexpectedly.
        SystemExit: The preparing process has already printed a user's error, or Ctrl-C was pressed.
    """
    if cached_policy(config.policy.model) is None:
        activity = f"downloading the policy {config.policy.model}"
        with (
            file_lock(cache_dir() / "models" / "fetch.lock", display.say),
            display.phase(activity, announced=True),
        ):
            fetch_policy(config.policy.model)
    if config.policy.warmup is not None:
        build_once(warmed_policy_path(config), lambda: _prepare_in_subprocess("policy", config), display.say)
    if not drafter or not wants_first_drafter(config):
        return config
    path = build_once(
        first_drafter_path(config), lambda: _prepare_in_subprocess("drafter", config), display.say
    )
    return replace(config, drafter=replace(config.drafter, start=str(path)))


def _prepare_in_subprocess(what: str, config: RunConfig) -> None:
    """Prepares a policy or a drafter in a subprocess.

    The subprocess uses all cores of the machine, and its memory is freed when it ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(json.dumps(to_dict(config)))
        command = [
            sys.executable,
            "-m",
            "paceline.rl.preparation_process",
            what,
            str(recipe),
            command_line(),
            str(os.getpid()),
        ]
        job = subprocess.Popen(command, env=_subprocess_environment(os.environ))
        try:
            status = job.wait()
        except KeyboardInterrupt:  # a terminal sends it to both processes
            job.terminate()
            job.wait()
            raise SystemExit(128 + signal.SIGINT) from None
    if status == _USER_ERROR_STATUS:
        raise SystemExit(status)
    if status:
        how = (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
        )
        raise UserError(f"preparing the {what} {how}; run the same command again to continue")


def _subprocess_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that is not a rank but uses the cores of all of this machine's."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    kept = {
        k: v for k, v in environment.items() if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")
    }
    return {**kept, "OMP_NUM_THREADS": str(threads_of_rank(ranks) * ranks)}


def make_policy(config: RunConfig, display: Display) -> None:
    """Warms up the recipe's policy, with a progress bar.

    The caller makes sure that no other process does so at the same time.
    """
    assert config.policy.warmup is not None
    steps = config.policy.warmup.examples // config.policy.warmup.batch_size
    with display.phase("warming up the policy", steps, "steps", announced=True) as phase:
        make_warmed_policy(config, lambda step, steps, loss: phase.update(step, f"loss {loss:.3f}", steps))


def make_first_drafter(config: RunConfig, command: str, display: Display) -> None:
    """Creates the recipe's first drafter in the cache, with a progress bar.

    The caller makes sure that no other process does so at the same time.
    """
    assert config.drafter.warmup_minutes is not None
    final = first_drafter_path(config)
    with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
        building = Path(scratch) / "drafter"
        make_drafter(config, config.drafter.warmup_minutes, building, command, display)
        rename_into_place(building, final)


def make_drafter(
    config: RunConfig, minutes: float, out: Path, command: str, display: Display
) -> WarmupReport:
    """Creates a drafter for the recipe's policy, with a progress bar.

    The results are also written to ``warmup.json`` in its directory.

    Args:
        config: The recipe.
        minutes: Time for sampling and training.
        out: New directory for the drafter.
        command: Command that the user typed, for the record.
        display: Display of the progress.
    """
    with display.phase(
        "training a first drafter on the policy's own samples", 60 * minutes, "s", announced=True
    ) as phase:
        report = warm_drafter(config, minutes, out, phase.update)
    record = {"command": command, **asdict(report)}
    (out / "warmup.json").write_text(json.dumps(record, indent=2) + "\n")
    display.say(
        f"{report.sampling_seconds:.0f} s of sampling, {report.training_seconds:.0f} s of training, "
        f"{report.updates} updates; acceptance length with chains of 4: {report.greedy:.2f} greedy, "
        f"{report.sampled:.2f} at temperature {config.rollout.temperature}"
    )
    return report


def check_same_start(config: RunConfig, accelerator: Accelerator) -> None:
    """Checks that all machines start from the same warmed-up policy and drafter. Collective.

    Raises:
        UserError: Machines without a shared cache have each created their own.
    """
    starts = [] if config.policy.warmup is None else [warmed_policy_path(config)]
    starts += [] if config.drafter.start is None else [Path(config.drafter.start)]
    # the recorded times, to the microsecond, distinguish any two warm-ups
    reports = [(path / "warmup.json").read_text() for path in starts if (path / "warmup.json").is_file()]
    if len({json.dumps(texts) for texts in gather_object([reports])}) > 1:
        raise UserError(
            "PACELINE_CACHE is not shared, and machines have created different warm-ups: set it to a "
            "directory that all machines see"
        )
