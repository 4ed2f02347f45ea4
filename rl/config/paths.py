"""Files that ship with Paceline: recipes, DeepSpeed's settings, shapes of models."""

from __future__ import annotations

from pathlib import Path


def shipped_folder() -> Path:
    """Returns the directory of the recipes: configs/, which is installed as part of the package."""
    return Path(__file__).parents[2] / "configs"


def shipped_or_own(name: str | Path) -> Path:
    """A file of the user's, or the one that ships under its name: ``quickstart``, ``length/pear``,
    ``configs/quickstart.yaml``.

    What is neither is returned as it is, for its reader to refuse.
    """
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    found = shipped_folder() / inside
    return next((p for p in (found, found.with_name(found.name + ".yaml")) if p.is_file()), path)
