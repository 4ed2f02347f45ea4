"""Exports a run's drafter to a directory that vLLM and SGLang serve."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.checkpoint import load_drafter_of, save_drafter
from paceline.drafter_trainer.storage.model_card import DrafterFacts, drafter_card, license_of


def export_drafter(run: Path, out: Path, *, target: str | None = None, name: str | None = None) -> Path:
    """Writes a run's last drafter to ``out``, in bfloat16, with a model card.

    Args:
        run: Directory of the run, with ``checkpoint/drafter`` and ``checkpoint/policy``.
        out: New directory.
        target: Hub id of the run's policy; None if it is not on the hub, in which case the card names the
            model that training started from.
        name: Name of the drafter in the card; None takes that of ``out``.

    Returns:
        ``out``.

    Raises:
        DrafterError: The run has no complete drafter, or ``out`` is in use or cannot be written.
    """
    source, policy = run / "checkpoint" / "drafter", run / "checkpoint" / "policy"
    if not source.is_dir():
        raise DrafterError(
            f"{run}: no checkpoint/drafter; name a run with the eagle3 drafter that has saved a checkpoint"
        )
    drafter = load_drafter_of(source, policy)
    facts = replace(drafter_facts(run), parallel=drafter.mask_token is not None)
    if target is not None:
        facts = replace(facts, target=target, base_model=target)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DrafterError(f"{out}: exists and is not empty; name a new directory")
        save_drafter(drafter, out, torch.bfloat16)
        card = drafter_card(facts, drafter.config.draft_vocab_size, name or out.name)
        (out / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise DrafterError(f"{out}: cannot be written ({error.strerror}); name another directory") from None
    return out


def drafter_facts(run: Path) -> DrafterFacts:
    """Collects what a run's recipe and metrics say about its drafter.

    Raises:
        DrafterError: The directory holds no recipe of a run.
    """
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model, temperature = str(config["policy"]["model"]), float(config["rollout"]["temperature"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:160]
        raise DrafterError(
            f"{path}: not the recipe of a run ({reason}); name the directory of a run"
        ) from None
    steps = _metrics(run / "metrics.jsonl")
    return DrafterFacts(
        target=model,
        base_model=hub_id(model, run),
        license=license_of(run / "checkpoint" / "policy"),
        steps=len(steps),
        temperature=temperature,
        acceptance_length=_last(steps, "rollout/acceptance_length_eagle3"),
        acceptance=_acceptance(steps),
    )


def hub_id(model: str, near: Path) -> str | None:
    """Returns a policy's name if it is a Hugging Face hub id.

    Args:
        model: Name of the policy as users write it.
        near: Directory of the run. A relative path is looked up in the current directory and in all parents
            of this one.

    Returns:
        The hub id; None for directories and for policies that are created locally.
    """
    if "/" not in model or any(
        (parent / model).exists() for parent in (Path.cwd(), *near.absolute().parents)
    ):
        return None
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return model


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file, skipping lines that cannot be parsed."""
    if not path.is_file():
        return []
    steps = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)
        except ValueError:
            continue
        if isinstance(step, dict):
            steps.append(step)
    return steps


def _last(steps: list[dict[str, Any]], name: str) -> float | None:
    """Returns the last finite value of a metric; None if there is none."""
    values = [
        step[name] for step in steps if isinstance(step.get(name), int | float) and math.isfinite(step[name])
    ]
    return float(values[-1]) if values else None


def _acceptance(steps: list[dict[str, Any]]) -> list[float]:
    """Returns the drafter's last acceptance at each draft position; empty if there is none."""
    values = [
        step["drafter/acceptance"] for step in steps if isinstance(step.get("drafter/acceptance"), list)
    ]
    return [a for a in values[-1] if isinstance(a, int | float)] if values else []
