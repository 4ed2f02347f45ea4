"""The command line: the same functions as the scripts in launch/."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from paceline.cli import doctor, trial
from paceline.cli.doctor import Finding, findings
from paceline.cli.main import app
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.models.policies import fetch_policy
from paceline.rl.monitoring.summary import read_metrics
from paceline.rl.recipe import load_config
from tests.engines import tiny_eagle3, tiny_llama
from tests.support import ROOT

runner = CliRunner()


def test_help_names_every_command():
    said = runner.invoke(app, ["--help"]).output
    assert all(
        name in said
        for name in (
            "train",
            "bench",
            "report",
            "evaluate",
            "export",
            "serve",
            "push",
            "warmup",
            "fetch",
            "doctor",
        )
    )


LIGHT = """
import sys
from typer.testing import CliRunner
from paceline.cli.main import app

for command in ([], *([name] for name in sys.argv[1:])):
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0 and "usage" in done.output.lower(), (command, done.output)
    assert "No such" not in done.output
wrong = CliRunner().invoke(app, ["train", "tiny", "--ranks", "2", "drafter.los=fkl"])
assert wrong.exit_code == 2 and "did you mean drafter.loss?" in wrong.stderr, wrong.stderr
heavy = {"torch", "transformers", "accelerate", "matplotlib", "numpy", "paceline.rollout", "datasets"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_wrong_keys_import_nothing_that_takes_long():
    """A module that imports torch at its top would make every command wait for it."""
    names = list(typer.main.get_command(app).commands)
    assert len(names) >= 9
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", typer.main.get_command(app).commands.values(), ids=lambda command: command.name
)
def test_every_option_says_what_it_is(command):
    assert command.help and (command.help.endswith(".") or command.name == "bench")
    for parameter in command.params:
        assert parameter.name == "help" or parameter.help, f"{command.name} {parameter.name}"


def test_version_and_mistyped_commands():
    assert runner.invoke(app, ["--version"]).output == f"paceline {version('paceline')}\n"
    assert "train" in runner.invoke(app, []).output
    wrong = runner.invoke(app, ["trian", "quickstart"])
    assert wrong.exit_code == 2
    assert "Did you mean 'train'" in wrong.output + wrong.stderr
    option = runner.invoke(app, ["train", "tiny", "--rank", "2"])
    assert option.exit_code == 2 and "--ranks" in option.output + option.stderr


