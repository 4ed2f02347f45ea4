"""The lock says exactly what the two commands install."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from paceline.rollout.transformers_api import TESTED_RELEASES
from tests.support import ROOT

LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints" / "locked.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_lock_has_names_and_exact_versions_only():
    for requirement in LOCK:
        assert requirement.url is None
        assert re.fullmatch(r"==[\w.!+]+", str(requirement.specifier)), requirement


def test_the_lock_is_within_what_the_wheel_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["deepspeed"], *extras["lora"], *extras["trl"], *extras["dev"]]
    locked = {canonicalize_name(r.name): r.specifier for r in LOCK if r.marker is None or r.marker.evaluate()}
    for text in asked:
        requirement = Requirement(text)
        if requirement.name != "paceline":
            version = str(locked[canonicalize_name(requirement.name)]).removeprefix("==")
            assert requirement.specifier.contains(version, prereleases=True), text


def test_every_dependency_of_the_wheel_has_an_upper_bound():
    """Or a release of tomorrow changes what a user gets; packages whose versions are dates have none to
    give."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (
        text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts
    )
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        assert requirement.name == "packaging" or any(s.operator == "<" for s in requirement.specifier), (
            requirement
        )


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that make sets up")
def test_what_is_installed_is_what_is_locked():
    locked = {canonicalize_name(r.name): r for r in LOCK if r.marker is None or r.marker.evaluate()}
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        if name != "paceline":
            assert name in locked, (
                f"{name} {distribution.version} is installed, but not locked: run make lock"
            )
            assert locked[name].specifier.contains(distribution.version, prereleases=True), (
                f"{name} {distribution.version}"
            )


def test_the_tested_releases_of_transformers_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = next(Requirement(d) for d in project["dependencies"] if d.startswith("transformers"))
    assert asked.specifier == Requirement(f"transformers{TESTED_RELEASES}").specifier
