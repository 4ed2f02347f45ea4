"""Drafters: made before a run, exported and served after it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from paceline.cli.common import Overrides
from paceline.rl.errors import UserError, user_errors
from paceline.rl.process.console import announce
from paceline.rl.process.invocation import command_line


def warm_up_drafter(
    config: Annotated[str, Argument(help="a recipe")],
    out: Annotated[Path, Argument(help="new directory")],
    overrides: Overrides = None,
    minutes: Annotated[float, Option(help="of sampling and training together")] = 10.0,
) -> None:
    """Makes a first drafter for a recipe's policy. Start a run from it with drafter.start=OUT;
    OUT/warmup.json says how long it took and what acceptance it reached.
    """
    with user_errors():
        if out.exists():
            raise UserError(f"{out}: exists; name a new directory")
        announce(f"a first drafter for {config}: loading torch and transformers")
        from paceline.rl.preparation import make_drafter, prepare
        from paceline.rl.process.process_tuning import fit_process
        from paceline.rl.process.progress import Display
        from paceline.rl.recipe import load_config

        recipe = load_config(config, overrides or ())
        fit_process(local_world_size=1)
        with Display() as display:
            prepare(recipe, display, drafter=False)
            make_drafter(recipe, minutes, out, command_line(), display)
        print(out)


def export(
    run: Annotated[Path, Argument(help="directory of a run")],
    out: Annotated[Path, Argument(help="new directory")],
) -> None:
    """Writes a run's drafter as a directory that vLLM and SGLang load."""
    announce("exporting the drafter: loading torch", data=True)
    from paceline.drafter_trainer.storage.export import export_drafter

    with user_errors():
        print(export_drafter(run, out))


def serve(
    run: Annotated[Path, Argument(help="directory of a finished run")],
    host: Annotated[
        str, Option(help="address to listen on; 0.0.0.0 for every network that this machine is in")
    ] = "127.0.0.1",
    port: Annotated[int, Option(help="of the server")] = 8000,
    exchange: Annotated[
        Path | None,
        Option(
            help="take new weights from a trainer, through this directory alone: its rollout.vllm.exchange"
        ),
    ] = None,
    depth: Annotated[int, Option(help="draft tokens of a step")] = 4,
    schedule: Annotated[
        str, Option(help='draft tokens by batch size, such as "[[1,8,4],[9,64,0]]"; all alike where none')
    ] = "[]",
    vllm: Annotated[str, Option(help="vLLM's command, where it is not on the path")] = "vllm",
    sglang: Annotated[
        bool, Option("--sglang", help="print SGLang's command instead; it has not been run")
    ] = False,
    show: Annotated[bool, Option("--print", help="print the command and do not run it")] = False,
    more: Annotated[list[str] | None, Argument(help="after --: further arguments of the server")] = None,
) -> None:
    """Serves a run's policy by vLLM, with its drafter where the run has one; with --exchange it takes new
    weights from a trainer (rollout.vllm.servers).
    """
    with user_errors():
        policy, context = _served(run)
        drafter: Path | None = run / "drafter"
        if not (run / "drafter").is_dir():
            drafter = None
            print(f"paceline: {run / 'drafter'} is not there: serving without drafts", flush=True)
        announce("starting the server", data=True)
        from paceline.drafter_trainer.storage.checkpoint import load_drafter_of
        from paceline.rollout.backends.vllm_server import serve_command, sglang_command

        if drafter is not None:
            load_drafter_of(drafter, policy)  # what is wrong with it is said here, not by the server
        if sglang:
            print(shlex.join(sglang_command(policy, drafter, depth, host, port, more or ())))
            return
        command = serve_command(
            policy,
            drafter=drafter,
            depth=depth,
            schedule=_schedule(schedule),
            host=host,
            port=port,
            max_context=max(context, 2048),
            updates=exchange is not None,
            more=more or (),
        )
        _start([vllm, *command[1:]], exchange, host, show)


def _served(run: Path) -> tuple[Path, int]:
    """The policy of a run and its longest context."""
    policy, kept = run / "checkpoint" / "policy", run / "config.json"
    if not policy.is_dir():
        raise UserError(f"{policy}: not there; name the directory of a finished run")
    try:
        return policy, int(json.loads(kept.read_text(encoding="utf-8"))["rollout"]["max_context"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{kept}: not a run's recipe ({type(error).__name__}: {error}); name the directory of a finished "
            "run"
        ) from None


def _schedule(text: str) -> list[tuple[int, int, int]]:
    try:
        return [(int(a), int(b), int(c)) for a, b, c in json.loads(text)]
    except (ValueError, TypeError):
        raise UserError(
            f"--schedule {text!r}: write [[from, to, tokens], ...], for example [[1,8,4],[9,64,0]]"
        ) from None


def _start(command: list[str], exchange: Path | None, host: str, show: bool) -> None:
    """Becomes the server, or only says how it would be started."""
    from paceline.rollout.backends.exchange import TOKEN, token_file
    from paceline.rollout.backends.vllm_server import LOOPBACK, serve_environment

    environment: dict[str, str] = {}
    if exchange is not None:
        try:
            environment = serve_environment(exchange, host)
        except (OSError, ValueError) as error:
            raise UserError(f"--exchange {exchange}: {error}") from None
    elif host not in LOOPBACK:
        print(
            f"paceline: whoever reaches {host} can ask for completions; -- --api-key KEY asks for a key",
            flush=True,
        )
    # never on a screen
    token = f'"$(cat {shlex.quote(str(token_file(exchange)))})"' if exchange is not None else ""
    said = [
        f"{name}={token if name in (TOKEN, 'VLLM_API_KEY') else shlex.quote(value)}"
        for name, value in environment.items()
    ]
    print(*said, shlex.join(command), flush=True)
    if show:
        return
    try:
        os.execvpe(command[0], command, {**os.environ, **environment})
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: there is no such command; make peers sets it up, then --vllm .venv-peers/bin/vllm"
        ) from None
