"""Where packaged files lie: recipes, DeepSpeed settings, and shapes of models."""

from __future__ import annotations

from pathlib import Path


def shipped_folder() -> Path:
    """Returns the directory of the recipes: configs/, which is installed as part of the package."""
    return Path(__file__).parents[2] / "configs"


def shipped_or_own(name: str | Path) -> Path:
    """Finds a user's file, or a packaged one by its name or path in configs/.

    Args:
        name: For example ``mine.yaml``, ``quickstart``, ``length/rewards/pear`` or
            ``configs/quickstart.yaml``. A user's own file comes first.

    Returns:
        The file's path. A name that is neither is returned unchanged, so that whoever reads it reports the
        error.
    """
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    packaged = shipped_folder() / inside
    return next((p for p in (packaged, packaged.with_name(packaged.name + ".yaml")) if p.is_file()), path)


def shipped_recipes() -> list[str]:
    """Returns the names of the packaged recipes in order, for example ``length/rewards/pear``."""
    folder = shipped_folder()
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
