"""Warms a recipe's policy up on worked solutions: ``python launch/warmup_policy.py configs/quickstart.yaml [key=value …]``."""

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rl.cli import user_errors
from rl.config import load_config
from rl.errors import UserError
from rl.machine import fit_process
from rl.warmup import warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if config.policy.warmup is None:
        raise UserError(f"{args.config}: policy.warmup is null: there is nothing to do")
    fit_process(local_world_size=1)
    console = Console()
    columns = (
        TextColumn("warm-up"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None, loss=float("nan"))

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=steps, loss=loss)
            if not console.is_terminal and (step % 8 == 0 or step == steps):
                console.print(f"warm-up step {step}/{steps}  loss {loss:.3f}", highlight=False)

        path = warm_up(config, show)
    print(path)


if __name__ == "__main__":
    with user_errors():
        main()
