"""Admission, preemption, pauses and cancellations change when tokens are made, never which."""

import pytest
import torch

from paceline.rollout import FinishReason, Request, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.engine.scheduler import Scheduler
from paceline.rollout.length_estimate import ObservedLengths
from paceline.rollout.sequence import SequenceState
from tests.engines import engine_for, tiny_llama

TOKEN_BYTES = 2 * 4 * 2 * 16 * 4 + 4 * 64 * 4  # keys and values of the tiny model's 4 layers, and its taps


@pytest.fixture(scope="module")
def model():
    return tiny_llama(sharpness=4.0)


@pytest.fixture(scope="module")
def requests():
    g = torch.Generator().manual_seed(3)
    made = []
    for i in range(16):
        prompt = torch.randint(1, 97, (int(torch.randint(1, 150, (1,), generator=g)),), generator=g).tolist()
        made.append(
            Request(
                prompt,
                SamplingParams(max_tokens=int(torch.randint(1, 200, (1,), generator=g))),
                seed=i,
                group=i % 5,
            )
        )
    return made


@pytest.fixture(scope="module")
def expected(model, requests):
    return [engine_for(model, slots=1, context=400).generate([r])[0].token_ids for r in requests]


STRATEGIES = ["plain", Strategy("suffix", 4), Strategy("eagle3", 3)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_small_cache_preempts_and_changes_nothing(model, requests, expected, strategy):
    engine = engine_for(model, slots=8, context=400, kv_memory_bytes=TOKEN_BYTES * 900, collect_traces=True)
    assert engine.runner.cache.tokens == 900
    engine.use_strategy(strategy)
    rollouts = engine.generate(requests)
    assert [r.token_ids for r in rollouts] == expected
    assert sum(r.stats.preempted for r in rollouts) > 0, "the cache was large enough: nothing was tested"
    for rollout in rollouts:
        if rollout.stats.preempted:  # what is read again must leave the drafter's training data whole
            assert (rollout.trace.final[rollout.trace.num_prompt - 1 :].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_prompts_read_in_pieces_change_nothing(model, requests, expected, strategy):
    engine = engine_for(model, slots=8, context=400, prefill_tokens=7)
    engine.use_strategy(strategy)
    assert [r.token_ids for r in engine.generate(requests)] == expected


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_paused_rollouts_resume_to_the_same_result(model, requests, expected, strategy):
    engine = engine_for(model, slots=6, context=400)
    engine.use_strategy(strategy)
    pending, done, calls = dict(enumerate(requests)), {}, 0
    while pending:
        keys = list(pending)
        rollouts = engine.generate([pending[k] for k in keys], token_budget=300)
        made = sum(
            len(r.token_ids) - len(r.request.resume.token_ids if r.request.resume else []) for r in rollouts
        )
        assert made <= 300 + 6 * 8
        for key, rollout in zip(keys, rollouts, strict=True):
            assert len(rollout.token_ids) == len(rollout.logprobs) == sum(n for _, n in rollout.segments)
            if rollout.finish_reason is FinishReason.PAUSED:
                r = requests[key]
                pending[key] = Request(r.prompt_ids, r.params, r.seed, r.group, resume=rollout)
            else:
                done[key] = rollout
                del pending[key]
        engine.refresh_weights()
        calls += 1
    assert calls > 3
    assert [done[i].token_ids for i in range(len(requests))] == expected
    longest = max(done.values(), key=lambda r: len(r.token_ids))
    versions = [version for version, _ in longest.segments]
    assert len(versions) > 1
    assert versions == sorted(set(versions))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_segments_of_each_sequence_change_nothing(model, requests, expected, strategy):
    engine = engine_for(model, slots=6, context=400)
    engine.use_strategy(strategy)
    pending, done = dict(enumerate(requests)), {}
    while pending:
        keys = list(pending)
        for key, rollout in zip(
            keys, engine.generate([pending.pop(k) for k in keys], segment=40), strict=True
        ):
            earlier = len(rollout.request.resume.token_ids) if rollout.request.resume else 0
            r = requests[key]
            if rollout.finish_reason is FinishReason.PAUSED:
                assert 40 <= len(rollout.token_ids) - earlier <= 40 + engine.max_nodes
                pending[key] = Request(r.prompt_ids, r.params, r.seed, r.group, resume=rollout)
            else:
                done[key] = rollout
    assert [done[i].token_ids for i in range(len(requests))] == expected


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_what_branches_off_in_flight_is_what_resuming_alone_gives(model, strategy, slots, monkeypatch):
    engine = engine_for(model, slots=slots, context=400, collect_traces=True)
    engine.use_strategy(strategy)
    requests = [Request([3, 1, 4, i], SamplingParams(max_tokens=60), seed=i) for i in range(4)]
    branches, read = [], []

    def at_mark(reached):
        made = [
            Request(r.request.prompt_ids, r.request.params, 100 + i, resume=r)
            for i, r in reached
            if len(r.token_ids) < 40
        ]
        branches.extend(made)
        return made

    prefill = engine.runner.prefill
    monkeypatch.setattr(
        engine.runner, "prefill", lambda chunks: read.extend(len(c.tokens) for c in chunks) or prefill(chunks)
    )
    rollouts = engine.generate(requests, mark=25, on_mark=at_mark)
    assert len(rollouts) == 4 + len(branches) and len(branches) >= 4
    assert [r.request for r in rollouts] == [*requests, *branches]
    alone = engine_for(model, slots=1, context=400)
    assert [r.token_ids for r in rollouts] == [alone.generate([r.request])[0].token_ids for r in rollouts]
    for rollout in rollouts:
        assert (rollout.trace.final[rollout.trace.num_prompt - 1 :].abs().sum(-1) > 0).all()
    if slots == 8:
        assert max(read) <= 4, "what two have in common was read again"


def test_resume_is_checked(model):
    engine = engine_for(model)
    paused = engine.generate([Request([1, 2], SamplingParams(max_tokens=50))], token_budget=5)[0]
    finished = engine.generate([Request([1, 2], SamplingParams(max_tokens=2))])[0]
    for request, says in (
        (Request([1, 3], SamplingParams(max_tokens=50), resume=paused), "another prompt"),
        (Request([1, 2], SamplingParams(max_tokens=50), resume=finished), "not a paused rollout"),
        (Request([1, 2], SamplingParams(max_tokens=3), resume=paused), "raise max_tokens"),
    ):
        rollout = engine.generate([request])[0]
        assert rollout.finish_reason is FinishReason.FAILED
        assert says in rollout.error


def test_cancelled_requests_return_what_they_have(model, requests, expected):
    engine = engine_for(model, slots=4, context=400)
    victims = {0, 5, 15}
    steps = 0

    def on_step(record):
        nonlocal steps
        steps += 1
        if steps == 3:
            for i in victims:
                engine.cancel(requests[i])

    rollouts = engine.generate(requests, on_step)
    for i, rollout in enumerate(rollouts):
        if i in victims and rollout.finish_reason is FinishReason.CANCELLED:
            assert rollout.token_ids == expected[i][: len(rollout.token_ids)]
        else:
            assert rollout.token_ids == expected[i]
    assert sum(r.finish_reason is FinishReason.CANCELLED for r in rollouts) >= 2
    assert engine.generate(requests[:1])[0].token_ids == expected[0], "a cancellation outlived its call"


def test_a_failing_callback_leaves_a_usable_engine(model, requests, expected):
    engine = engine_for(model, slots=4, context=400)

    def on_step(record):
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        engine.generate(requests, on_step)
    assert not engine.scheduler.has_work
    assert [r.token_ids for r in engine.generate(requests[:4])] == expected[:4]


@pytest.mark.parametrize("length", [100, 128])
def test_a_slot_is_copied_also_where_it_is_full(model, length):
    """A whole span from slot 0 to one other slot: the shape that once met torch's check for overlapping
    memory.
    """
    engine = engine_for(model, slots=3, context=400)
    cache = engine.runner.cache
    for slot in range(3):
        cache.taps[slot] = slot + 1
        cache.lines(0)[:, slot] = slot + 1
    cache.copy_slot(0, [2], length)
    assert (cache.taps[2, :length] == 1).all()
    assert (cache.lines(0)[:, 2, :, :length] == 1).all()
    assert (cache.lines(0)[:, 1] == 2).all()


def test_the_longest_predicted_come_first():
    lengths = ObservedLengths()
    for tokens in (10, 12):
        lengths.observe(Request([1], group="short"), tokens)
    lengths.observe(Request([1], group="long"), 90)
    scheduler = Scheduler(2, lengths)
    sequences = [
        SequenceState(Request([1], group=g), i, 200) for i, g in enumerate(("short", "long", "short", "new"))
    ]
    scheduler.submit(sequences)
    assert scheduler.waiting[0].index == 1
    assert {s.index for s in list(scheduler.waiting)[2:]} == {0, 2}
    assert lengths.predict(Request([1], group="short")) < 15 < lengths.predict(Request([1], group="new")) < 90


def test_longest_first_needs_fewer_steps_than_arrival_order(model):
    """One long request that arrives last: known, it runs beside the short ones; unknown, alone after them."""
    short = [
        Request([i + 1, 2], SamplingParams(temperature=0, max_tokens=10), group="short") for i in range(12)
    ]
    long = Request([50, 2], SamplingParams(temperature=0, max_tokens=60), group="long")
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=4, max_context=100)
    engine.scheduler.lengths.observe(short[0], 10)
    engine.scheduler.lengths.observe(long, 10)
    engine.generate([*short, long])
    arrival = len(engine.records)
    engine.generate([*short, long])
    assert len(engine.records) <= arrival - 15


def test_a_group_learned_from_one_call_orders_the_next(model):
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=2, max_context=100)
    engine.add_drafter(SuffixDrafter())
    requests = [
        Request([1, i + 1], SamplingParams(temperature=0, max_tokens=5 + 10 * i), group=i) for i in range(6)
    ]
    engine.generate(requests)
    started = [r.request.group for r in engine.stream(requests)]
    assert started.index(5) < started.index(0), (
        "the longest of the last call should be among the first to start"
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_prompt_is_read_once_while_its_samples_follow_each_other(model, strategy, monkeypatch):
    """Samples admitted when a slot becomes free take their prompt's keys from a sibling's slot."""
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    asked = [
        Request(prompts[i // 8], SamplingParams(max_tokens=10 + 7 * (i % 3)), seed=i, group=i // 8)
        for i in range(16)
    ]
    alone = [engine_for(model, slots=1, context=64).generate([r])[0] for r in asked]
    engine = engine_for(model, slots=3, context=64, collect_traces=True)
    engine.use_strategy(strategy)
    read = []
    original = engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda pieces: read.extend(pieces) or original(pieces))
    rollouts = engine.generate(asked)
    assert [list(piece.tokens) for piece in read] == prompts
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in alone]
    for rollout in rollouts:
        with torch.no_grad():
            final = model.model(rollout.trace.token_ids[None, :-1]).last_hidden_state[0]
        torch.testing.assert_close(
            rollout.trace.final[rollout.trace.num_prompt - 1 :], final[rollout.trace.num_prompt - 1 :]
        )
    read.clear()
    engine.refresh_weights()
    engine.generate(asked[:2])
    assert len(read) == 1  # a new call reads anew: the weights may be others
