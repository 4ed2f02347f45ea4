"""Implements the commands that report on a run and evaluate a policy."""

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
    run: Annotated[Path, Argument(help="Directory of a run.")],
    picture: Annotated[Path | None, Option(help="Also write four of the plots to this PNG file.")] = None,
) -> None:
    """Writes a run's report as one self-contained HTML file and prints its path."""
    from paceline.rl.monitoring.report import write_picture, write_report

    with user_errors():
        print(write_report(run))
        if picture is not None:
            print(write_picture(run, picture))


def evaluate(
    config: Annotated[
        str | None,
        Argument(help="Recipe that gives the task and the sampling; by default the run's own recipe."),
    ] = None,
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        Option(help="Run whose policy to evaluate; by default the policy that the recipe starts from."),
    ] = None,
    checkpoint: Annotated[
        str | None, Option(help="Checkpoint of the run, best or step-N; by default the last one.")
    ] = None,
    prompts: Annotated[int, Option(help="Number of problems, none of which was trained on.")] = 64,
    samples: Annotated[int, Option(help="Number of completions of each problem.")] = 4,
    budgets: Annotated[
        str, Option(help='Lengths in tokens to also steer completions to, such as "24 48"; LOSSY.')
    ] = "",
    out: Annotated[Path | None, Option(help="JSON file to write the results to.")] = None,
) -> None:
    """Evaluates a policy on problems that it was not trained on.

    The problems come from evaluation.path, from those that task.heldout set aside, or from reasoning-gym,
    which generates others. The recipe's reward, stop strings and chat template apply.

    With --budgets the policy is also steered to those lengths by budget guidance. This is lossy: it changes
    the output distribution, so use it only for evaluation.
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
            raise UserError(
                f"--prompts is {prompts} and --samples is {samples}: write at least 1 for each of them"
            )
        fit_process(local_world_size=1)
        evaluator = Evaluator(recipe, starting_policy(recipe) if policy is None else policy, prompts, samples)
        reward = recipe.task.reward if recipe.task.reward is not None else "the problems' own scorers"
        print(f"{len(evaluator.problems)} problems, {evaluator.origin}; rewarded by {reward}", flush=True)
        rows = [evaluator.exact()]
        if steered:
            head = evaluator.predictor(prompts)
            rows += [evaluator.steered(head, budget) for budget in steered]
        for row in rows:
            lengths = f"length {row.length:.1f}, median {row.median:.0f}, at most {row.longest}"
            lengths += f", {row.loops} in loops" if row.loops else ""
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
