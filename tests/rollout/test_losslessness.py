"""Speculation leaves the joint distribution of the first three tokens exactly the target's."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import rollout.verify.chain as chain
from rollout import Request, SamplingParams, Strategy
from rollout.sampling import draw, processed_probs
from rollout.trees.chain import DraftTree, chain_parents
from rollout.verify import ChainUniforms, verify_chain
from tests.support import AdversarialDrafter, engine_for, tiny_llama

VOCAB = 6
PROMPT = [1, 4, 2, 4]
ALPHA = 1e-3


def exact_joint(model, params: SamplingParams) -> np.ndarray:
    """P(t1, t2, t3) by enumeration, through full forwards and transformers' own logit warpers: [6, 6, 6]."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + list(p) for p in pairs])).logits.double()
    rows = logits[:, len(PROMPT) - 1 :].flatten(0, 1)
    for warper in warpers:
        rows = warper(None, rows)
    p = torch.softmax(rows, -1).view(len(pairs), 3, VOCAB)
    joint = np.zeros((VOCAB,) * 3)
    for row, (a, b) in enumerate(pairs):
        joint[a, b] = (p[row, 0, a] * p[row, 1, b] * p[row, 2]).numpy()
    return joint


def chi_square_p(counts: np.ndarray, joint: np.ndarray) -> float:
    """p-value of a chi-square test; cells expected fewer than 5 times are pooled, impossible ones must be empty."""
    total = counts.sum()
    assert counts[joint == 0].sum() == 0, "a token of probability zero was produced"
    expected = joint[joint > 0] * total
    seen = counts[joint > 0]
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    return float(stats.chisquare(seen, expected * total / expected.sum()).pvalue)


def joint_counts(engine, strategy, params: SamplingParams, samples: int) -> np.ndarray:
    engine.use_strategy(strategy)
    counts = np.zeros((VOCAB,) * 3)
    for start in range(0, samples, 20000):
        requests = [Request(PROMPT, params, seed=start + i, group="g") for i in range(20000)]
        for rollout in engine.stream(requests):
            counts[tuple(rollout.token_ids)] += 1
    return counts


@pytest.fixture(scope="module")
def model():
    return tiny_llama(VOCAB, layers=2, sharpness=12.0)


DRAFTERS = [("suffix", {}), ("eagle3", {"eagle3_sampling": True}), ("adversarial", {})]
CUTS = [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.6, "top_k": 4, "top_p": 0.9}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("drafter", "options"), DRAFTERS, ids=lambda x: str(x))
def test_engine_joint_distribution(model, drafter, options, cut):
    params = SamplingParams(max_tokens=3, **cut)
    engine = engine_for(model, slots=1000, context=16, max_depth=2, **options)
    counts = joint_counts(engine, Strategy(drafter, 2), params, samples=200_000)
    assert chi_square_p(counts, exact_joint(model, params)) > ALPHA


