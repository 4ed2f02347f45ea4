"""The decoding benchmarks measure what their rows claim, on tiny models."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from paceline.benchmarks.common.plots import draw_all
from paceline.benchmarks.decoding.drafters import _stretches
from paceline.benchmarks.decoding.selection import SelectionRow
from paceline.benchmarks.decoding.verifiers import RecordingVerifier, _bounds
from paceline.rollout import Request, SamplingParams
from paceline.rollout.drafters import DraftRules
from paceline.rollout.verify import VERIFIERS
from tests.engines import engine_for, tiny_llama


@pytest.mark.parametrize(
    ("verifier", "strategy"), [("chain", "eagle3:1"), ("block", "eagle3:1"), ("recursive", "eagle3:1")]
)
def test_measured_acceptance_in_the_engine_is_theory(verifier, strategy):
    """One candidate is accepted with probability Σ min(p, q), by every verifier that takes one."""
    engine = engine_for(
        tiny_llama(97, sharpness=4.0), slots=50, context=64, rules=DraftRules("static", "replacement")
    )
    recorder = RecordingVerifier(VERIFIERS[verifier], keep=10)
    engine.verify_with(recorder)
    engine.use_strategy(strategy)
    engine.generate([Request([3, i % 90], SamplingParams(max_tokens=40), seed=i) for i in range(400)])
    assert recorder.seen > 10_000
    assert recorder.accepted / recorder.seen == pytest.approx(
        recorder.overlap / recorder.seen, abs=4 * 0.5 / recorder.seen**0.5
    )
    assert len(recorder.pairs) == 10
    for p, q in recorder.pairs:
        assert (
            p.sum() == pytest.approx(1) and q.sum() == pytest.approx(1) and len(p) == len(q) == 50
        )  # the 49 tokens of the draft vocabulary, and one for all others


def test_bounds_are_ordered():
    g = np.random.default_rng(0)
    pairs = [(g.dirichlet(np.ones(12)), g.dirichlet(np.ones(12))) for _ in range(5)]
    for row in _bounds(pairs, (1, 2, 3)):
        assert row.with_replacement <= row.bound_with + 1e-9
        assert row.spectr <= row.bound_with + 1e-9
        assert row.bound_with <= row.bound_without + 1e-6


def test_acceptance_by_position():
    engine = engine_for(tiny_llama(97, sharpness=6.0), slots=2, context=150, max_nodes=3)
    engine.use_strategy("suffix:3")
    rows = list(
        _stretches(
            "suffix",
            None,
            engine,
            [Request([3, i], SamplingParams(max_tokens=120), seed=i) for i in range(2)],
            40,
        )
    )
    assert [r.until for r in rows] == [40, 80, 120, 160]
    assert all(1 <= r.tokens_per_step <= 4 and all(0 <= level <= 1 for level in r.by_level) for r in rows)


def test_selection_rows_and_pictures(tmp_path):
    finals = {
        "plain": [50.0, 50.0],
        "suffix:4": [79.0, 81.0],
        "suffix:2": [70.0, 60.0],
        "adaptive": [77.0, 79.0],
    }
    row = SelectionRow("1", {"plain": 50.0, "suffix:2": 90.0, "suffix:4": 80.0}, finals, {"suffix:4": 9})
    assert row.best == "suffix:4"  # the lucky pass of the search does not count
    assert row.share_of_best == pytest.approx(0.975)
    assert row.over_plain == pytest.approx(1.56)
    (tmp_path / "selection.json").write_text(json.dumps({"selection, T = 1.0": [asdict(row)]}))
    sharing = [
        {"shared": s, "epoch": 0, "sample": i, "acceptance_length": 1.5}
        for s in (True, False)
        for i in range(3)
    ]
    (tmp_path / "sharing.json").write_text(json.dumps({"rows": sharing}))
    assert {p.name for p in draw_all(tmp_path)} == {"selection.png", "sharing.png"}
    assert all(p.stat().st_size > 1000 for p in draw_all(tmp_path))
