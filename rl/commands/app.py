"""The command ``paceline``."""

from __future__ import annotations

import typer

from rl.commands.doctor import doctor
from rl.commands.drafters import export, serve
from rl.commands.policies import fetch, warm_up_policy
from rl.commands.results import evaluate, report
from rl.commands.training import train

app = typer.Typer(
    help="Lossless, adaptive speculative rollouts for reasoning RL, with a drafter distilled on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(report)
app.command()(evaluate)
app.command()(export)
app.command()(serve)
app.command("warmup")(warm_up_policy)
app.command()(fetch)
app.command()(doctor)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Runs a benchmark; paceline bench --help lists them."""
    from rl.commands.bench import main

    main(context.args, "paceline bench")


if __name__ == "__main__":
    app()
