"""Whatever request is made, it fails alone: its neighbours' tokens are what they are without it."""

import gc
import math
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.rollout import EngineBusyError, FinishReason, Request, RolloutEngine, SamplingParams
from paceline.rollout.counter_rng import Stream, uniforms
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.sampling import processed_probs
from tests.engines import engine_for, tiny_llama
from tests.rollout.engine.odd_requests import odd_request


def letters(ids) -> str:
    return "".join(chr(65 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def engine() -> RolloutEngine:
    return engine_for(tiny_llama(sharpness=4.0, layers=2), slots=3, context=64, decode_text=letters)


@pytest.fixture(scope="module")
def good():
    return [
        Request([3, 1, 4, i], SamplingParams(max_tokens=7 + i, top_k=9 * (i % 2)), seed=2**63 + i, group="g")
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def expected(engine, good):
    return [(r.token_ids, r.logprobs) for r in engine.generate(good)]


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.sampled_from(["plain", "suffix:3", "eagle3:2"]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_an_odd_request_fails_alone(engine, good, expected, seed, places, strategy):
    rng = random.Random(seed)
    mixed, own = list(good), list(range(len(good)))
    for place in sorted(places, reverse=True):
        try:
            mixed.insert(place, odd_request(rng))
        except ValueError as error:  # `SamplingParams` names the field at once
            assert "\n" not in str(error)
            continue
        own = [i + (i >= place) for i in own]
    engine.use_strategy(strategy)
    rollouts = engine.generate(mixed)
    assert len(rollouts) == len(mixed)
    assert [rollouts[i].token_ids for i in own] == [tokens for tokens, _ in expected]
    odd = set(range(len(mixed))) - set(own)
    for i, (_, logprobs) in zip(own, expected, strict=True):
        assert rollouts[i].logprobs == pytest.approx(logprobs, abs=1e-4)
    for i in odd:
        assert rollouts[i].request is mixed[i]
        if rollouts[i].finish_reason is FinishReason.FAILED:
            assert rollouts[i].error and "\n" not in rollouts[i].error and len(rollouts[i].error) < 300
        else:
            assert rollouts[i].error is None and rollouts[i].token_ids
            assert all(not math.isnan(x) for x in rollouts[i].logprobs)


def test_a_refused_neighbour_leaves_every_bit(good):
    def decode(requests):
        made = engine_for(tiny_llama(sharpness=4.0, layers=2), slots=3, context=64)
        made.use_strategy("eagle3:2")
        return [(r.token_ids, r.logprobs) for r in made.generate(requests) if r.error is None]

    refused = [Request([1, 97]), None, Request([1], seed="1"), Request([1], group=[])]
    assert decode([x for pair in zip(good, refused, strict=True) for x in pair]) == decode(good)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (None, "request is None"),
        (Request("text"), "prompt_ids is 'text': pass a list of token ids"),
        (Request([1.0, 2.0]), "prompt_ids is"),
        (Request([1], params=None), "params is None"),
        (Request([1], seed=1.5), "seed is 1.5: pass an integer"),
        (Request([1], group=[1]), "group is [1], which is not hashable"),
        (Request([1], resume="x"), "resume is not a paused rollout"),
    ],
)
def test_the_line_says_what_was_wrong(engine, request_, says):
    assert engine.generate([request_])[0].error.startswith(says)


@pytest.mark.parametrize(
    "values",
    [
        *(
            {"top_k": 1.5},
            {"max_tokens": 2.5},
            {"max_tokens": True},
            {"top_p": "1"},
            {"temperature": None},
            {"temperature": 10**400},
        ),
        *(
            {"stop_strings": (1,)},
            {"stop_token_ids": (math.nan,)},
            {"stop_token_ids": "x"},
            {"max_tokens": torch.tensor([1])},
        ),
    ],
    ids=str,
)
def test_sampling_params_of_another_type_name_the_field(values):
    with pytest.raises(ValueError, match=f"^{next(iter(values))} is .*: write "):
        SamplingParams(**values)


def test_numbers_of_other_libraries_become_pythons():
    params = SamplingParams(
        np.float32(0.5), torch.tensor(3), np.float64(0.9), np.int64(4), np.array([1, 2]), "end"
    )
    assert params == SamplingParams(0.5, 3, 0.9, 4, (1, 2), ("end",))
    assert [
        type(x) for x in (params.temperature, params.top_k, params.max_tokens, params.stop_token_ids[0])
    ] == [
        float,
        int,
        int,
        int,
    ]
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)


def test_seeds_count_modulo_two_to_the_64(engine):
    def tokens(seed):
        return engine.generate([Request([5, 6], SamplingParams(max_tokens=12), seed=seed)])[0].token_ids

    assert tokens(5) == tokens(2**64 + 5) == tokens(np.uint64(5)) == tokens(5 - 2**64)
    assert tokens(-1) == tokens(2**64 - 1)
    assert len({tuple(tokens(s)) for s in (5, 2**63, 2**63 + 1, -(2**63) + 2, 2**64 - 1)}) == 5
    together = engine.generate(
        [Request([5, 6], SamplingParams(max_tokens=12), seed=2**63 + i) for i in range(5)]
    )
    assert len({tuple(r.token_ids) for r in together}) == 5


def test_large_seeds_keep_their_last_bits():
    seeds = np.array([2**63, 2**63 + 1, 2**64 - 1], dtype=np.uint64)
    numbers = uniforms(seeds, np.zeros((3, 1), dtype=np.int64), Stream.TARGET)
    assert len(set(numbers.flatten().tolist())) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperatures_beyond_float32(dtype):
    """The limits in probability: a point mass on the largest, and the same for all."""
    logits = torch.tensor([[[3.0, 5.0, -1e3, 4.96875, -torch.inf]]], dtype=dtype)
    for scale in (1.0, 1e3):
        for t in (1e-300, 1e-45, 1e-42, 1e-38, 1e-20):
            probs = processed_probs(logits * scale, [SamplingParams(temperature=t)])
            assert probs[0, 0].tolist() == [0, 1, 0, 0, 0]
        for t in (1e38, 1e39, 1e308):
            probs = processed_probs(logits * scale, [SamplingParams(temperature=t)])
            torch.testing.assert_close(probs[0, 0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0]))


