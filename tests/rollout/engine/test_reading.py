"""What an engine learns of rollouts that something else has decoded, and requests that come while it
decodes."""

from dataclasses import replace

import torch

from paceline.rollout import FinishReason, Request, RolloutEngine, SamplingParams, default_tap_layers
from tests.engines import tiny_llama


def engine(model, **options):
    taps = default_tap_layers(model.config.num_hidden_layers)
    return RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=128, tap_layers=taps, **options)


def requests(count):
    return [
        Request([3, 5, 7 + i % 4], SamplingParams(max_tokens=6 + 5 * i), seed=i, group=i % 4)
        for i in range(count)
    ]


def test_traces_read_afterwards_are_those_of_decoding():
    """Also of prompts longer than one forward reads, and of more rollouts than there are slots."""
    model = tiny_llama(sharpness=4.0)
    decoded = engine(model, collect_traces=True).generate(requests(7))
    bare = [replace(r, trace=None) for r in decoded]
    engine(model, prefill_tokens=8).read_traces(bare)
    for a, b in zip(decoded, bare, strict=True):
        assert torch.equal(a.trace.token_ids, b.trace.token_ids)
        assert a.trace.num_prompt == b.trace.num_prompt
        torch.testing.assert_close(a.trace.taps, b.trace.taps, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.trace.final, b.trace.final, atol=1e-4, rtol=0)


def test_a_failed_rollout_has_no_trace():
    model = tiny_llama()
    rollout = engine(model).generate(requests(1))[0]
    nothing = replace(rollout, token_ids=[], logprobs=[], finish_reason=FinishReason.FAILED)
    both = [nothing, rollout]
    engine(model).read_traces(both)
    assert nothing.trace is None
    assert rollout.trace is not None


def test_requests_that_come_later_change_nothing_for_others():
    model = tiny_llama(sharpness=4.0)
    asked = requests(6)
    wanted = [r.token_ids for r in engine(model).generate(asked)]
    coming = [[asked[2]], [], [asked[3], asked[4]], [], [], [asked[5]]]
    over = []
    found = engine(model).generate(
        asked[:2],
        on_finish=lambda index, rollout: over.append(index),
        arrivals=lambda: coming.pop(0) if coming else [],
    )
    assert [r.token_ids for r in found] == wanted
    assert [r.request for r in found] == asked
    assert sorted(over) == list(range(6))
