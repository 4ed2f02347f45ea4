"""The package's public names: they exist, they are lazy, and editors see the ones that exist."""

import ast
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import paceline
from paceline.cli.main import app
from paceline.rl.recipe import load_config
from tests.support import ROOT


def test_public_names_are_the_objects_of_their_modules():
    from paceline import LengthAware, Request, RolloutEngine, SamplingParams, load_recipe, paceline_rollouts
    from paceline.rl.integrations import trl
    from paceline.rl.rewards import registry

    assert (LengthAware, paceline_rollouts) == (registry.LengthAware, trl.paceline_rollouts)
    assert {x.__module__.split(".")[1] for x in (Request, RolloutEngine, SamplingParams)} == {"rollout"}
    assert load_recipe is load_config is paceline.load_config
    assert load_recipe("tiny", ["steps=2"]).steps == 2


def test_import_paceline_loads_nothing():
    code = "import sys, paceline; dir(paceline); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert "paceline" in loaded
    assert not {"torch", "transformers", "paceline.rollout", "paceline.rl"} & set(loaded)


def test_the_version_is_the_one_that_the_command_prints():
    assert CliRunner().invoke(app, ["--version"]).output.split() == ["paceline", paceline.__version__]


def test_the_stub_declares_exactly_the_public_names():
    stub = ast.parse((ROOT / "paceline" / "__init__.pyi").read_text())
    names = {
        *(alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names),
        *(target.id for node in stub.body if isinstance(node, ast.Assign) for target in node.targets),
        *(node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)),
    }
    assert names == set(paceline.__all__) <= set(dir(paceline))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        paceline.Engine  # noqa: B018
