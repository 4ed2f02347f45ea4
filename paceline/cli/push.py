"""Runs on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from paceline.rl.errors import user_errors
from paceline.rl.process.console import announce


def push(
    run: Annotated[Path, Argument(help="directory of a run with a checkpoint")],
    policy: Annotated[str | None, Option(help="repository of the policy, owner/name")] = None,
    adapter: Annotated[str | None, Option(help="repository of the LoRA adapter, owner/name")] = None,
    drafter: Annotated[str | None, Option(help="repository of the drafter, owner/name")] = None,
    private: Annotated[bool, Option("--private", help="make new repositories private")] = False,
) -> None:
    """Uploads a run's policy, adapter and drafter to the Hugging Face hub, each with a model card."""
    announce("reading what is to be pushed")
    from paceline.rl.models.publishing import push_run

    with user_errors():
        push_run(
            run,
            policy=policy,
            adapter=adapter,
            drafter=drafter,
            private=private,
            say=lambda line: print(line, flush=True),
        )
