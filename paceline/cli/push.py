"""Implements the command that uploads a run to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from paceline.rl.errors import user_errors
from paceline.rl.process.console import announce


def push(
    run: Annotated[Path, Argument(help="Directory of a run with a checkpoint.")],
    policy: Annotated[str | None, Option(help="Repository for the policy, owner/name.")] = None,
    adapter: Annotated[str | None, Option(help="Repository for the LoRA adapter, owner/name.")] = None,
    drafter: Annotated[str | None, Option(help="Repository for the drafter, owner/name.")] = None,
    private: Annotated[bool, Option("--private", help="Create new repositories as private.")] = False,
) -> None:
    """Uploads a run's policy, adapter and drafter to the Hugging Face hub, each with a model card."""
    announce("reading the files to upload")
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