@pytest.mark.parametrize("rules", [None, "drawn"])
def test_temperatures_beyond_float32_in_the_engine(rules):
    from paceline.rollout.drafters import DraftRules

    made = engine_for(
        tiny_llama(sharpness=4.0, layers=2),
        context=64,
        rules=DraftRules("static", "replacement") if rules else None,
    )
    for strategy in ("plain", "eagle3:3", "adversarial:3"):
        made.use_strategy(strategy)

        def decode(temperature, top_k=0, made=made):
            params = SamplingParams(temperature, top_k, max_tokens=12)
            return made.generate([Request([3, i], params, seed=i) for i in range(4)])

        greedy = [r.token_ids for r in decode(0)]
        for t in (1e-300, 1e-42, 1e-38):
            assert [r.token_ids for r in decode(t)] == [r.token_ids for r in decode(t, 50)] == greedy
        for rollout in decode(1e308):
            assert rollout.logprobs == pytest.approx([-math.log(97)] * 12, abs=1e-4)


def test_a_decoder_that_fails_fails_its_own_request(good, expected):
    def decode(ids):
        raise OverflowError("no such id\nat all")

    made = engine_for(tiny_llama(sharpness=4.0, layers=2), slots=3, context=64, decode_text=decode)
    rollouts = made.generate([*good, Request([1, 2], SamplingParams(stop_strings=("x",)))])
    assert [r.token_ids for r in rollouts[:4]] == [tokens for tokens, _ in expected]
    assert rollouts[4].error == "decode_text failed: OverflowError: no such id at all"


@pytest.mark.parametrize(
    "bound",
    [{"token_budget": -1}, {"segment": 0}, {"segment": 1.5}, {"mark": "x"}, {"token_budget": math.nan}],
)
def test_bounds_of_a_call_are_checked(engine, good, bound):
    with pytest.raises(ValueError, match=f"^{next(iter(bound))} is .*: write an integer"):
        engine.generate(good, **bound)


