"""The studies run, and compare like with like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.benchmarks.common.peers import Peers
from paceline.benchmarks.decoding.decode_step import logprob_gap, profile_step, refresh_seconds
from paceline.benchmarks.decoding.model_shapes import SHAPES
from paceline.benchmarks.decoding.plan import planned
from paceline.benchmarks.training.learning import LearningRow, compare_learning
from paceline.benchmarks.training.sharding import SHARDING_MODES, compare_sharding
from paceline.rollout import Request, SamplingParams
from tests.engines import tiny_llama
from tests.support import ROOT


def test_generate_makes_as_many_tokens_of_each_as_asked():
    requests = [Request([1 + i, 2], SamplingParams(max_tokens=3 + 4 * i), seed=i) for i in range(5)]
    ((method, tokens, seconds),) = Peers(tiny_llama(), Path("unused"), None).generate(
        2, requests, requests, repeats=1
    )
    assert (method, tokens) == ("generate", sum(r.params.max_tokens for r in requests))
    assert seconds > 0
    assert list(Peers(tiny_llama(), Path("unused"), None).vllm({"1": (1, requests, requests)}, 1)) == []


def test_the_parts_of_a_step_add_up():
    profile = profile_step(tiny_llama(), batch=2)
    assert sum(profile.parts_ms.values()) == pytest.approx(profile.forward_in_parts_ms, rel=1e-6)
    assert all(ms > 0 for ms in profile.parts_ms.values())
    assert profile.step_ms >= profile.forward_ms


def test_refresh_and_gap():
    model = tiny_llama(sharpness=4.0)
    assert refresh_seconds(model) > 0
    mean, largest = logprob_gap(
        model, [Request([1, 2, i], SamplingParams(max_tokens=20), seed=i) for i in range(4)]
    )
    assert 0 < mean <= largest < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_planned_graphs(shape):
    count, bucketed, naive = planned(shape)
    assert count < 6 * 6
    assert bucketed <= 0.35 * naive


def test_the_same_learning_in_numbers():
    """Two seeds by hand: rollouts of 10 + 10 s against 20 + 20 s; the rest of a step takes 10 s in each of
    the four runs.
    """
    speculating = [LearningRow("a", 0.6, 50.0, 10.0, 20.0), LearningRow("b", 0.8, 40.0, 10.0, 20.0)]
    plain = [LearningRow("c", 0.5, 52.0, 20.0, 30.0), LearningRow("d", 0.8, 40.0, 20.0, 30.0)]
    c = compare_learning(speculating, plain)
    assert c.reward_difference == pytest.approx(0.05) and c.reward_error == pytest.approx(0.05)
    assert c.length_difference == pytest.approx(-1.0) and c.length_error == pytest.approx(1.0)
    assert (
        c.rollout_ratio,
        c.step_ratio,
        c.bound,
        c.limit,
    ) == pytest.approx((2.0, 1.5, 1.5, 3.0))


@pytest.mark.slow
def test_every_sharding_mode_is_measured(tmp_path):
    options = ["steps=2", "measure.plain_every=0"]
    rows = compare_sharding(Path("configs/tiny.yaml"), options, tmp_path, ranks=2, log=lambda line: None)
    assert [row.way for row in rows] == list(SHARDING_MODES)
    assert all(row.loss_gap < 1e-3 and row.logprob_gap < 1e-4 for row in rows)
    assert all((row.gather > 0) == (row.way != "replicated") for row in rows)


@pytest.mark.slow
def test_speculation_end_to_end_on_a_tiny_recipe(tmp_path):
    out = tmp_path / "gpu_rl.json"
    command = [
        sys.executable,
        "launch/bench.py",
        "gpu-rl",
        "--config",
        "configs/tiny.yaml",
        "--runs",
        str(tmp_path / "runs"),
    ]
    subprocess.run(
        [*command, "--out", str(out), "steps=2"], cwd=ROOT, check=True, capture_output=True, timeout=240
    )
    record = json.loads(out.read_text())
    assert [r["strategy"] for r in record["runs"]] == ["plain", "adaptive"]
    assert record["runs"][0]["acceptance_length"] == 1
    assert record["ratios"]["rollout"] > 0


def test_the_gpu_benchmark_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, "launch/bench.py", "gpu-check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
