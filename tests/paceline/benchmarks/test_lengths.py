"""The length benchmarks compute what their rows claim, on runs and numbers made by hand."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.benchmarks.common.plots import draw_all
from paceline.benchmarks.lengths.prediction import (
    FixedLengths,
    Observed,
    compare_orders,
    compare_predictors,
)
from paceline.benchmarks.lengths.rewards import compare_rewards
from paceline.benchmarks.lengths.tail import MITIGATIONS, compare_mitigations
from paceline.rl.lengths.predictor import Example
from paceline.rl.recipe import load_config
from paceline.rollout import Request, SamplingParams
from tests.engines import engine_for, tiny_llama
from tests.support import ROOT


def write_run(run: Path, **columns: list[float]) -> None:
    run.mkdir(parents=True)
    rows = zip(*columns.values(), strict=True)
    steps = [{"step": step, **dict(zip(columns, values, strict=True))} for step, values in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "summary.json").write_text("{}")


def no_training(line: str) -> None:
    raise AssertionError("all runs are there, so none may be trained")


def test_rewards_are_compared_seed_by_seed(tmp_path):
    """Last quarters: accuracies 0.8 and 0.6 against 0.7 and 0.6, lengths 20 and 30 against 40 and 60."""
    for name, accuracy, length in (("verbose", (0.7, 0.6), (40, 60)), ("alp", (0.8, 0.6), (20, 30))):
        for seed in range(2):
            columns = {
                "reward/exact": accuracy[seed],
                "length/mean": length[seed],
                "update/entropy": 0.1,
                "time/step": 2.0,
            }
            write_run(
                tmp_path / f"{name}-{seed}", **{key: [0.0, 0.0, 0.0, value] for key, value in columns.items()}
            )
    plain, brief = compare_rewards([Path("alp.yaml")], Path("verbose.yaml"), [0, 1], tmp_path, no_training)
    assert plain.accuracy_change == 0 and plain.length_ratio == 1
    assert (brief.accuracy, brief.length, brief.length_ratio) == pytest.approx((0.7, 25, 0.5))
    assert (brief.accuracy_change, brief.accuracy_error) == pytest.approx((0.05, 0.05))
    assert brief.seeds == [(0.8, 20), (0.6, 30)]
    (tmp_path / "lengths.json").write_text(json.dumps({"rows": [asdict(plain), asdict(brief)]}))
    assert draw_all(tmp_path) == [tmp_path / "lengths.png"]


def test_mitigations_are_compared_by_completion(tmp_path):
    keys = (
        "rollout/completions",
        "rollout/seconds",
        "time/update",
        "time/step",
        "length/mean",
        "rollout/shared_share",
        "time/wait",
    )
    more = ("reward/mean", "update/entropy", "engine/importance_std", "rollout/stale_share")
    for name, values in (("none", (64, 4, 5, 10, 40, 0, 1)), ("segments", (32, 1, 2, 4, 30, 0.25, 0))):
        columns = {key: [9e9, *[float(v)] * 3] for key, v in zip(keys, values, strict=True)}
        write_run(tmp_path / name, **columns, **{key: [0.1, 0.2, 0.3, 0.4] for key in more})
    none, cut = compare_mitigations(Path("x.yaml"), [], ["none", "segments"], tmp_path, 1, no_training)
    assert (none.step_by_completion, cut.step_by_completion) == (10 / 64, 4 / 32)
    (tmp_path / "tail.json").write_text(json.dumps({"rows": [asdict(none), asdict(cut)]}))
    assert draw_all(tmp_path) == [tmp_path / "tail.png"]
    assert cut.drawn == 0.75 and (cut.reward_before, cut.reward_after) == (0.1, 0.4)


@pytest.mark.parametrize("name", list(MITIGATIONS))
def test_mitigations_are_valid_recipes(name):
    load_config(ROOT / "configs" / "length" / "long_tail.yaml", MITIGATIONS[name])


def observed(prompts: int, samples: int) -> Observed:
    """Returns prompts whose lengths depend on the first element of their state."""
    g = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(prompts):
        state = torch.randn(16, generator=g)
        lengths = torch.exp(2.5 + 0.7 * state[0] + 0.4 * torch.randn(samples, generator=g)).clamp(1, 40)
        examples.append(Example(state, tuple(int(n) for n in lengths)))
    requests = [
        [Request([3, i % 90], SamplingParams(max_tokens=40), seed=100 * i + j) for j in range(samples)]
        for i in range(prompts)
    ]
    return Observed(requests, examples, 0)


def test_predictors_are_compared_on_prompts_they_have_not_seen():
    known, held_out = observed(96, 8).split(64)
    assert len(known.examples) == 64 and len(held_out.requests) == 32
    rows = {row.predictor: row for row in compare_predictors(known, held_out, longest=40, seeds=1)}
    assert rows["prod_d"].error_ninety == 0
    assert rows["prod_d"].at_median < rows["quantile of all prompts"].at_median
    lengths = np.array([e.lengths for e in held_out.examples])
    middle = np.median([n for e in known.examples for n in e.lengths])
    assert rows["quantile of all prompts"].at_median == pytest.approx(np.abs(lengths - middle).mean() / 2)


@pytest.mark.ci
def test_the_oracle_needs_no_more_steps_than_arrival_order():
    class Bench:
        params = SamplingParams(max_tokens=40)

        def engine(self, slots, max_tokens, drafters=None):
            engine = engine_for(tiny_llama(97), slots=slots, context=64)
            engine.use_strategy("plain")
            return engine

    known, held_out = observed(60, 4).split(40)
    rows = {row.order: row for row in compare_orders(Bench(), known, held_out, 4, None, lambda line: None)}
    assert (
        rows["longest first (oracle)"].steps
        <= rows["longest predicted first (ProD-D)"].steps
        <= rows["arrival order"].steps
    )
    tight = {row.order: row for row in compare_orders(Bench(), known, held_out, 4, 100, lambda line: None)}
    assert tight["all kept room for the longest"].preempted <= tight["arrival order"].preempted
    assert tight["all kept room for the longest"].steps > rows["arrival order"].steps


def test_unknown_requests_are_not_predicted():
    assert (
        FixedLengths({7: 3.0}).predict(Request([1], seed=7)) == 3.0
        and FixedLengths({}).predict(Request([1], seed=7)) is None
    )
