"""Imports point down and never in a circle: import-linter's contracts in pyproject.toml.

Lazy imports and those for type checkers count, too.
"""

import ast
import contextlib
import re
from importlib.util import find_spec
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.support import ROOT

PACKAGES = ("paceline", "rl", "rollout", "drafter_trainer")
MOST_MODULES = 14


def test_the_contracts_of_imports_are_kept():
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == EXIT_STATUS_SUCCESS


def exists(name):
    """Whether a dotted name is a module, or a name in one."""
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(ModuleNotFoundError):
        if find_spec(name) is not None:
            return True
    spec = find_spec(module)
    return bool(spec and re.search(rf"\b{attribute}\b", Path(spec.origin).read_text()))


def test_what_is_named_in_strings_exists():
    """Processes and plug-ins are started by name, which no contract of imports and no type checker sees."""
    pattern = re.compile(r"""["'](paceline(?:\.\w+){2,})["':]|-m (paceline(?:\.\w+)+)""")
    names = {
        name
        for package in (*PACKAGES, "launch")
        for path in (ROOT / package).rglob("*.py")
        for groups in pattern.findall(path.read_text())
        for name in filter(None, groups)
    }
    assert {"paceline.cli.rank", "paceline.rl.rewards.worker", "paceline.rl.preparation_process"} <= names
    assert [name for name in names if not exists(name)] == []


def test_the_scripts_of_launch_only_enter_the_command_line():
    for script in (ROOT / "launch").glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module is not None
                and node.module.startswith("paceline")
            ):
                assert node.module.split(".")[1] in ("cli", "benchmarks", "rl"), script


def test_no_folder_is_too_full_to_look_through():
    """Drafters aside, which are a family of plug-ins."""
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= MOST_MODULES or folder.name == "drafters", folder
