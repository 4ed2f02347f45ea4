"""What the check of a GPU computes, as far as that needs none."""

import random
from dataclasses import replace

import pytest
import torch

from paceline.benchmarks.decoding.model_shapes import SHAPES
from paceline.benchmarks.gpu import reasoner
from paceline.benchmarks.gpu.check import product_checks, reasoner_checks, shape_checks, update_checks
from paceline.benchmarks.gpu.products import ProductReport, products_of
from paceline.benchmarks.gpu.shapes import ShapeReport, bytes_read
from paceline.benchmarks.gpu.update import UpdateReport
from paceline.rollout import FinishReason, Request, Rollout, SamplingParams
from paceline.rollout.api import RolloutStats
from paceline.rollout.model.kv_cache import CacheShape
from tests.engines import engine_for, tiny_llama

GOOD = ShapeReport(
    "1.5B",
    graphs={"planned": 15, "captured": 15, "planned bytes": 100, "used bytes": 105},
    steps=[(1, 1, 2.0, 1.0), (1, 8, 2.2, 1.0), (32, 1, 2.5, 1.2), (32, 8, 4.0, 1.2)],
    parts=[("plain", 1, 0.0, 2.0, 0.5, 3.0), ("eagle3:3", 1, 0.9, 2.0, 0.5, 4.0)],
    memory={"planned": 100, "used": 95},
    plain=[(1, 300.0, 250.0), (8, 2000.0, None)],
    syncs={"plain": 1.1, "eagle3:3": 1.0, "eagle3:4x4/7": 2.0},
)


def failed(report: ShapeReport) -> list[str]:
    return [check.name for check in shape_checks(report) if not check.passed]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"graphs": {**GOOD.graphs, "captured": 14}}, "1.5B graphs"),
        ({"fallbacks": {"a reason": 1}}, "1.5B graphs"),
        ({"graphs": {**GOOD.graphs, "used bytes": 300}}, "1.5B memory of graphs"),
        ({"steps": [*GOOD.steps, (8, 1, 4.0, 1.0)]}, "1.5B decode step"),
        ({"steps": [*GOOD.steps, (1, 8, 3.5, 1.0)]}, "1.5B verification"),
        ({"parts": [*GOOD.parts, ("eagle3:3", 8, 1.2, 2.0, 0.5, 4.0)]}, "1.5B drafting"),
        ({"memory": {"planned": 100, "used": 120}}, "1.5B memory of the engine"),
        ({"syncs": {**GOOD.syncs, "plain": 2.0}}, "1.5B syncs, plain"),
        ({"plain": [(1, 200.0, 250.0)]}, "1.5B plain, batch 1"),
    ],
)
def test_each_shortfall_fails_its_line(change, name):
    assert failed(GOOD) == []
    assert failed(replace(GOOD, **change)) == [name]


def test_slow_products_or_rows_that_depend_on_others_fail_their_line():
    good = ProductReport("8B", "qkv", 32, microseconds=20.0, torch=30.0, floor=15.0, rows_differ=0)
    slow, wide = replace(good, microseconds=31.0), replace(good, rows=256, microseconds=40.0)
    found = [
        [c.name for c in product_checks("8B", [good, other]) if not c.passed]
        for other in (wide, slow, replace(good, rows_differ=1))
    ]
    assert found == [[], ["8B products"], ["8B rows of products"]]
    assert products_of(SHAPES["8B"])["qkv"] == ((4096, 1024, 1024), 4096)


def test_a_slow_update_or_one_that_outgrows_its_plan_fails_its_line():
    good = UpdateReport(tokens=4096, seconds=0.2, share=0.4, planned=100, used=95)
    changes = ({}, {"share": 0.2}, {"used": 120})
    found = [[c.name for c in update_checks(replace(good, **change)) if not c.passed] for change in changes]
    assert found == [[], ["update, speed"], ["update, memory of activations"]]


def test_the_least_that_a_forward_reads():
    cache = CacheShape(28, 2, 128, 32, 1024, 0, torch.bfloat16)
    weights = 1_543_656_960
    assert bytes_read(cache, weights, 1, 1) == 2 * weights + 513 * 28672
    assert bytes_read(cache, weights, 32, 8) == 2 * weights + 32 * 520 * 28672


def test_the_reasoner_is_asked_for_partial_sums():
    asked, said = reasoner.problem(random.Random(0), 5)
    digits = [int(d) for d in asked.rstrip("=").split("+")]
    assert [int(s) for s in said.split(";")] == [sum(digits[: i + 1]) for i in range(5)]
    request = Request([1])
    ids = reasoner._ids(said)
    right = Rollout(request, ids, [0.0] * len(ids), FinishReason.STOP, RolloutStats())
    assert reasoner._is_right(right, said.split(";")[-1])
    assert not reasoner._is_right(right, said.split(";")[0])


def test_an_adaptive_reasoner_slower_than_plain_decoding_fails_its_line():
    speeds = {"plain": [100.0, 80.0], "eagle3:3": [60.0, 60.0], "adaptive": [110.0, 50.0]}
    rows = [(batch, strategy, rounds) for batch in (1, 8) for strategy, rounds in speeds.items()]
    rows[2] = (1, "adaptive", [110.0, 90.0])
    report = reasoner.ReasonerReport(0.5, 0.1, (1.0, 1.0), 2.5, rows, [])
    found = [(check.name, check.passed) for check in reasoner_checks(report)]
    assert found == [
        ("reasoner drafter", True),
        ("reasoner adaptive, batch 1", True),
        ("reasoner adaptive, batch 8", False),
    ]


def test_strategies_of_the_reasoner_take_turns(monkeypatch):
    monkeypatch.setattr(reasoner, "_BANDIT_SECONDS", 0.2)
    engine = engine_for(tiny_llama(layers=1), slots=2, context=60)
    requests = [Request([1, 2, 3 + i], SamplingParams(max_tokens=12), seed=i, group=i) for i in range(2)]
    ran = []

    def decode(*args, original=reasoner.decode_anew):
        speed = original(*args)
        ran.append({record.strategy for record in engine.records})
        return speed

    monkeypatch.setattr(reasoner, "decode_anew", decode)
    found = reasoner._speeds(engine, requests, requests)
    assert {name: len(rounds) for name, rounds in found.items()} == dict.fromkeys(reasoner._STRATEGIES, 4)
    rounds = ran[-12:]
    assert rounds[0::3] == [{"plain"}] * 4 and rounds[1::3] == [{"eagle3:3"}] * 4


def test_training_labels_cover_completions_only():
    texts, labels = reasoner._training_batch(random.Random(0))
    equals = reasoner._TEXT.index("=")
    for text, label in zip(texts, labels, strict=True):
        start = text.tolist().index(equals) + 1
        assert (label[:start] == -100).all()
        assert int(label[start]) == int(text[start])
