"""The trainer with vLLM's rollouts: in the process, and behind a server. Runs where vLLM is:
``make test-vllm``.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.models.loading import load_policy
from paceline.rl.models.policies import fetch_policy
from paceline.rl.monitoring.summary import read_metrics
from paceline.rollout.backends.serve_command import serve_command, serve_environment
from tests.engines import tiny_eagle3
from tests.support import ROOT
from tests.vllm.servers import environment_of_server, serving

pytestmark = pytest.mark.vllm
REWARD = (
    "def score(prompts, completions, **columns):\n    return [sum(c.isdigit() for c in t) / max(len(t), 1) "
    "for t in completions]\n"
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A policy, a drafter for it and a reward."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    policy = load_policy(fetch_policy("small-llama"), torch.device("cpu"))
    save_drafter(tiny_eagle3(policy), tmp_path / "drafter", torch.float32)
    (tmp_path / "digits.py").write_text(REWARD)
    return tmp_path


def train(home, *options):
    environment = {**os.environ, "VLLM_PLUGINS": "paceline", "PYTHONPATH": f"{ROOT}:{home}"}
    recipe = [
        "policy.model=small-llama",
        "measure.plain_every=3",
        "task.reward=digits:score",
        "save_every=1",
        "update.kl_coef=0",
    ]
    drafter = [
        f"drafter.start={home / 'drafter'}",
        "drafter.draft_vocab_size=50",  # every second token of the policy's
        "drafter.schedule=always",
        "speculation.drafters=[eagle3]",
    ]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *options]
    if "--resume" not in options:
        command[2:2] = [str(ROOT / "configs" / "tiny.yaml"), *recipe, *drafter]
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def rewards(run):
    return [m["reward/mean"] for m in read_metrics(run)]


def check(run):
    metrics = read_metrics(run)
    assert all(m["engine/logprob_gap_mean"] < 0.01 for m in metrics), [
        m["engine/logprob_gap_mean"] for m in metrics
    ]
    assert rewards(run)[-1] > rewards(run)[0] + 0.05, rewards(run)
    assert metrics[-1]["drafter/updates"] > 0
    assert [m["step"] for m in metrics if m.get("measure/rollout_speedup", 0) > 0] == [2, 5]
    assert (run / "drafter" / "model.safetensors").is_file()


def test_the_tiny_task_is_learned_in_the_process(home):
    """Rewards rise, log-probs are the trainer's own before and after a stop, the drafter is trained and
    handed over.
    """
    options = "rollout.vllm={options: {enforce_eager: true, gpu_memory_utilization: 0.5}}"
    train(home, options, "steps=6", "update.lr=3e-4", "update.minibatches=1", f"out={home / 'run'}")
    check(home / "run")
    config = json.loads((home / "run" / "config.json").read_text())
    (home / "run" / "config.json").write_text(json.dumps({**config, "steps": 7}))
    train(home, "--resume", str(home / "run"))
    assert len(rewards(home / "run")) == 7
    assert read_metrics(home / "run")[-1]["engine/logprob_gap_mean"] < 0.01
    assert not (home / "run" / "exchange").exists()


def test_the_tiny_task_is_learned_behind_a_server(home):
    port = 8731
    policy, exchange = fetch_policy("small-llama"), home / "exchange"
    options = {"depth": 2, "port": port, "max_slots": 8, "max_context": 160, "updates": True}
    command = serve_command(policy, drafter=home / "drafter", **options)
    command[0] = str(Path(sys.executable).parent / "vllm")
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.5", "--dtype", "float32"]
    environment = environment_of_server(**serve_environment(exchange, "127.0.0.1"))
    with serving(command, port, home / "server.log", environment):
        with pytest.raises(urllib.error.HTTPError, match="401"):  # a stranger changes no weights
            urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/start_weight_update", method="POST")
            )
        options = f"rollout.vllm={{servers: ['http://127.0.0.1:{port}'], exchange: '{exchange}'}}"
        train(home, options, "steps=6", "update.lr=3e-4", "update.minibatches=1", f"out={home / 'run'}")
        check(home / "run")
