"""Drafters: made before a run, exported and served after it."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from drafter_trainer.checkpoint import DrafterError
from drafter_trainer.export import export_drafter
from rl.cli import Overrides, user_errors
from rl.command_line import command_line
from rl.config import load_config
from rl.drafter_warmup import warm_drafter
from rl.errors import UserError
from rl.machine import fit_process
from rl.warmup import warm_up
from rollout.backends.vllm_server import serve_command, sglang_command


def warm_up_drafter(
    config: Annotated[str, Argument(help="a recipe")],
    out: Annotated[Path, Argument(help="new directory")],
    overrides: Overrides = None,
    minutes: Annotated[float, Option(help="of sampling and training together")] = 10.0,
) -> None:
    """Makes a first drafter for a recipe's policy. Start a run from it with drafter.start=OUT; OUT/warmup.json says how long it
    took and what acceptance it reached."""
    with user_errors():
        if out.exists():
            raise UserError(f"{out}: exists; name a new directory")
        recipe = load_config(config, overrides or ())
        fit_process(local_world_size=1)
        if recipe.policy.warmup is not None:
            warm_up(recipe)
        report = warm_drafter(recipe, minutes, out, lambda line: print(line, flush=True))
        record = {"command": command_line(), **asdict(report)}
        (out / "warmup.json").write_text(json.dumps(record, indent=2) + "\n")
        print(
            f"{report.sampling_seconds:.0f} s of sampling, {report.training_seconds:.0f} s of training, {report.updates} updates; "
            f"acceptance length, chains of 4: {report.greedy:.2f} greedy, {report.sampled:.2f} at {recipe.rollout.temperature}"
        )
        print(out)


def export(run: Annotated[Path, Argument(help="directory of a run")], out: Annotated[Path, Argument(help="new directory")]) -> None:
    """Writes a run's drafter as a directory that vLLM and SGLang load."""
    with user_errors():
        try:
            print(export_drafter(run, out))
        except DrafterError as error:
            raise UserError(str(error)) from None


def serve(
    run: Annotated[Path, Argument(help="directory of a finished run")],
    port: Annotated[int, Option(help="of the server")] = 8000,
    depth: Annotated[int, Option(help="draft tokens of a step")] = 4,
    schedule: Annotated[str, Option(help='draft tokens by batch size, such as "[[1,8,4],[9,64,0]]"; all alike where none')] = "[]",
    vllm: Annotated[str, Option(help="vLLM's command, where it is not on the path")] = "vllm",
    sglang: Annotated[bool, Option("--sglang", help="print SGLang's command instead; it has not been run")] = False,
    show: Annotated[bool, Option("--print", help="print the command and do not run it")] = False,
    more: Annotated[list[str] | None, Argument(help="after --: further arguments of the server")] = None,
) -> None:
    """Serves a run's policy with its drafter by vLLM, ready for new weights from a trainer (rollout.vllm.servers)."""
    with user_errors():
        policy, drafter = run / "checkpoint" / "policy", run / "drafter"
        if not policy.is_dir():
            raise UserError(f"{policy}: not there; name the directory of a finished run")
        if not drafter.is_dir():
            raise UserError(f"{drafter}: not there; write it with paceline export {run} {drafter}")
        if sglang:
            print(shlex.join(sglang_command(policy, drafter, depth, port, more or ())))
            return
        try:
            steps = [(int(a), int(b), int(c)) for a, b, c in json.loads(schedule)]
        except (ValueError, TypeError):
            raise UserError(f"--schedule {schedule!r}: write [[from, to, tokens], ...], for example [[1,8,4],[9,64,0]]") from None
        context = json.loads((run / "config.json").read_text())["rollout"]["max_context"]
        command = serve_command(
            policy, drafter=drafter, depth=depth, schedule=steps, port=port, max_context=max(context, 2048), more=more or ()
        )
        print("VLLM_SERVER_DEV_MODE=1", shlex.join([vllm, *command[1:]]), flush=True)
        if not show:
            try:
                os.execvpe(vllm, [vllm, *command[1:]], {**os.environ, "VLLM_SERVER_DEV_MODE": "1"})
            except FileNotFoundError:
                raise UserError(
                    f"{vllm}: there is no such command; make peers sets it up, then --vllm .venv-peers/bin/vllm"
                ) from None
