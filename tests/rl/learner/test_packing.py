"""Packed batches: nothing lost, nothing mixed, and the same log-probs and gradients as one sequence at a
time.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.rl.errors import UserError
from paceline.rl.learner.log_probs import PolicyLogProbs, TokenScores
from paceline.rl.learner.packing import PromptRow, Sample, pack, plan
from tests.engines import tiny_llama

rows_strategy = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=5
)


def make_rows(shape, seed=0) -> list[PromptRow]:
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, 97, (n,), generator=g).tolist()

    rows, index = [], 0
    for prompt, samples in shape:
        made = tuple(Sample(index + i, tokens(n)) for i, n in enumerate(samples))
        index += len(samples)
        rows.append(PromptRow(tokens(prompt), made))
    return rows


@settings(max_examples=60, deadline=None)
@given(rows_strategy, st.integers(8, 60))
def test_plan_keeps_every_sample_once_within_budget(shape, budget):
    rows = make_rows(shape)
    bins = plan(rows, budget)
    members = sorted(s.index for b in bins for row in b for s in row.samples)
    assert members == sorted(s.index for row in rows for s in row.samples)
    for b in bins:
        single = len(b) == 1 and len(b[0].samples) == 1
        assert single or sum(row.length for row in b) <= budget


@settings(max_examples=25, deadline=None)
@given(rows_strategy)
def test_packed_equals_one_by_one(shape):
    rows = make_rows(shape)
    model = tiny_llama()
    expected = []
    with torch.no_grad():
        for row in rows:
            for sample in row.samples:
                ids = torch.tensor([[*row.prompt, *sample.tokens]])
                full = torch.log_softmax(model(ids).logits[0, len(row.prompt) - 1 : -1] / 0.8, -1)
                expected.append(full.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0])
    with torch.no_grad():
        logprobs, _ = PolicyLogProbs(model)(pack(rows), 0.8)
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_and_their_gradients_are_autograds(temperature):
    """Of log-probs and entropies, over more rows than are worked on at a time, beside torch's own derivation
    in float64.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 70_000, generator=generator) * 3
    targets = torch.randint(0, 70_000, (11,), generator=generator)
    of_logprob, of_entropy = torch.randn(11, generator=generator), torch.randn(11, generator=generator)
    found = logits.clone().requires_grad_()
    logprobs, entropies = TokenScores.apply(found, targets, temperature)
    ((logprobs * of_logprob).sum() + (entropies * of_entropy).sum()).backward()
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact / temperature, -1)
    expected = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ((expected[0] * of_logprob).sum() + (expected[1] * of_entropy).sum()).backward()
    torch.testing.assert_close(logprobs, expected[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected[1].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


def test_gradients_equal_those_of_unpacked_sequences():
    rows = make_rows([(5, [7, 3, 9]), (2, [4]), (6, [1, 8])])
    reference, packed = tiny_llama(), tiny_llama()
    for row in rows:
        for sample in row.samples:
            ids = torch.tensor([[*row.prompt, *sample.tokens]])
            full = torch.log_softmax(reference(ids).logits[0, len(row.prompt) - 1 : -1], -1)
            (full.gather(-1, torch.tensor(sample.tokens)[:, None]).sum() * (sample.index + 1)).backward()
    batch = pack(rows)
    logprobs, entropy = PolicyLogProbs(packed)(batch, 1.0)
    (logprobs * (torch.tensor(batch.members)[batch.owner] + 1)).sum().backward()
    assert entropy.shape == logprobs.shape
    for (name, a), (_, b) in zip(reference.named_parameters(), packed.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_entropy_is_that_of_the_tempered_distribution():
    rows = make_rows([(3, [5])])
    model = tiny_llama(sharpness=5.0)
    with torch.no_grad():
        ids = torch.tensor([[*rows[0].prompt, *rows[0].samples[0].tokens]])
        p = torch.distributions.Categorical(logits=model(ids).logits[0, 2:-1] / 0.7)
        _, entropy = PolicyLogProbs(model)(pack(rows), 0.7)
    torch.testing.assert_close(entropy, p.entropy(), rtol=1e-4, atol=1e-4)


def test_empty_prompt_or_sample_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        pack([PromptRow([], (Sample(0, [1]),))])


def test_a_model_that_caps_its_logits_is_refused():
    model = tiny_llama()
    plain = model.forward
    model.forward = lambda **kw: (lambda out: type(out)(logits=torch.tanh(out.logits * 50)))(plain(**kw))
    with pytest.raises(UserError, match="caps or scales"):
        PolicyLogProbs(model)
