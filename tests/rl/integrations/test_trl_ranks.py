"""TRL on two ranks, with whole weights and with ZeRO 3."""

import json
import os
import subprocess
import sys

import pytest

from paceline.rl.models.policies import fetch_policy
from tests.support import ROOT

ZERO3 = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_force_ds_cpu_optimizer": False,
}


def run(folder, policy, deepspeed):
    """What each rank saw with whole weights, and what each saw with ZeRO 3."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ["-m", "tests.rl.integrations.trl_on_ranks", str(folder), str(policy), str(deepspeed)]
    done = subprocess.run(
        [*command, *script],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        [json.loads((folder / kind / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        for kind in ("whole", "parts")
    ]


@pytest.mark.ci
def test_zero3_draws_and_learns_as_whole_weights_do(tmp_path, monkeypatch):
    """Each rank decodes with the gathered weights of the moment, draws what it would have drawn, and learns
    the same.
    """
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    policy = fetch_policy("tiny-llama")
    settings = tmp_path / "zero3.json"
    settings.write_text(json.dumps(ZERO3))
    whole, parts = run(tmp_path, policy, settings)
    for ranks in (whole, parts):
        assert max(ranks[0]["errors"] + ranks[1]["errors"]) == 0
        assert ranks[0]["tokens"] != ranks[1]["tokens"]
        assert len(ranks[0]["errors"]) == 4
        assert all(ranks[0]["talk"]) and ranks[1]["talk"].count(0) > 1
    for rank in (0, 1):
        assert whole[rank]["tokens"] == parts[rank]["tokens"]
        assert whole[rank]["norms"] == pytest.approx(parts[rank]["norms"], rel=1e-4)
        assert whole[rank]["losses"] == pytest.approx(parts[rank]["losses"], abs=1e-5)
    assert (tmp_path / "parts" / "paceline" / "drafter" / "model.safetensors").is_file()
    assert (tmp_path / "parts" / "checkpoint-2" / "paceline" / "selector.json").is_file()
