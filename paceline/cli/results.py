"""Results of runs: reports, and accuracy on other problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from paceline.cli.common import Overrides
from paceline.rl.errors import user_errors
from paceline.rl.process.console import announce


def report(
    run: Annotated[Path, Argument(help="directory of a run")],
    picture: Annotated[Path | None, Option(help="also write four of its plots as one PNG")] = None,
) -> None:
    """Writes a run's report, one self-contained HTML file."""
    from paceline.rl.monitoring.report import write_picture, write_report

    with user_errors():
        print(write_report(run))
        if picture is not None:
            print(write_picture(run, picture))


def evaluate(
    config: Annotated[
        str | None, Argument(help="a recipe, for its task and sampling; the run's own unless one is named")
    ] = None,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, Option(help="a run; else the policy that the recipe starts from is evaluated")
    ] = None,
    checkpoint: Annotated[
        str | None, Option(help="best or step-N, of those the run has kept; else its last one")
    ] = None,
    prompts: Annotated[int, Option(help="problems that were not trained on")] = 64,
    samples: Annotated[int, Option(help="of each")] = 4,
    budgets: Annotated[str, Option(help='tokens to steer to, such as "24 48"; LOSSY')] = "",
    out: Annotated[Path | None, Option(help="JSON file")] = None,
) -> None:
    """Evaluates a policy on problems it was not trained on: evaluation.path, what task.heldout set aside, or
    others by reasoning-gym; with the recipe's reward, stop strings and template.

    With --budgets it is also steered to those lengths by budget guidance, which is lossy: it changes the
    output distribution, so it is for evaluation alone.
    """
    announce(f"evaluating {config if run is None else run}: loading torch and transformers")
    from paceline.rl.errors import UserError
    from paceline.rl.evaluation.evaluate import Evaluator
    from paceline.rl.evaluation.policy import evaluated_policy
    from paceline.rl.models.initial import starting_policy
    from paceline.rl.process.files import write_atomically
    from paceline.rl.process.process_tuning import fit_process

    with user_errors():
        recipe, policy = evaluated_policy(config, list(overrides or ()), run, checkpoint)
        try:
            steered = [int(budget) for budget in budgets.split()]
        except ValueError:
            raise UserError(f"--budgets {budgets!r}: write numbers of tokens, for example '24 48'") from None
        if prompts < 1 or samples < 1:
            raise UserError("--prompts and --samples must be at least 1")
        fit_process(local_world_size=1)
        evaluator = Evaluator(recipe, starting_policy(recipe) if policy is None else policy, prompts, samples)
        reward = recipe.task.reward if recipe.task.reward is not None else "the problems' own scorers"
        print(f"{len(evaluator.problems)} problems, {evaluator.origin}; rewarded by {reward}", flush=True)
        rows = [evaluator.exact()]
        if steered:
            head = evaluator.predictor(prompts)
            rows += [evaluator.steered(head, budget) for budget in steered]
        for row in rows:
            lengths = f"length {row.length:.1f}, at most {row.longest}"
            failed = f"; {row.unscored} without a reward ({row.problem})" if row.unscored else ""
            print(
                f"{row.way:<34} accuracy {row.accuracy:.3f}  {lengths}  ({row.completions} "
                f"completions{failed})"
            )
        if out is not None:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(out, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            except OSError as error:
                raise UserError(f"--out {out}: {error}") from None