def test_recipes_that_ship_have_names(tmp_path, monkeypatch):
    """Also away from the checkout, as with an installed wheel."""
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(ROOT / "configs" / "quickstart.yaml")
    assert load_config("configs/length/rewards/pear.yaml") == load_config("length/rewards/pear")
    found = runner.invoke(app, ["train", "tiny", "--dry-run", "out=runs/x"])
    assert found.exit_code == 0
    assert "tiny" in found.output
    (tmp_path / "quickstart").write_text("steps: 3\ntask: {datasets: [{name: chain_sum}]}\n")
    assert load_config("quickstart").steps == 3  # one's own comes first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "name either a recipe or --resume"),
        (["train", "nothing"], "there is no such recipe"),
        (["train", "tiny", "--ranks", "0"], "--ranks is 0"),
        (["export", "nowhere", "out"], "nowhere"),
        (["serve", "nowhere"], "finished run"),
        (["push", "nowhere"], "name repositories with --policy, --adapter or --drafter"),
        (["push", "nowhere", "--policy", "name"], "--policy name: write owner/name"),
        (["push", "nowhere", "--policy", "owner/name"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["warmup", "tiny"], "nothing to do"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    found = runner.invoke(app, arguments)
    assert found.exit_code == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.ci
def test_a_wrong_value_is_one_line_whichever_rank_finds_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "paceline.cli.main", "train", "tiny", "--ranks", "2", "drafter.loss=fk"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        "paceline: drafter.loss is 'fk': write one of fkl, rkl, jsd, tvd, tvd++, log_acceptance, length; "
        "did you mean fkl?"
    ]


def test_serve_prints_what_it_would_run(tmp_path):
    run, target = tmp_path / "run", tiny_llama()
    target.config.save_pretrained(run / "checkpoint" / "policy")
    save_drafter(tiny_eagle3(target), run / "drafter")
    (run / "config.json").write_text(json.dumps({"rollout": {"max_context": 384}}))
    vllm = runner.invoke(
        app, ["serve", str(run), "--print", "--schedule", "[[1,8,3],[9,64,0]]", "--", "--dtype", "float32"]
    ).output
    assert vllm.startswith("vllm serve ")
    assert "--host 127.0.0.1" in vllm
    assert '"num_speculative_tokens_per_batch_size": [[1, 8, 3], [9, 64, 0]]' in vllm
    assert vllm.rstrip().endswith("--dtype float32")
    unlearned = runner.invoke(app, ["serve", str(run), "--print", "--parallel"])
    assert unlearned.exit_code == 2 and "has not learned to draft in one pass" in unlearned.stderr
    both = runner.invoke(app, ["serve", str(run), "--parallel", "--sglang"])
    assert both.exit_code == 2 and "leave --sglang and --schedule out" in both.stderr
    save_drafter(tiny_eagle3(target, parallel=True), run / "drafter")
    assert (
        '"parallel_drafting": true' in runner.invoke(app, ["serve", str(run), "--print", "--parallel"]).output
    )
    sglang = runner.invoke(app, ["serve", str(run), "--sglang", "--depth", "3"]).output
    assert "--speculative-num-draft-tokens 4" in sglang
    wrong = runner.invoke(app, ["serve", str(run), "--print", "--schedule", "8"])
    assert wrong.exit_code == 2
    assert "[[from, to, tokens], ...]" in wrong.stderr
    exchange = tmp_path / "exchange"
    updated = runner.invoke(app, ["serve", str(run), "--print", "--exchange", str(exchange)]).output
    assert updated.startswith("VLLM_SERVER_DEV_MODE=1 ")
    assert f'PACELINE_UPDATE_TOKEN="$(cat {exchange}/update-token)"' in updated
    assert (exchange / "update-token").read_text() not in updated
    (run / "drafter" / "model.safetensors").write_bytes(b"cut")
    cut = runner.invoke(app, ["serve", str(run), "--print"])
    assert cut.exit_code == 2
    assert "model.safetensors: truncated or not safetensors" in cut.stderr
    shutil.rmtree(run / "drafter")
    plain = runner.invoke(app, ["serve", str(run), "--print"])
    assert "serving without drafts" in plain.output
    assert "--speculative-config" not in plain.output
    open_to_all = runner.invoke(app, ["serve", str(run), "--print", "--host", "0.0.0.0"]).output
    assert "--api-key" in open_to_all
    (run / "config.json").write_text("{")
    broken = runner.invoke(app, ["serve", str(run), "--print"])
    assert broken.exit_code == 2
    assert "config.json" in broken.stderr


@pytest.mark.ci
def test_doctor_says_what_it_saw(monkeypatch):
    """It trains a tiny policy: what it says of rollouts, updates and drafter is that run's."""
    found = list(findings())
    names = [f.what for f in found]
    assert {"Python", "torch", "transformers", "device", "cores", "memory", "native kernels"} <= set(names)
    assert not [f for f in found if f.needed and not f.good]
    said = {f.what: f.found for f in found}
    assert "from start to report" in said["a tiny run"]
    assert int(said["its rollouts"].split()[0]) == 16
    assert float(said["its updates"].split()[-1]) > 0
    assert int(said["its drafter"].split()[0]) > 0
    monkeypatch.setattr("paceline.cli.doctor.findings", lambda: iter(found))
    assert "main job runs here" in runner.invoke(app, ["doctor"]).output
    monkeypatch.setattr(
        "paceline.cli.doctor.findings",
        lambda: iter([Finding("torch", "2.0", False, needed=True, advice="pip")]),
    )
    broken = runner.invoke(app, ["doctor"])
    assert broken.exit_code == 1
    assert "cannot run here: torch" in broken.output


def test_doctor_imports_what_the_main_job_needs(monkeypatch):
    """Every package that pyproject.toml asks for; a broken one is named, and nothing is run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {canonicalize_name(Requirement(d).name) for d in project["dependencies"]}
    modules = doctor._modules_by_package()
    assert all(modules[name] for name in asked)

    def import_module(name):
        if name == "math_verify":
            raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    monkeypatch.setattr(doctor, "run_trial", lambda ranks: pytest.fail("run without what it needs"))
    said = {f.what: f for f in doctor.findings()}
    assert not said["math-verify"].good
    assert said["math-verify"].needed
    assert "import math_verify fails (ImportError: libfoo.so" in said["math-verify"].found


@pytest.mark.slow
def test_doctor_says_no_where_the_run_ends(monkeypatch):
    monkeypatch.setattr(doctor, "_required", lambda: iter(()))
    monkeypatch.setattr(trial, "_OVERRIDES", (*trial._OVERRIDES, "policy.model=nowhere/nothing"))
    said = {f.what: f for f in doctor.findings()}
    assert "its rollouts" not in said
    assert said["a tiny run"].needed
    assert not said["a tiny run"].good
    assert said["a tiny run"].found.startswith("failed: paceline: policy.model 'nowhere/nothing'")


RENAMED = """
from transformers.models.llama import modeling_llama as llama

forward = llama.LlamaModel.forward


def renamed(self, token_ids=None, **others):
    return forward(self, token_ids, **others)


llama.LlamaModel.forward = renamed
"""


BROKEN_FUSED_LAYERS = """
from paceline.rollout.model.fused_layer import FusedLayer


def broken(self, *args, **kwargs):
    raise TypeError("this release hands over something else")


FusedLayer.forward = broken
"""


@pytest.fixture
def doctor_with(tmp_path, monkeypatch):
    """``paceline doctor`` whose run's ranks execute a patch at their start; it imports no other packages."""
    monkeypatch.setattr(doctor, "_required", lambda: iter(()))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("COLUMNS", "400")

    def run(patch):
        (tmp_path / "sitecustomize.py").write_text(patch)
        return runner.invoke(app, ["doctor"])

    return run


@pytest.mark.slow
def test_doctor_names_the_reason_where_layers_run_unfused(doctor_with):
    """The main job runs, only slower."""
    done = doctor_with(BROKEN_FUSED_LAYERS)
    assert done.exit_code == 0, done.output
    assert "not used: decoding is slower" in done.output
    assert "this release hands over something else" in done.output


@pytest.mark.ci
def test_doctor_says_no_under_a_transformers_that_renames_a_keyword(doctor_with):
    """Versions and imports are in order; only a run can tell."""
    done = doctor_with(RENAMED)
    assert done.exit_code == 1, done.output
    assert "the main job cannot run here: a tiny run" in done.output
    assert "TypeError" in done.output
    assert "input_ids" in done.output


def test_bench_has_its_own_help():
    with pytest.raises(SystemExit):
        from paceline.benchmarks.main import main

        main(["--help"])
    assert "selection" in runner.invoke(app, ["bench", "--help"]).output


def _interrupted(tmp_path, ranks, number):
    """Starts a long run, sends it a signal in its first steps, and returns what it said with its exit
    status."""
    command = [
        sys.executable,
        "-m",
        "paceline.cli.main",
        "train",
        "tiny",
        f"out={tmp_path / 'run'}",
        "steps=40",
        "save_every=100",
    ]
    more = ["measure.plain_every=0", "drafter.schedule=never", "--ranks", str(ranks)]
    environment = {
        **os.environ,
        "PACELINE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    job = subprocess.Popen(
        [*command, *more],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(400):
        if (tmp_path / "run" / "metrics.jsonl").is_file() and (
            tmp_path / "run" / "metrics.jsonl"
        ).read_text().count("\n") >= 1:
            break
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.2)
    job.send_signal(number)
    return job.communicate(timeout=120)[0], job.returncode


@pytest.mark.parametrize(
    ("ranks", "number", "left_with"),
    [
        pytest.param(1, signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, 0, marks=pytest.mark.ci),
        pytest.param(1, signal.SIGTERM, 143, marks=pytest.mark.ci),
        pytest.param(2, signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_run_to_go_on_from(tmp_path, monkeypatch, ranks, number, left_with):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    fetch_policy("tiny-llama")
    said, status = _interrupted(tmp_path, ranks, number)
    assert "stopping after this step" in said
    assert re.search(r"stopped; continue with --resume\s+\S+run\s", said), said
    assert "Traceback" not in said
    assert status == left_with
    done = len(read_metrics(tmp_path / "run"))
    assert 1 <= done < 40
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert state["steps_done"] == done