@pytest.mark.parametrize("requests", [None, 5, "ab", Request([1]), {}])
def test_what_is_no_list_of_requests(engine, requests):
    with pytest.raises(ValueError, match="pass a list of"):
        engine.generate(requests)


def calls_of(engine):
    return {
        "generate": lambda: engine.generate([Request([1])]),
        "stream": lambda: next(engine.stream([Request([1])])),
        "refresh_weights": engine.refresh_weights,
        "add_drafter": lambda: engine.add_drafter(SuffixDrafter()),
        "use_strategy": lambda: engine.use_strategy("plain"),
        "adapt": engine.adapt,
        "verify_with": lambda: engine.verify_with("chain"),
        "prompt_states": lambda: engine.prompt_states([[1, 2]]),
        "read_traces": lambda: engine.read_traces([]),
    }


CALLS = (
    *("generate", "stream", "refresh_weights", "add_drafter", "use_strategy", "adapt"),
    *("verify_with", "prompt_states", "read_traces"),
)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_else_while_a_stream_is_unfinished(engine, good, expected, call):
    engine.use_strategy("plain")
    version, stream = engine.policy_version, engine.stream(good)
    got = [next(stream)]
    with pytest.raises(EngineBusyError, match="while the engine serves another call") as busy:
        calls_of(engine)[call]()
    assert isinstance(busy.value, ValueError) and "\n" not in str(busy.value)
    got += list(stream)
    assert sorted(r.token_ids for r in got) == sorted(tokens for tokens, _ in expected)
    assert engine.policy_version == version
    assert [r.token_ids for r in engine.generate(good)] == [tokens for tokens, _ in expected]


class ConsumersError(Exception):
    pass


def consume_and_break(engine, good):
    for _ in engine.stream(good):
        break


def consume_and_raise(engine, good):
    with pytest.raises(ConsumersError):
        for _ in engine.stream(good):
            raise ConsumersError


def raise_on_finish(engine, good):
    def on_finish(index, rollout):
        raise ConsumersError

    with pytest.raises(ConsumersError):
        engine.generate(good, on_finish=on_finish)


def close_early(engine, good):
    stream = engine.stream(good)
    next(stream)
    stream.close()


def lose_in_a_cycle(engine, good):
    cycle: list = [engine.stream(good)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()


def never_begin(engine, good):
    stream = engine.stream(good)
    assert engine.generate(good[:1])
    del stream


@pytest.mark.parametrize(
    "abandon",
    [consume_and_break, consume_and_raise, raise_on_finish, close_early, lose_in_a_cycle, never_begin],
)
def test_an_abandoned_stream_leaves_every_slot_free(engine, good, expected, abandon):
    engine.use_strategy("eagle3:2")
    abandon(engine, good)
    assert not engine.scheduler.has_work
    assert not any(engine.drafters["eagle3"]._seen)
    assert [r.token_ids for r in engine.generate(good)] == [tokens for tokens, _ in expected]


def test_a_call_from_a_callback_is_refused(engine, good):
    engine.use_strategy("plain")

    def on_step(record):
        engine.generate(good)

    with pytest.raises(EngineBusyError):
        engine.generate(good, on_step)
    assert engine.generate(good)


def test_of_two_threads_one_is_served_and_one_is_told(engine, good, expected):
    engine.use_strategy("plain")
    inside, told = threading.Event(), threading.Event()
    found: list = []

    def on_step(record):
        inside.set()
        assert told.wait(30)

    def first():
        found.append(engine.generate(good, on_step))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(EngineBusyError):
        engine.generate(good)
    told.set()
    thread.join(30)
    assert [r.token_ids for r in found[0]] == [tokens for tokens, _ in expected]


def test_preempted_sequences_of_an_abandoned_call_are_forgotten():
    made = engine_for(tiny_llama(sharpness=4.0, layers=2), slots=4, context=120, kv_memory_bytes=600_000)
    suffix = made.drafters["suffix"]
    stream = made.stream(
        [Request([1, i], SamplingParams(max_tokens=100, temperature=0)) for i in range(1, 9)]
    )
    next(stream)
    stream.close()
    assert not suffix._groups
