"""Loads a recipe: from a YAML file to typed values that are checked against each other.

Five files are on the way: process/shipped_files.py finds the file, this one reads it and its bases,
config/parsing.py applies overrides and builds config/run.py (with a file for each section), and
validation/recipe.py (likewise) checks the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from paceline.rl.config.parsing import apply_override, parse
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.process.shipped_files import shipped_folder, shipped_or_own, shipped_recipes


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a recipe.

    Args:
        path: A YAML file, or the name of a recipe that ships. Its key ``base`` may name another recipe,
            relative to the file, whose keys it takes over and overrides.
        overrides: Texts ``key.sub=value``; values are parsed as YAML.

    Returns:
        The recipe, with defaults for all keys that it does not name.

    Raises:
        UserError: The recipe cannot be read, has an unknown key or a value of a wrong type, or its values
            contradict each other. One line names the file or key and what to write.
    """
    # imported here because the registries that it checks against import torch, which takes seconds
    from paceline.rl.validation.recipe import check

    config = read_config(path, overrides)
    check(config)
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe as `load_config` does, in a fraction of its seconds.

    Its values have the right types, but have not been checked against each other.

    Raises:
        UserError: The recipe cannot be read, or has an unknown key or a value of a wrong type.
    """
    data = _read(shipped_or_own(path), ())
    for override in overrides:
        apply_override(data, override)
    return parse(RunConfig, data, where=str(path))


def _read(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a recipe and merges it into its bases.

    Args:
        path: The recipe's file.
        derived: Recipes that have this one as a base, to detect a cycle.

    Raises:
        UserError: The file is missing, not a YAML mapping, or a base of itself.
    """
    if path in derived:
        raise UserError(f"{path}: its base leads back to itself; leave one base out")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; {_proposal(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is a {type(data).__name__}")
    base = data.pop("base", None)
    return data if base is None else _merged(_read(path.parent / str(base), (*derived, path)), data)


def _proposal(path: Path) -> str:
    """Returns what to write for a recipe that does not exist: one that ships with the same last name."""
    alike = [name for name in shipped_recipes() if Path(name).name == path.stem]
    return f"did you mean {alike[0]}?" if alike else f"those that ship are in {shipped_folder()}"


def _merged(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Returns ``base`` with the keys of ``data`` over its own, section by section."""
    merged = dict(base)
    for key, value in data.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
