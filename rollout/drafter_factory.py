"""Builds registered drafters for an engine."""

from __future__ import annotations

from paceline.rollout.drafters import DRAFTERS
from paceline.rollout.drafters.base import Drafter
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.engine.engine import RolloutEngine

__all__ = ["DrafterParts", "build_drafter"]


def build_drafter(name: str, engine: RolloutEngine, parts: DrafterParts) -> Drafter:
    """Builds a drafter that fits the engine, for `RolloutEngine.add_drafter`.

    The drafter's class builds itself by its class method ``build(host, parts)``; a class without one is
    constructed without arguments.

    Raises:
        ValueError: The name is unknown, or a part that the drafter needs is missing.
    """
    if name not in DRAFTERS:
        raise ValueError(f"the drafter {name!r} is unknown: write one of {', '.join(DRAFTERS)}")
    capacity = engine.capacity_for(engine.max_context, engine.max_nodes)
    host = DrafterHost(engine.runner, engine.scheduler.slots, capacity, engine.drafters)
    drafter = DRAFTERS[name]
    return drafter.build(host, parts) if hasattr(drafter, "build") else drafter()
