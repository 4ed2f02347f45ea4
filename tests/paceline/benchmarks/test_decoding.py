"""The decoding benchmarks measure what their rows claim, on tiny models."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from paceline.benchmarks.common.harness import Measurement, Workload
from paceline.benchmarks.common.plots import draw_all
from paceline.benchmarks.decoding.drafters import _stretches
from paceline.benchmarks.decoding.rollout import _fastest, measure_methods
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


def workload(slots):
    requests = [Request([3, 4], SamplingParams(max_tokens=5), seed=0)]
    return Workload(str(slots), slots, requests, requests)


BENCH = SimpleNamespace(
    repeats=1,
    drafter=None,
    engine=lambda slots, max_tokens: None,
    measure=lambda w, method, strategy, engine: Measurement(w.name, method, 5, 1.0),
)
PEERS = SimpleNamespace(
    generate=lambda slots, timed, warm, repeats: [("generate", 5, 1.0)],
    llama=lambda timed, warm, repeats: [("llama.cpp f16", 5, 1.0)],
    vllm=lambda workloads, repeats: [(name, "vLLM plain", 5, 1.0) for name in workloads],
)


def test_peers_are_measured_where_they_can_be():
    """llama.cpp decodes one sequence at a time, vLLM and generate any number."""
    rows = measure_methods(BENCH, [workload(1), workload(4)], PEERS, lambda line: None)
    methods = {name: {row.method for row in rows if row.workload == name} for name in "14"}
    assert methods["4"] == {"generate", "plain", "suffix:4", "adaptive", "vLLM plain"}
    assert methods["1"] == methods["4"] | {"llama.cpp f16"}
    rows = measure_methods(BENCH, [workload(1)], None, lambda line: None)
    assert [row.method for row in rows] == ["plain", "suffix:4", "adaptive"]


def test_only_what_is_wanted_is_measured_beside_plain_decoding():
    rows = measure_methods(BENCH, [workload(1)], PEERS, lambda line: None, ["suffix", "llama.cpp"])
    assert [row.method for row in rows] == ["plain", "suffix:4", "llama.cpp f16"]


def test_the_fastest_round_of_each_method_counts():
    seconds = [("4", "plain", 3.0), ("1", "plain", 2.0), ("4", "vLLM plain", 5.0), ("4", "plain", 1.0)]
    rows = [Measurement(name, method, 5, s) for name, method, s in seconds]
    best = _fastest([workload(1), workload(4)], rows)
    assert [(m.workload, m.method, m.seconds) for m in best] == [
        ("1", "plain", 2.0),
        ("4", "plain", 1.0),
        ("4", "vLLM plain", 5.0),
    ]


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
