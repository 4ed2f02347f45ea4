"""Defines the command ``paceline`` with its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.drafter import export, serve
from paceline.cli.policy import fetch, warm_up_policy
from paceline.cli.push import push
from paceline.cli.results import evaluate, report
from paceline.cli.train import train
from paceline.rl.process.console import announce

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"paceline {version('paceline')}")
        raise typer.Exit


@app.callback()
def paceline(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Trains reasoning models by RL with lossless speculative rollouts and a drafter distilled on the way."""


app.command()(train)
app.command()(report)
app.command()(evaluate)
app.command()(export)
app.command()(serve)
app.command()(push)
app.command("warmup")(warm_up_policy)
app.command()(fetch)


@app.command()
def doctor() -> None:
    """Checks what this machine can run and what is missing.

    Exits with status 1 if the main job cannot run.
    """
    announce("checking this machine; a tiny run at the end takes half a minute")
    from paceline.cli.doctor import doctor as check_machine

    check_machine()


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench(context: typer.Context) -> None:
    """Runs a benchmark; paceline bench --help lists them all."""
    from paceline.benchmarks.main import main

    main(context.args, "paceline bench")


@app.command("gpu-check", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def gpu_check(context: typer.Context) -> None:
    """Checks and measures the engine on this machine's GPU, in eight minutes at most.

    It takes the options that paceline bench gpu-check --help lists.
    """
    from paceline.benchmarks.main import main

    main(["gpu-check", *context.args], "paceline bench")


if __name__ == "__main__":
    app()
