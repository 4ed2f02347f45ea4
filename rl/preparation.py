"""What a run starts from, made before its ranks meet: the policy fetched and warmed up, a first drafter.

Each is made once, by one process of those that want it, and kept in the cache. A preparation that was stopped
goes on with what is not there yet when the same command is given again.
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

_OF_A_RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_USER_ERROR = 2  # exit status of a process that has printed a user's error


def wants_first_drafter(config: RunConfig) -> bool:
    """Tells whether a recipe has a drafter made before the run."""
    drafter, speculation = config.drafter, config.speculation
    speculates = "eagle3" in speculation.drafters and speculation.strategy != "plain"
    return speculates and drafter.start is None and drafter.warmup_minutes is not None


def first_drafter_path(config: RunConfig) -> Path:
    """Where the first drafter of a recipe is cached: a function of the policy it is made for and of all that
    shapes it.
    """
    drafter = {
        k: v
        for k, v in asdict(config.drafter).items()
        if k not in ("start", "schedule", "snapshots", "least_idle_ranks")
    }
    parts = [asdict(config.policy), asdict(config.task), asdict(config.rollout), drafter, config.seed]
    own = Path(config.policy.model)
    if own.is_dir():  # other weights may come to lie there
        parts.append(
            [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(own.glob("*.safetensors"))]
        )
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    return (
        cache_dir()
        / "drafters"
        / f"{own.name if own.is_dir() else config.policy.model.replace('/', '--')}-{digest}"
    )


def prepare(config: RunConfig, display: Display, drafter: bool = True) -> RunConfig:
    """Makes what the recipe's run starts from, where it is not there yet. Every rank of a machine may call
    it: one makes, others wait.

    Args:
        config: The recipe.
        display: Where another process that is waited for is said.
        drafter: Whether a first drafter is wanted; a run that goes on has its own.

    Returns:
        The recipe, with ``drafter.start`` where a first drafter was wanted.

    Raises:
        UserError: when the policy cannot be fetched, or the process that prepares something fails for another
            reason than a user's error.
        SystemExit: when that process has already printed a user's error, or after a Ctrl-C.
    """
    if cached_policy(config.policy.model) is None:
        doing = f"fetching the policy {config.policy.model}"
        with (
            file_lock(cache_dir() / "models" / "fetch.lock", display.say),
            display.phase(doing, announced=True),
        ):
            fetch_policy(config.policy.model)
    if config.policy.warmup is not None:
        build_once(warmed_policy_path(config), lambda: _in_a_process("policy", config), display.say)
    if not drafter or not wants_first_drafter(config):
        return config
    path = build_once(first_drafter_path(config), lambda: _in_a_process("drafter", config), display.say)
    return replace(config, drafter=replace(config.drafter, start=str(path)))


def _in_a_process(what: str, config: RunConfig) -> None:
    """Makes one thing in a process of its own, which has all cores of the machine and gives its memory
    back.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(json.dumps(to_dict(config)))
        command = [
            sys.executable,
            "-m",
            "paceline.cli.preparing",
            what,
            str(recipe),
            command_line(),
            str(os.getpid()),
        ]
        job = subprocess.Popen(command, env=_environment(os.environ))
        try:
            status = job.wait()
        except KeyboardInterrupt:  # which a terminal sends to both
            job.terminate()
            job.wait()
            raise SystemExit(128 + signal.SIGINT) from None
    if status == _USER_ERROR:
        raise SystemExit(status)
    if status:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
        raise UserError(f"making the first {what} {how}; the same command goes on with it")


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that is not a rank and uses the cores of all ranks on this
    machine.
    """
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    left = {k: v for k, v in environment.items() if k not in _OF_A_RANK and not k.startswith("TORCHELASTIC_")}
    return {**left, "OMP_NUM_THREADS": str(threads_of_rank(ranks) * ranks)}


def make_policy(config: RunConfig, display: Display) -> None:
    """Warms the recipe's policy up, with a progress bar. The caller makes sure that no other process does
    so.
    """
    assert config.policy.warmup is not None
    steps = config.policy.warmup.examples // config.policy.warmup.batch_size
    with display.phase("warming the policy up", steps, "steps", announced=True) as phase:
        make_warmed_policy(config, lambda step, steps, loss: phase.update(step, f"loss {loss:.3f}", steps))


def make_first_drafter(config: RunConfig, command: str, display: Display) -> None:
    """Makes the recipe's first drafter in the cache, with a progress bar. The caller makes sure that no other
    process does so.
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
    """Makes a drafter for the recipe's policy in a new directory, with a progress bar; ``warmup.json`` there
    holds the results.
    """
    with display.phase(
        "a first drafter, from the policy's own samples", 60 * minutes, "s", announced=True
    ) as phase:
        report = warm_drafter(config, minutes, out, phase.update)
    record = {"command": command, **asdict(report)}
    (out / "warmup.json").write_text(json.dumps(record, indent=2) + "\n")
    display.say(
        f"{report.sampling_seconds:.0f} s of sampling, {report.training_seconds:.0f} s of training, "
        f"{report.updates} updates; "
        f"acceptance length, chains of 4: {report.greedy:.2f} greedy, {report.sampled:.2f} at "
        f"{config.rollout.temperature}"
    )
    return report


def check_same_start(config: RunConfig, accelerator: Accelerator) -> None:
    """Makes sure that all machines have started from the same warmed-up policy and drafter. Collective.

    Raises:
        UserError: where machines with caches of their own have each made one.
    """
    made = [] if config.policy.warmup is None else [warmed_policy_path(config)]
    made += [] if config.drafter.start is None else [Path(config.drafter.start)]
    # what a warm-up took, to the microsecond, tells it from any other
    mine = [(path / "warmup.json").read_text() for path in made if (path / "warmup.json").is_file()]
    if len({json.dumps(texts) for texts in gather_object([mine])}) > 1:
        raise UserError(
            "machines have made warm-ups of their own, which differ: set PACELINE_CACHE to a directory that "
            "all of them see"
        )
