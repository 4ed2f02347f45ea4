"""Aggregation, summary and report, from hand-made records."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.rl.errors import UserError
from paceline.rl.learner.critic import CriticReport
from paceline.rl.learner.updater import UpdateReport
from paceline.rl.monitoring.metrics import step_metrics
from paceline.rl.monitoring.report import write_picture, write_report
from paceline.rl.monitoring.summary import rise_std_error, summarise, table


def rank(step: int, number: int, plain: float | None = None) -> dict:
    begin = 0.1 * number
    end = 2.0 + number
    return {
        "problems": [f"{number}"] * 4,
        "rewards": [0.0, 1.0, 1.0, float(step > 1)],
        "shaped": [0.0, 0.5, 0.5, 0.5],
        "score_timeouts": number,
        "score_errors": 2,
        "advantages": [0.0] * 4,
        "lengths": [5, 10, 15, 20 + number],
        "truncated": 1,
        "carried": number,
        "anytime": [0.5, number],
        "drawn": 40,
        "stale": 5 * number,
        "loops": number,
        "length_errors": [1.0, 3.0],
        "failed": 0,
        "sequence_steps": 25,
        "drafted": 30,
        "accepted": 20,
        "strategies": {"plain": 3},
        "by_drafter": {"suffix": {"sequence_steps": 10, "committed": 25, "draft_ms": 7}},
        "rollout_seconds": end - begin,
        "plain_seconds": plain,
        "plain_identical": None if plain is None else 1.0,
        "tail": [(0.5, 4, "plain"), (1.0, 2, "suffix:3"), (2.0, 1, "suffix:6")],
        "peak_bytes": 10**9,
        "gpu_peak_bytes": (number + 1) * 10**9,
        "spans": [("rollout", begin, end), ("drafter", end, end + 1.5), ("update", 4.6, 6.6)],
        "drafter": asdict(
            LearnerReport(
                updates=2,
                tokens=100,
                loss=1.0 + number,
                acceptance=[0.5, 0.25],
                approved=2 * number,
                snapshot_seconds=0.1 * number,
                slowdown=(None, 0.04)[number] if step < 3 else 0.08 - 0.02 * number,
                slowdown_error=0.01 + 0.01 * number,
                held_back_seconds=1.0 + number,
            )
        ),
        "update": asdict(
            UpdateReport(
                tokens=50,
                loss=5.0,
                entropy=25.0,
                engine_gap=0.5,
                engine_gap_max=0.1,
                weights=50.0,
                weights_squared=62.5,
                truncated=5.0,
                grad_norm=1.0,
            )
        ),
        # returns of half 0 and half 1, a fifth of their variance unexplained
        "critic": asdict(CriticReport(tokens=40, loss=4.0, returns=20.0, squares=20.0, errors=2.0)),
    }


def test_step_metrics_by_hand():
    m = step_metrics([rank(0, 0, plain=4.0), rank(0, 1, plain=5.8)], group_size=4)
    assert m["reward/mean"] == 0.5
    assert m["reward/by_problem"] == {"0": 0.5, "1": 0.5}
    assert m["length/max"] == 21
    assert m["reward/shaped"] == 0.375 and m["length/pinball"] == 2.0
    assert m["rollout/shared_share"] == pytest.approx(1 - 80 / 101)
    assert m["anytime/accuracy"] == [0.5, 0.5]
    assert (
        m["rollout/carried"] == 1
        and m["rollout/stale_share"] == pytest.approx(5 / 101)
        and m["length/loops"] == 1 / 8
    )
    assert m["engine/importance_std"] == pytest.approx(0.5)
    assert m["rollout/seconds"] == pytest.approx(2.9)
    assert m["measure/rollout_speedup"] == pytest.approx(5.8 / 2.9)
    assert m["rollout/acceptance_length"] == pytest.approx((101 - 8) / 50)
    assert m["rollout/acceptance_length_suffix"] == pytest.approx(2.5)
    assert m["rollout/active_mean"] == pytest.approx((0.5 * 4 + 0.5 * 2 + 1.0 * 1) / 2)
    assert m["rollout/speculating_share"] == pytest.approx(1.5 / 2)
    assert m["rollout/drafting_share"] == pytest.approx(0.014 / 4)
    assert m["update/entropy"] == 0.5
    assert m["engine/importance_truncated"] == pytest.approx(0.1)
    assert m["engine/effective_share"] == pytest.approx(100**2 / (100 * 125))
    assert m["critic/loss"] == pytest.approx(0.1) and m["critic/explained_variance"] == pytest.approx(0.8)
    assert m["reward/timeouts"] == 1 and m["reward/errors"] == 4
    assert m["drafter/acceptance"] == [0.5, 0.25]
    assert m["memory/peak_gb"] == 2.0 and m["memory/gpu_peak_gb"] == 2.0
    assert m["drafter/approved"] == 2 and m["drafter/snapshot_seconds"] == 0.1
    assert m["time/step"] == pytest.approx(6.6)


def test_what_training_costs_ranks_that_decode():
    """Each machine has its own price, of which the highest counts, with its error."""
    first, last = (step_metrics([rank(step, number) for number in range(2)], 4) for step in (0, 3))
    assert (first["drafter/slowdown"], first["drafter/slowdown_error"]) == (0.04, 0.02)
    assert (last["drafter/slowdown"], last["drafter/slowdown_error"]) == (0.08, 0.01)
    assert first["drafter/held_back_seconds"] == 3.0
    summary = summarise([first, last])
    assert summary["drafter_slowdown"] == pytest.approx(0.06)
    assert summary["drafter_slowdown_error"] == pytest.approx(0.015)
    assert summary["drafter_seconds_held_back"] == 6.0
    printed = table_text(summary)
    assert "6.0 s held back" in printed
    assert "peak memory of a GPU" in printed
    assert "peak memory of a GPU" not in table_text({**summary, "gpu_peak_memory_gb": 0.0})
    assert "training beside decoding slows it by" in printed and "6.0% ± 1.5%" in printed


def test_a_run_in_which_it_was_not_measured_says_nothing_of_it():
    """So it is where one rank trains, and in runs of earlier versions."""
    metrics = step_metrics([rank(0, 0)], 4)
    assert "drafter/slowdown" not in metrics
    del metrics["drafter/held_back_seconds"]
    summary = summarise([metrics])
    assert "drafter_slowdown" not in summary and summary["drafter_seconds_held_back"] == 0
    assert "slows it by" not in table_text(summary)


def table_text(summary: dict) -> str:
    """What is printed at the end of a run."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table(summary))
    return console.file.getvalue()


