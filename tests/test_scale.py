"""The main job in parts: ZeRO 3 with a critic, two machines, and ranks that die."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import train_here
from tests.test_end_to_end import ROOT, finish, steps_of, train

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    reward = "    return [sum(c.isdigit() for c in t) / max(len(t), 1) for t in completions]\n"
    (tmp_path / "digits.py").write_text("def digits(prompts, completions, **columns):\n" + reward)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.ci
def test_a_run_in_parts_goes_on_with_fewer_ranks(tmp_path):
    """ZeRO 3 on two ranks, with a critic, a reference and groups asked again; then the rest of it on one
    rank.
    """
    run = tmp_path / "run"
    said = finish(
        train(
            "configs/tiny.yaml",
            f"out={run}",
            "steps=2",
            "scale.deepspeed=tests/rl/sharding/zero3_in_parts.json",
            "update.advantage=gae",
            "task.reward=digits:digits",
        )
    )
    assert "FutureWarning" not in said and "Setting accelerator" not in said
    first = steps_of(run)
    assert all(m["time/gather"] > 0 and m["critic/loss"] > 0 for m in first)
    assert max(m["engine/logprob_gap_max"] for m in first) < 1e-4, "the engine decodes with what was gathered"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 3}))
    done = subprocess.run(
        [*LAUNCHER, "--standalone", "--nproc_per_node", "1", "launch/train.py", "--resume", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = steps_of(run)
    assert [m["step"] for m in steps] == [0, 1, 2]
    assert max(m["engine/logprob_gap_max"] for m in steps) < 1e-4


@pytest.mark.ci
def test_two_machines(tmp_path):
    """The README's command for two nodes, over loopback: FSDP2 on adapters; what is left is a policy and an
    adapter of peft's.
    """
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = [
        f"out={run}",
        "steps=2",
        "scale={fsdp2: true, lora: {rank: 4}}",
        "task.reward=digits:digits",
        "update.lr=1e-2",
    ]
    nodes_of_one = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    nodes = [
        subprocess.Popen(
            [
                *LAUNCHER,
                *nodes_of_one,
                "--rdzv-endpoint",
                endpoint,
                "launch/train.py",
                "configs/tiny.yaml",
                *options,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert max(m["engine/logprob_gap_max"] for m in steps_of(run)) < 1e-4
    merged = load_file(run / "checkpoint" / "policy" / "model.safetensors")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "cache" / "models" / "tiny-llama")
    adapted = PeftModel.from_pretrained(start, run / "checkpoint" / "adapter").merge_and_unload().state_dict()
    assert all((tensor - adapted[name]).abs().max() < 1e-5 for name, tensor in merged.items())


def fails(phase: str, *options: str) -> str:
    """Trains on two ranks, of which one dies, or sleeps, in a phase of the second step. What the launcher
    says of it.
    """
    command = [
        *LAUNCHER,
        "--standalone",
        "--nproc_per_node",
        "2",
        "tests/dying_rank.py",
        phase,
        "configs/tiny.yaml",
    ]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "task.reward=digits:digits", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and time.monotonic() - begin < 90
    return done.stderr


PHASES = ["update", "rollout", "score", "reference", "drafter", "wait", "gather", "sync", "save"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_dies_ends_the_job(tmp_path, phase):
    """In any phase, also of a policy in parts: the launcher ends the others at once, and the run goes on from
    its last step.
    """
    run = tmp_path / "run"
    assert "exitcode  : 9" in fails(phase, f"out={run}", "steps=4", "scale.fsdp2=true")
    assert [m["step"] for m in steps_of(run)] == ([0, 1] if phase == "save" else [0])
    if phase == "update":
        finish(train("--resume", str(run)))
        assert [m["step"] for m in steps_of(run)] == [0, 1, 2, 3]


@pytest.mark.ci
def test_a_rank_that_hangs_is_not_waited_for_longer_than_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HANG", "1")
    assert "imed out" in fails("update", f"out={tmp_path / 'run'}", "scale.timeout_minutes=0.1")


@pytest.mark.ci
def test_ranks_share_what_they_learn_of_lengths_and_go_on_with_open_groups(tmp_path, monkeypatch):
    """Segments, a reward that looks at all groups, and a predictor: two ranks, then one that takes over the
    open groups of both.
    """
    run = tmp_path / "run"
    stops = "rollout.stop_strings=['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']"
    length = "length={rewards: [{name: grpo_lambda, share: 0.5}], correct_from: 0.1, predictor: prod_d}"
    options = [
        "steps=3",
        "rollout.segment_tokens=6",
        stops,
        length,
        "measure.plain_every=0",
        "task.reward=digits:digits",
        "task.size=40",
    ]
    finish(train("configs/tiny.yaml", f"out={run}", *options))
    state = json.loads((run / "checkpoint" / "state.json").read_text())
    assert state["open"] and (run / "checkpoint" / "lengths.safetensors").is_file()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 5}))
    monkeypatch.syspath_prepend(tmp_path)  # the reward's
    train_here(monkeypatch, "--resume", str(run))
    asked = [key for m in steps_of(run) for key in m["reward/by_problem"]]
    assert {group["key"] for group in state["open"]} <= set(asked) | {
        group["key"] for group in json.loads((run / "checkpoint" / "state.json").read_text())["open"]
    }
    assert all(m["length/mean"] > 0 for m in steps_of(run))
