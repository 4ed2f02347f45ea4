"""Implements the commands that train a first drafter, export a run's drafter, and serve a run's policy."""

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
    config: Annotated[str, Argument(help="Recipe: a file, or the name of a packaged one.")],
    out: Annotated[Path, Argument(help="New directory for the drafter.")],
    overrides: Overrides = None,
    minutes: Annotated[float, Option(help="Minutes for sampling and training together.")] = 10.0,
) -> None:
    """Trains a first drafter for a recipe's policy.

    Start a run from it with drafter.start=OUT. OUT/warmup.json records the time that it took and the
    acceptance that it reached.
    """
    with user_errors():
        if out.exists():
            raise UserError(f"{out}: exists already; name a new directory")
        announce(f"training a first drafter for {config}: loading torch and transformers")
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
    run: Annotated[Path, Argument(help="Directory of a run.")],
    out: Annotated[Path, Argument(help="New directory for the drafter.")],
) -> None:
    """Exports a run's drafter to a directory that vLLM and SGLang load."""
    announce("exporting the drafter: loading torch", data=True)
    from paceline.drafter_trainer.storage.export import export_drafter

    with user_errors():
        print(export_drafter(run, out))


def serve(
    run: Annotated[Path, Argument(help="Directory of a finished run.")],
    host: Annotated[
        str, Option(help="Address to listen on; 0.0.0.0 listens on all networks of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(help="Port of the server.")] = 8000,
    exchange: Annotated[
        Path | None,
        Option(
            help="Accept new weights from a trainer, only through this directory; it must be the trainer's "
            "rollout.vllm.exchange."
        ),
    ] = None,
    depth: Annotated[int, Option(help="Largest number of draft tokens per step.")] = 4,
    schedule: Annotated[
        str,
        Option(
            help="Draft tokens by batch size: [[1,8,4],[9,64,0]] drafts 4 for 1 to 8 sequences and none for "
            "9 to 64. By default each step's number is chosen from measured times."
        ),
    ] = "[]",
    parallel: Annotated[
        bool,
        Option(
            "--parallel",
            help="Draft --depth tokens in one pass, with a drafter trained with drafter.parallel_positions.",
        ),
    ] = False,
    vllm: Annotated[str, Option(help="Path of vLLM's command if it is not on PATH.")] = "vllm",
    sglang: Annotated[
        bool, Option("--sglang", help="Print the command for SGLang instead; it is untested.")
    ] = False,
    show: Annotated[bool, Option("--print", help="Print the command without running it.")] = False,
    more: Annotated[list[str] | None, Argument(help="After --: further arguments for the server.")] = None,
) -> None:
    """Serves a run's policy with vLLM, and its drafter if the run has one.

    With --exchange the server accepts new weights from a trainer (rollout.vllm.servers).
    """
    with user_errors():
        if parallel and (sglang or schedule != "[]"):
            raise UserError("--parallel is for vLLM and a fixed --depth: leave --sglang and --schedule out")
        policy, context = _served_policy(run)
        drafter: Path | None = run / "drafter"
        if not (run / "drafter").is_dir():
            drafter = None
            print(f"paceline: {run / 'drafter'} does not exist: serving without drafts", flush=True)
        announce("starting the server", data=True)
        from paceline.drafter_trainer.storage.checkpoint import load_drafter_of
        from paceline.rollout.backends.serve_command import serve_command, sglang_command

        if drafter is not None:
            # reports a broken drafter in one line, which the server does not
            loaded = load_drafter_of(drafter, policy)
            if parallel and loaded.mask_token is None:
                raise UserError(
                    f"--parallel: {drafter} has not learned to draft in one pass; leave the option out, or "
                    "train with drafter.parallel_positions"
                )
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
            parallel=parallel,
            more=more or (),
        )
        _start([vllm, *command[1:]], exchange, host, show)


def _served_policy(run: Path) -> tuple[Path, int]:
    """Returns the directory of a run's policy and its maximum context in tokens."""
    policy, recipe = run / "checkpoint" / "policy", run / "config.json"
    if not policy.is_dir():
        raise UserError(f"{policy}: does not exist; name the directory of a finished run")
    try:
        return policy, int(json.loads(recipe.read_text(encoding="utf-8"))["rollout"]["max_context"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{recipe}: not a run's recipe ({type(error).__name__}: {error}); name the directory of a "
            "finished run"
        ) from None


def _schedule(text: str) -> list[tuple[int, int, int]]:
    try:
        return [(int(start), int(end), int(tokens)) for start, end, tokens in json.loads(text)]
    except (ValueError, TypeError):
        raise UserError(
            f"--schedule {text!r}: write [[from, to, tokens], ...], for example [[1,8,4],[9,64,0]]"
        ) from None


def _start(command: list[str], exchange: Path | None, host: str, show: bool) -> None:
    """Prints the server's command and, unless ``show`` is set, replaces this process by the server."""
    from paceline.rollout.backends.exchange import TOKEN, token_file
    from paceline.rollout.backends.serve_command import LOOPBACK, serve_environment

    environment: dict[str, str] = {}
    if exchange is not None:
        try:
            environment = serve_environment(exchange, host)
        except (OSError, ValueError) as error:
            raise UserError(f"--exchange {exchange}: {error}") from None
    elif host not in LOOPBACK:
        print(
            f"paceline: anyone who can reach {host} can request completions; require a key with "
            "-- --api-key KEY",
            flush=True,
        )
    # the token itself must not be printed
    token = f'"$(cat {shlex.quote(str(token_file(exchange)))})"' if exchange is not None else ""
    assignments = [
        f"{name}={token if name in (TOKEN, 'VLLM_API_KEY') else shlex.quote(value)}"
        for name, value in environment.items()
    ]
    print(*assignments, shlex.join(command), flush=True)
    if show:
        return
    try:
        os.execvpe(command[0], command, {**os.environ, **environment})
    except FileNotFoundError:
        raise UserError(
            f"--vllm {command[0]}: no such command; run make peers, then write --vllm .venv-peers/bin/vllm"
        ) from None
