"""Bad requests fail alone, with a line that helps; limits and stops do what the docstrings say."""

import math

import pytest
import torch

from paceline.rollout import FinishReason, Request, RolloutEngine, SamplingParams, Strategy
from tests.engines import engine_for, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(sharpness=4.0)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_strings": ("",)}, "stop_strings"),
    ],
)
def test_sampling_params_name_the_bad_field(values, names):
    with pytest.raises(ValueError, match=names):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], SamplingParams(), "empty"),
        ([1] * 200, SamplingParams(), "200 tokens"),
        ([1, 97], SamplingParams(), "outside 0..96"),
        ([1, -1], SamplingParams(), "outside"),
        ([1], SamplingParams(stop_strings=("x",)), "decode_text"),
    ],
)
def test_a_bad_request_fails_alone(model, prompt, params, says):
    engine = engine_for(model)
    good = Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=8))
    expected = engine.generate([good])[0].token_ids
    rollouts = engine.generate([good, Request(prompt, params), good])
    assert rollouts[1].finish_reason is FinishReason.FAILED
    assert says in rollouts[1].error
    assert "\n" not in rollouts[1].error
    assert [rollouts[0].token_ids, rollouts[2].token_ids] == [expected, expected]


@pytest.mark.parametrize("strategy", ["plain", Strategy("eagle3", 3)], ids=str)
def test_nan_logits_fail_one_sequence_and_poison_nothing(model, strategy):
    """A token whose embedding is NaN breaks only the sequence that holds it, and not the next one in its
    slot.
    """
    broken = tiny_llama(sharpness=4.0)
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = math.nan
        broken.lm_head.weight[50] = 0.0
    engine = engine_for(broken, slots=2)
    engine.use_strategy(strategy)
    good = Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=12))
    expected = engine.generate([good])[0].token_ids
    assert 50 not in expected
    rollouts = engine.generate([Request([1, 50, 3], SamplingParams(max_tokens=12)), good, good, good])
    assert rollouts[0].finish_reason is FinishReason.FAILED
    assert "not finite" in rollouts[0].error
    assert [r.token_ids for r in rollouts[1:]] == [expected] * 3


def test_the_context_ends_a_rollout(model):
    rollout = engine_for(model, context=20).generate(
        [Request([1] * 15, SamplingParams(temperature=0, max_tokens=100))]
    )[0]
    assert len(rollout.token_ids) == 5
    assert rollout.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("strategy", ["plain", Strategy("suffix", 4), Strategy("adversarial", 4)], ids=str)
def test_stop_token_ends_and_is_kept(model, strategy):
    engine = engine_for(model)
    free = engine.generate([Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=40))])[0].token_ids
    stop = free[10]
    first = free.index(stop)
    engine.use_strategy(strategy)
    rollout = engine.generate(
        [Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=40, stop_token_ids=(stop,)))]
    )[0]
    assert rollout.token_ids == free[: first + 1]
    assert rollout.finish_reason is FinishReason.STOP
    assert len(rollout.logprobs) == first + 1


def letters(ids) -> str:
    return "".join(chr(65 + i % 26) for i in ids)


@pytest.mark.parametrize("strategy", ["plain", Strategy("suffix", 4)], ids=str)
def test_stop_string_across_tokens(model, strategy):
    engine = engine_for(model, decode_text=letters)
    free = letters(
        engine.generate([Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=40))])[0].token_ids
    )
    wanted = free[6:9]
    engine.use_strategy(strategy)
    params = SamplingParams(temperature=0, max_tokens=40, stop_strings=(wanted,))
    rollout = engine.generate([Request([1, 2, 3], params)])[0]
    assert letters(rollout.token_ids) == free[: free.index(wanted) + 3]
    assert rollout.finish_reason is FinishReason.STOP


def test_stop_string_never_met_runs_to_max_tokens(model):
    engine = engine_for(model, decode_text=letters)
    params = SamplingParams(temperature=0, max_tokens=17, stop_strings=("never this",))
    rollout = engine.generate([Request([1, 2, 3], params)])[0]
    assert len(rollout.token_ids) == 17
    assert rollout.finish_reason is FinishReason.LENGTH


def test_cache_size_is_checked_before_it_is_allocated(model):
    with pytest.raises(
        MemoryError, match=r"needs 0\.000215 GB for one sequence of 210 tokens, 0\.0001 GB are allowed"
    ):
        RolloutEngine(model, dtype=torch.float32, max_slots=64, max_context=200, kv_memory_bytes=100_000)


def test_strategies_are_checked(model):
    engine = engine_for(model)
    with pytest.raises(ValueError, match="not added"):
        engine.use_strategy(Strategy("medusa", 3))
    with pytest.raises(ValueError, match="max_nodes"):
        engine.use_strategy(Strategy("suffix", 20))
    with pytest.raises(ValueError, match="depth of at least 1"):
        Strategy("suffix", 0)