def pure_counts(samples: int, sampled: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The verifier alone on a fixed two-step process: counts of (t1, t2), and their exact joint."""
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(1 + VOCAB, VOCAB, generator=g) * 1.5, -1)  # row 0: first token; row 1 + t: after t
    q = torch.softmax(torch.randn(VOCAB, generator=g) * 1.5, -1).expand(samples, 1, VOCAB)
    token = torch.multinomial(q[0, 0], samples, replacement=True, generator=g)
    draft = DraftTree(token[:, None], chain_parents(samples, 1), torch.ones(samples, dtype=torch.long), q if sampled else None)
    target = torch.stack([p[0].expand(samples, VOCAB), p[1 + token]], 1)
    u = ChainUniforms(
        torch.rand(samples, 2, dtype=torch.float64, generator=g), torch.rand(samples, 1, dtype=torch.float64, generator=g)
    )
    out = verify_chain(target, draft, u)
    first = torch.where(out.accepted > 0, token, out.next_token)
    fresh = draw(p[1 + first], torch.rand(samples, dtype=torch.float64, generator=g))
    second = torch.where(out.accepted > 0, out.next_token, fresh)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (first.numpy(), second.numpy()), 1)
    return counts, (p[0][:, None] * p[1:]).double().numpy()


@pytest.mark.parametrize("sampled", [True, False])
def test_verifier_alone(sampled):
    counts, joint = pure_counts(1_000_000, sampled)
    assert chi_square_p(counts, joint / joint.sum()) > ALPHA


def test_the_test_sees_a_wrong_residual(monkeypatch):
    """Drawing from p instead of the residual after a rejection is the classic mistake: the tests above must notice it."""
    monkeypatch.setattr(chain, "residual", lambda p, q, vocabulary: p)
    counts, joint = pure_counts(1_000_000, sampled=True)
    assert chi_square_p(counts, joint / joint.sum()) < 1e-6


def test_the_engine_test_sees_a_wrong_residual(model, monkeypatch):
    monkeypatch.setattr(chain, "residual", lambda p, q, vocabulary: p)
    params = SamplingParams(max_tokens=3)
    engine = engine_for(model, slots=1000, context=16, max_depth=2)
    counts = joint_counts(engine, Strategy("adversarial", 2), params, samples=40_000)
    assert chi_square_p(counts, exact_joint(model, params)) < 1e-6


def test_the_test_sees_a_wrong_acceptance(monkeypatch):
    """Accepting with probability p(x) instead of min(1, p(x)/q(x)) must be noticed too."""
    monkeypatch.setattr(chain, "_draft_mass", lambda draft: torch.ones(draft.tokens.shape))
    counts, joint = pure_counts(1_000_000, sampled=True)
    assert chi_square_p(counts, joint / joint.sum()) < 1e-6


def test_acceptance_rate_is_the_overlap():
    """P(accept) = Σ min(p, q) (Leviathan et al., theorem 3.5)."""
    g = torch.Generator().manual_seed(3)
    p, q = torch.softmax(torch.randn(2, VOCAB, generator=g), -1)
    n = 400_000
    token = torch.multinomial(q, n, replacement=True, generator=g)
    draft = DraftTree(token[:, None], chain_parents(n, 1), torch.ones(n, dtype=torch.long), q.expand(n, 1, VOCAB))
    u = ChainUniforms(torch.rand(n, 2, dtype=torch.float64, generator=g), torch.rand(n, 1, dtype=torch.float64, generator=g))
    rate = verify_chain(p.expand(n, 2, VOCAB), draft, u).accepted.double().mean()
    assert abs(float(rate) - float(torch.minimum(p, q).sum())) < 4 * 0.5 / n**0.5


def test_deterministic_drafts_give_the_tokens_of_plain_decoding():
    """Stronger than equal in law: with the same seeds, suffix and greedy EAGLE-3 drafts change no token."""
    model = tiny_llama(97, sharpness=6.0)
    engine = engine_for(model, slots=6)
    requests = [Request([5, 6, 7, i % 3], SamplingParams(max_tokens=50), seed=i, group=i % 3) for i in range(18)]
    plain = [r.token_ids for r in engine.generate(requests)]
    for strategy in (Strategy("suffix", 5), Strategy("eagle3", 4)):
        engine.use_strategy(strategy)
        assert [r.token_ids for r in engine.generate(requests)] == plain


@pytest.mark.parametrize("strategy", ["plain", Strategy("suffix", 4), Strategy("eagle3", 3), Strategy("adversarial", 3)], ids=str)
def test_a_result_does_not_depend_on_its_neighbours(strategy):
    model = tiny_llama(97, sharpness=6.0)
    requests = [Request([5, 6, i], SamplingParams(max_tokens=20), seed=i) for i in range(10)]
    together, alone = engine_for(model, slots=4, eagle3_sampling=True), engine_for(model, slots=1, eagle3_sampling=True)
    if strategy == Strategy(
        "adversarial", 3
    ):  # its own randomness is a stream over calls; only deterministic-by-seed drafters qualify
        together.drafters["adversarial"] = alone.drafters["adversarial"] = AdversarialDrafter(97, sampled=False)
    for engine in (together, alone):
        engine.use_strategy(strategy)
    expected = [alone.generate([r])[0].token_ids for r in requests]
    assert [r.token_ids for r in together.generate(requests)] == expected


def test_processed_probs_match_transformers_warpers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 500, generator=g) * 3
    for t, k, p in [(0.7, 0, 1.0), (1.0, 20, 1.0), (1.3, 0, 0.8), (0.9, 50, 0.6)]:
        rows = TemperatureLogitsWarper(t)(None, logits)
        rows = TopKLogitsWarper(k)(None, rows) if k else rows
        rows = TopPLogitsWarper(p)(None, rows) if p < 1 else rows
        mine = processed_probs(logits[:, None], [SamplingParams(temperature=t, top_k=k, top_p=p)] * 40)[:, 0]
        torch.testing.assert_close(mine, torch.softmax(rows, -1), rtol=1e-4, atol=1e-6)


def test_draw_never_returns_a_token_of_weight_zero():
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(2000, 1000, generator=g) * (torch.rand(2000, 1000, generator=g) < 0.01)
    weights[:, 7] += 1e-3
    u = torch.rand(2000, dtype=torch.float64, generator=g)
    u[:10], u[10:20] = 0.0, 1 - 2.0**-53
    assert (weights.gather(1, draw(weights, u)[:, None]) > 0).all()
