"""From a run to a drafter directory for others to serve."""

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
        run: A run's directory, with ``checkpoint/drafter`` and ``checkpoint/policy``.
        out: New directory.
        target: Hub id of the run's policy; None where it is not on the hub, and the card names what it was
            trained from.
        name: What the card calls the drafter; None for ``out``'s name.

    Raises:
        DrafterError: when the run has no whole drafter, or ``out`` is in use or cannot be written.
    """
    source, policy = run / "checkpoint" / "drafter", run / "checkpoint" / "policy"
    if not source.is_dir():
        raise DrafterError(
            f"{run}: no checkpoint/drafter; was the run made with the eagle3 drafter, and did it save a step?"
        )
    drafter = load_drafter_of(source, policy)
    facts = drafter_facts(run)
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
    """What a run's recipe and metrics say of its drafter.

    Raises:
        DrafterError: where the directory holds no run's recipe.
    """
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model, temperature = str(config["policy"]["model"]), float(config["rollout"]["temperature"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:160]
        raise DrafterError(f"{path}: not a run's recipe ({reason}); name the directory of a run") from None
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
    """The id on the Hugging Face hub that a name of a policy is; None for directories and for policies made
    on the spot.

    Args:
        model: As users write it.
        near: A relative directory is looked for in the present directory and in those above this one.
    """
    if "/" not in model or any((place / model).exists() for place in (Path.cwd(), *near.absolute().parents)):
        return None
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return model


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of the metrics that can be read."""
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
    found = [
        step[name] for step in steps if isinstance(step.get(name), int | float) and math.isfinite(step[name])
    ]
    return float(found[-1]) if found else None


def _acceptance(steps: list[dict[str, Any]]) -> list[float]:
    found = [step["drafter/acceptance"] for step in steps if isinstance(step.get("drafter/acceptance"), list)]
    return [a for a in found[-1] if isinstance(a, int | float)] if found else []