def test_drafter_time_on_and_off_the_critical_path():
    """Rank 0 trains from 2.0 to 3.5, rank 1 from 3.0 to 4.5; the last rollout ends at 3.0.

    So rank 0's first second is free, and the step waits from 3.0 to 4.5.
    """
    m = step_metrics([rank(0, 0), rank(0, 1)], group_size=4)
    assert m["drafter/seconds"] == pytest.approx(3.0)
    assert m["drafter/seconds_off_path"] == pytest.approx(1.0)
    assert m["drafter/seconds_on_path"] == pytest.approx(1.5)


def test_paired_standard_error():
    """Differences 0.1, 0.3: mean 0.2, sample std 0.1414, over √2 is 0.1, though the problems differ by
    0.8."""
    first = [{"reward/by_problem": {"a": 0.0, "b": 0.8}}]
    last = [{"reward/by_problem": {"b": 1.1, "a": 0.1}}]
    assert rise_std_error(first, last) == pytest.approx(0.1)
    assert rise_std_error(first, [{"reward/by_problem": {"c": 0.0, "d": 0.8}}]) == pytest.approx(
        np.sqrt(2 * 0.32 / 2)
    )


def test_report_holds_every_plot_and_summary_the_bound(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    with (tmp_path / "metrics.jsonl").open("w") as a, (tmp_path / "timeline.jsonl").open("w") as b:
        for step in range(4):
            ranks = [rank(step, n, plain=6.0 if step == 3 else None) for n in range(2)]
            a.write(json.dumps({"step": step, **step_metrics(ranks, 4)}) + "\n")
            b.write(json.dumps({"step": step, "ranks": ranks}) + "\n")
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
    assert write_picture(tmp_path, tmp_path / "p.png").stat().st_size > 20_000
    summary = summarise([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()])
    assert summary["rollout_speedup"] == pytest.approx(6.0 / 2.9)
    assert summary["speculation"][0] in page and "2.07x" in summary["speculation"][0]
    # a step lasts from 0 to 6.6; plainly 3.1 more, of which rollouts take 6
    assert summary["step_speedup"] == pytest.approx(9.7 / 6.6)
    assert summary["step_speedup_bound"] == pytest.approx(9.7 / 3.7)


def test_the_error_of_the_speedup_is_that_of_paired_steps():
    """Cochran's estimator by hand: ratio 1.5, residuals 4 − 3, 6 − 6 and 8 − 9, mean adaptive time 4."""
    steps = [step_metrics([rank(i, 0, plain=4.0), rank(i, 1, plain=5.8)], group_size=4) for i in range(3)]
    for m, plain, adaptive in zip(steps, (4.0, 6.0, 8.0), (2.0, 4.0, 6.0), strict=True):
        m |= {"step": 5, "measure/plain_seconds": plain, "measure/adaptive_seconds": adaptive}
    summary = summarise(steps)
    assert summary["rollout_speedup"] == pytest.approx(1.5)
    assert summary["rollout_speedup_error"] == pytest.approx(((1 + 0 + 1) / 2 / 3) ** 0.5 / 4)
    assert "rollout_speedup_error" not in summarise(steps[:1])


def test_vllm_is_compared_by_as_many_other_tokens():
    unlike = {"plain_identical": None}
    m = step_metrics([rank(0, 0, plain=4.0) | unlike, rank(0, 1, plain=5.8) | unlike], group_size=4)
    assert m["measure/rollout_speedup"] == pytest.approx(5.8 / 2.9)
    assert "measure/identical" not in m
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(summarise([m])))
    assert "2.00x over 1 steps; other tokens, as many" in console.export_text()
