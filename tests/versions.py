"""Runs the tests of the engine and of the trainers on other versions:
``python tests/versions.py oldest locked newest``.

``python tests/versions.py transformers==5.19.0`` puts that release in the place of the locked one. Each has
an environment of its own under .venv-versions (constraints/environment.py). Only the standard library is
used: it runs before there is any environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "constraints"))
from environment import InstallFailed, installed, make, make_newest_over  # noqa: E402

TESTS = (
    "tests/rollout",
    "tests/rl/algorithms/test_losses_beside_trl.py",
    "tests/rl/integrations/test_trl.py",
    "tests/test_end_to_end.py",
)
QUICK = (
    "tests/rollout/test_greedy.py",
    "tests/rollout/test_logprobs.py",
    "tests/rollout/test_transformers_api.py",
    "tests/rollout/engine/test_reading.py",
    "tests/rollout/model/test_families.py",
    "tests/rollout/model/test_inference_view.py",
    "tests/rollout/model/test_view_check.py",
    *TESTS[1:],
)
_SECONDS = 2400


@dataclass(frozen=True)
class Outcome:
    """What the tests said on one set of versions.

    Attributes:
        versions: As `environment.make` has it.
        packages: Package → installed version.
        passed, failed, skipped: Numbers of tests.
        failures: Names of those that failed, or why there are none to count.
        seconds: Of the tests, without the installation.
    """

    versions: str
    packages: dict[str, str]
    passed: int
    failed: int
    skipped: int
    failures: list[str]
    seconds: float


def run(versions: str, quick: bool) -> Outcome:
    """Makes the environment if need be and runs the tests in it."""
    folder = ROOT / ".venv-versions" / versions
    try:
        python = make(folder, versions)
    except InstallFailed as error:
        return _failed(versions, f"not installed: {error}")
    return _tested(versions, python, folder, quick)


def run_over(base: Path, quick: bool) -> Outcome:
    """Runs the tests on what is newer than the packages of an environment, if anything is."""
    folder = ROOT / ".venv-versions" / "over"
    try:
        python = make_newest_over(folder, base)
    except InstallFailed as error:
        return _failed("newest", f"not installed: {error}")
    before, after = installed(base / "bin" / "python"), installed(python)
    if after["torch"] == before["torch"]:
        print(f"torch stays {after['torch']}: no newer CPU build was found; `make test-versions` takes any")
    if after == before:
        print("nothing is newer: there is nothing to test")
        return Outcome("newest", after, 0, 0, 0, [], 0.0)
    return _tested("newest", python, folder, quick)


def _failed(versions: str, why: str, packages: dict[str, str] | None = None, seconds: float = 0.0) -> Outcome:
    return Outcome(versions, packages or {}, 0, 0, 0, [why], seconds)


def _tested(versions: str, python: Path, folder: Path, quick: bool) -> Outcome:
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    marked = "not slow and not vllm and not pipelines" + (" and not ci" if quick else "")
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-n",
        "auto",
        "--dist",
        "worksteal",
        "-m",
        marked,
        f"--junitxml={report}",
    ]
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.suppress(subprocess.TimeoutExpired):  # then the report is missing, which is said
        subprocess.run(
            [*command, *(QUICK if quick else TESTS)], cwd=ROOT, env=environment, check=False, timeout=_SECONDS
        )
    return _read(versions, installed(python), report, time.monotonic() - begin)


def _read(versions: str, packages: dict[str, str], report: Path, seconds: float) -> Outcome:
    if not report.is_file():
        return _failed(versions, f"no report of the tests after {seconds:.0f} s", packages, seconds)
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
    return Outcome(versions, packages, len(cases) - len(bad) - skipped, len(bad), skipped, names, seconds)


def _say(outcome: Outcome) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in outcome.packages.items())
    counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
    result = f"{counts} in {outcome.seconds:.0f} s" if outcome.seconds else "not tested"
    print(f"{outcome.versions} ({packages}): {result}")
    for name in outcome.failures:
        print(f"  {name}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", help="oldest, locked, newest, or package==version,…")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the tests that other versions are likeliest to break, in a quarter of the time",
    )
    parser.add_argument(
        "--over",
        type=Path,
        metavar="FOLDER",
        help="newest: only newer releases, over the other packages of this environment; torch only if there "
        "is a CPU build of it",
    )
    parser.add_argument("--report-only", action="store_true", help="succeed whatever the tests say")
    parser.add_argument("--out", type=Path, help="a JSON file for the outcomes")
    args = parser.parse_args()
    outcomes = [
        run_over(args.over, args.quick) if versions == "newest" and args.over else run(versions, args.quick)
        for versions in args.versions
    ]
    print("\ntests on other versions")
    for outcome in outcomes:
        _say(outcome)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    if not args.report_only and any(o.failures for o in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
