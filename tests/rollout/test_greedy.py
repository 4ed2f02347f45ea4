"""Greedy rollouts are those of transformers' generate, whatever drafts and in whatever order."""

import pytest
import torch

from paceline.rollout import PLAIN, FinishReason, Request, SamplingParams, Strategy
from tests.engines import engine_for, tiny_llama

STRATEGIES = [
    PLAIN,
    Strategy("suffix", 4),
    Strategy("eagle3", 3),
    Strategy("adversarial", 3),
    Strategy("eagle3", 4, 3, 9),
    Strategy("suffix", 4, 2, 6),
    Strategy("parallel", 4),
    "adaptive",
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def requests_and_references(model):
    generator = torch.Generator().manual_seed(1)
    requests, references = [], []
    for i in range(40):
        length = int(torch.randint(1, 48, (1,), generator=generator))
        prompt = torch.randint(0, 97, (length,), generator=generator)
        tokens = int(torch.randint(1, 60, (1,), generator=generator))
        mask = torch.ones(1, length, dtype=torch.long)  # else generate hides token 0, the padding id
        made = model.generate(
            prompt[None], attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        requests.append(
            Request(prompt.tolist(), SamplingParams(temperature=0, max_tokens=tokens), group=i % 7)
        )
        references.append(made[0, length:].tolist())
    return requests, references


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_generate(model, requests_and_references, strategy, reverse):
    requests, references = requests_and_references
    if reverse:
        requests, references = requests[::-1], references[::-1]
    engine = engine_for(model, max_nodes=9)
    engine.use_strategy(strategy)
    rollouts = engine.generate(requests)
    assert [r.token_ids for r in rollouts] == references
    assert all(r.finish_reason is FinishReason.LENGTH for r in rollouts)


def test_suffix_drafts_are_accepted_on_repetitive_text(model, requests_and_references):
    """A random model at temperature 0 loops, so a suffix drafter that works must commit clearly more than a
    token a step.
    """
    engine = engine_for(model)
    engine.use_strategy(Strategy("suffix", 4))
    rollouts = engine.generate(requests_and_references[0])
    assert sum(r.stats.accepted for r in rollouts) > 0.3 * sum(len(r.token_ids) for r in rollouts)


def test_stream_yields_short_ones_first(model):
    engine = engine_for(model)
    requests = [Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=n)) for n in (30, 5, 12)]
    assert [len(r.token_ids) for r in engine.stream(requests)] == [5, 12, 30]


def test_abandoned_stream_leaves_a_usable_engine(model, requests_and_references):
    requests, references = requests_and_references
    engine = engine_for(model)
    engine.use_strategy(Strategy("eagle3", 3))
    stream = engine.stream(requests)
    next(stream)
    stream.close()
    assert [r.token_ids for r in engine.generate(requests[:8])] == references[:8]
