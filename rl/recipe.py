"""A recipe: from its YAML file to typed values that fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from paceline.rl.config.parsing import apply_override, parse
from paceline.rl.config.paths import shipped_folder, shipped_or_own
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.validation.recipe import check


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe.

    Args:
        path: A YAML file, or the name of a recipe that ships. Its key ``base`` may name another one, from its
            own directory, whose keys it takes over and overrides.
        overrides: ``key.sub=value`` each, values as YAML.

    Raises:
        UserError: one line that names the file and key.
    """
    data = _read(shipped_or_own(path), ())
    for override in overrides:
        apply_override(data, override)
    config = parse(RunConfig, data, where=str(path))
    check(config)
    return config


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path in below:
        raise UserError(f"{path}: its base leads back to itself")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such recipe; those that ship are in {shipped_folder()}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is a {type(data).__name__}")
    base = data.pop("base", None)
    return data if base is None else _over(_read(path.parent / str(base), (*below, path)), data)


def _over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``data`` in place of its own, section by section."""
    merged = dict(base)
    for key, value in data.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
