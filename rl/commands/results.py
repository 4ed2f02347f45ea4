"""Results of runs: reports, and accuracy on other problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from rl.cli import Overrides, say_first, user_errors


def report(
    run: Annotated[Path, Argument(help="directory of a run")],
    picture: Annotated[Path | None, Option(help="also write four of its plots as one PNG")] = None,
) -> None:
    """Writes a run's report, one self-contained HTML file."""
    from rl.report import write_picture, write_report

    with user_errors():
        print(write_report(run))
        if picture is not None:
            print(write_picture(run, picture))


def evaluate(
    config: Annotated[str, Argument(help="a recipe, for its task and sampling")],
    overrides: Overrides = None,
    run: Annotated[Path | None, Option(help="a finished run; else the policy that the recipe starts from")] = None,
    prompts: Annotated[int, Option(help="problems that were not trained on")] = 64,
    samples: Annotated[int, Option(help="of each")] = 4,
    budgets: Annotated[str, Option(help='tokens to steer to, such as "24 48"; LOSSY')] = "",
    out: Annotated[Path | None, Option(help="JSON file")] = None,
) -> None:
    """A policy on problems it was not trained on.

    With --budgets it is also steered to those lengths by budget guidance, which is lossy: it changes the output distribution, so it
    is for evaluation alone.
    """
    say_first(f"evaluating {config if run is None else run}: loading torch and transformers")
    from rl.config import load_config
    from rl.evaluate import Evaluator
    from rl.machine import fit_process
    from rl.starting import starting_policy

    with user_errors():
        fit_process(local_world_size=1)
        recipe = load_config(config, overrides or ())
        policy = starting_policy(recipe) if run is None else run / "checkpoint" / "policy"
        evaluator = Evaluator(recipe, policy, prompts, samples)
        rows = [evaluator.exact()]
        if budgets:
            head = evaluator.predictor(prompts)
            rows += [evaluator.steered(head, int(budget)) for budget in budgets.split()]
        for row in rows:
            lengths = f"length {row.length:.1f}, at most {row.longest}"
            print(f"{row.way:<34} accuracy {row.accuracy:.3f}  {lengths}  ({row.completions} completions)")
        if out is not None:
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
