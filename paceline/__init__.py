"""Paceline: lossless, adaptive speculative rollouts for reasoning RL, with a drafter distilled on the way.

The names below are imported when they are first used, so that ``import paceline`` costs nothing: torch and
transformers are loaded by ``paceline.RolloutEngine``, not by the package.
"""

import importlib

# The public name, the module that defines it, and its name there. `__init__.pyi` gives their types.
_PUBLIC = {
    "LengthAware": ("paceline.rl.rewards.registry", "LengthAware"),
    "Request": ("paceline.rollout", "Request"),
    "RolloutEngine": ("paceline.rollout", "RolloutEngine"),
    "SamplingParams": ("paceline.rollout", "SamplingParams"),
    "load_config": ("paceline.rl.recipe", "load_config"),
    "load_recipe": ("paceline.rl.recipe", "load_config"),
    "paceline_rollouts": ("paceline.rl.integrations.trl", "paceline_rollouts"),
}

__all__ = [
    "LengthAware",
    "Request",
    "RolloutEngine",
    "SamplingParams",
    "__version__",
    "load_config",
    "load_recipe",
    "paceline_rollouts",
]


def __getattr__(name: str) -> object:
    """Imports a public name on first use (PEP 562) and keeps it in the module."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("paceline")
    elif name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, whether they have been imported or not."""
    return sorted({*globals(), *__all__})
