"""Files that ship with Paceline: recipes, DeepSpeed's settings, shapes of models.

In a checkout they are in configs/, in an installed wheel in the package ``paceline_recipes``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def shipped_folder() -> Path:
    """Where they are."""
    checkout = Path(__file__).parents[1] / "configs"
    if checkout.is_dir():
        return checkout
    package = find_spec("paceline_recipes")
    assert package is not None and package.submodule_search_locations  # the wheel has it
    return Path(next(iter(package.submodule_search_locations)))


def shipped_or_own(name: str | Path) -> Path:
    """A file of the user's, or the one that ships under its name: ``quickstart``, ``length/pear``, ``configs/quickstart.yaml``.

    What is neither is returned as it is, for its reader to refuse.
    """
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    found = shipped_folder() / inside
    return next((p for p in (found, found.with_name(found.name + ".yaml")) if p.is_file()), path)
