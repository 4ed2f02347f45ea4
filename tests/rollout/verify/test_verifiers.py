"""Every verifier × tree keeps the target's law, accepts as often as theory says, and is no worse than what it
improves on.
"""

import numpy as np
import pytest
import torch

from paceline.rollout.trees.expander import draw_without_replacement
from paceline.rollout.verify import block, chain, recursive, spectr
from paceline.rollout.verify import outcome as outcome_module
from paceline.rollout.verify.optimal import (
    chain_acceptance,
    deterministic_acceptance,
    optimal_acceptance,
    optimal_acceptance_lp,
    recursive_acceptance,
    spectr_acceptance,
)
from tests.power import samples_for
from tests.rollout.verify.verifier_cases import FITTING, LEVELS, VOCAB, Process, p_value, run

ALPHA = 1e-3
# One candidate's acceptance in SpecTr, the least visible of the dropped factors, has an effect of 0.0039.
SAMPLES = samples_for(0.0039, VOCAB**LEVELS, alpha=1e-6)
SAMPLES_OF_LAWS = samples_for(0.0039, VOCAB**LEVELS, ALPHA)
SAMPLES_OF_RATES = 20_000


@pytest.mark.parametrize("narrow", [False, True], ids=["whole vocabulary", "trimmed vocabulary"])
@pytest.mark.parametrize(("tree", "verifier"), FITTING, ids=str)
def test_law_of_three_tokens(tree, verifier, narrow):
    process = Process(narrow=narrow)
    counts, _ = run(process, tree, verifier, SAMPLES_OF_LAWS, seed=1)
    assert p_value(counts, process.joint()) > ALPHA


WRONG = {
    "chain: p instead of the residual": ("chain", "chain", chain, "residual", lambda p, q, ids: p),
    "chain: q left out of the ratio": (
        "chain",
        "chain",
        chain,
        "draft_mass",
        lambda d: torch.ones(d.tokens.shape),
    ),
    "block: weight left out of the residual": (
        "chain",
        "block",
        block,
        "_weighted_residual",
        lambda p, w, d, n: outcome_module.subtract(p, *outcome_module.drawn_from(d, n)),
    ),
    "block: q left out of the ratio": (
        "chain",
        "block",
        block,
        "draft_mass",
        lambda d: torch.ones(d.tokens.shape),
    ),
    "recursive: p kept after a rejection": (
        "static without",
        "recursive",
        recursive,
        "residual",
        lambda p, q, ids: p,
    ),
    "recursive: residual not normalised": (
        "static with",
        "recursive",
        recursive,
        "residual",
        lambda p, q, ids: outcome_module.subtract(p, q, ids),
    ),
    "spectr: ρ of one candidate": (
        "static with",
        "spectr",
        spectr,
        "select_rho",
        lambda p, q, count: (torch.ones_like(p[:, 0]), 1 - (1 - torch.minimum(p, q).sum(-1)).pow(count)),
    ),
    "spectr: one candidate's acceptance": (
        "static with",
        "spectr",
        spectr,
        "select_rho",
        lambda p, q, count: (count.double(), torch.minimum(q, p / count[:, None]).sum(-1)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_dropped_factor_is_seen(name, monkeypatch):
    tree, verifier, module, attribute, wrong = WRONG[name]
    monkeypatch.setattr(module, attribute, wrong)
    process = Process()
    counts, _ = run(process, tree, verifier, SAMPLES, seed=1)
    assert p_value(counts, process.joint()) < 1e-6


def test_siblings_reported_without_what_was_drawn_before_are_seen(monkeypatch):
    """Drawing without replacement but reporting q itself is the classic mistake of multi-candidate
    drafting."""
    from paceline.rollout.trees import sampled

    def wrong(probs, noise, count):
        columns, _ = draw_without_replacement(probs, noise, count)
        return columns, probs.unsqueeze(-2).expand(*columns.shape, -1).contiguous()

    monkeypatch.setattr(sampled, "draw_without_replacement", wrong)
    process = Process()
    counts, _ = run(process, "static without", "recursive", SAMPLES, seed=1)
    assert p_value(counts, process.joint()) < 1e-6


def test_a_tree_pruned_by_what_was_drawn_is_seen(monkeypatch):
    """Leaving out drawn nodes for being unlikely biases what is kept: trees of drawn tokens may not be ranked
    afterwards.
    """
    import tests.rollout.verify.verifier_cases as cases

    def pruned(chooser, uniform):
        draft = cases.grow_chain(chooser, 1, uniform)
        kept = draft.probs.gather(-1, draft.tokens[..., None])[:, 0, 0] > 0.3
        draft.lengths = kept.long()
        return draft

    monkeypatch.setitem(cases.BUILDERS, "chain", pruned)
    process = Process()
    counts, _ = run(process, "chain", "chain", SAMPLES, seed=1)
    assert p_value(counts, process.joint()) < 1e-6


def first_distributions(seed: int) -> tuple[Process, np.ndarray, np.ndarray]:
    process = Process(seed)
    return process, process.target[0].numpy(), process.drafter[0].double().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_measured_acceptance_is_theory(seed):
    """Of the first level: within four standard errors, each verifier."""
    process, p, q = first_distributions(seed)
    theory = {
        ("chain", "chain"): chain_acceptance(p, q),
        ("static with", "recursive"): recursive_acceptance(p, q, 3, replacement=True),
        ("static with", "spectr"): spectr_acceptance(p, q, 3),
        ("static without", "recursive"): recursive_acceptance(p, q, 3, replacement=False, draws=200_000),
        ("dynamic", None): deterministic_acceptance(p, q, 3),
    }
    for (tree, verifier), expected in theory.items():
        _, accepted = run(process, tree, verifier, SAMPLES_OF_RATES, seed=2)
        assert abs(float((accepted > 0).double().mean()) - expected) < 4 * 0.5 / SAMPLES_OF_RATES**0.5 + (
            2e-3 if tree == "static without" else 0
        )


@pytest.mark.parametrize("seed", range(4))
def test_block_accepts_at_least_as_much_as_chain(seed):
    process = Process(seed)
    lengths = {v: run(process, "chain", v, SAMPLES_OF_RATES, seed=3)[1].double() for v in ("chain", "block")}
    assert lengths["block"].mean() > lengths["chain"].mean() - 4 / SAMPLES_OF_RATES**0.5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_dual_is_the_linear_program(seed, replacement, count):
    g = np.random.default_rng(seed)
    p, q = g.dirichlet(np.ones(6)), g.dirichlet(np.ones(6) * 0.7)
    exact = optimal_acceptance_lp(p, q, count, replacement)
    assert optimal_acceptance(p, q, count, replacement) == pytest.approx(exact, abs=1e-4)


def test_the_dual_of_a_large_vocabulary_narrows_down_on_the_full_scan(monkeypatch):
    from paceline.rollout.verify import optimal

    g = np.random.default_rng(0)
    p, q = g.dirichlet(np.ones(550) * 0.1), g.dirichlet(np.ones(550) * 0.1)
    narrowed = [optimal_acceptance(p, q, k, r) for k in (2, 4) for r in (True, False)]
    monkeypatch.setattr(optimal, "_FULL_SCAN_VOCABULARY", 1000)
    assert narrowed == pytest.approx(
        [optimal_acceptance(p, q, k, r) for k in (2, 4) for r in (True, False)], abs=1e-6
    )


def test_nothing_beats_the_bound_and_the_order_is_that_of_the_papers():
    """SpecTr ≥ (1 − 1/e) of the best; without replacement ≥ with; all at most the bound of their
    candidates."""
    g = np.random.default_rng(5)
    for _ in range(10):
        p, q = g.dirichlet(np.ones(20) * 0.5), g.dirichlet(np.ones(20) * 0.5)
        bound = {r: optimal_acceptance(p, q, 3, r) for r in (True, False)}
        with_, without = (recursive_acceptance(p, q, 3, r, draws=20_000) for r in (True, False))
        selection = spectr_acceptance(p, q, 3)
        assert (1 - 1 / np.e) * bound[True] <= selection <= bound[True] + 1e-9
        assert with_ <= bound[True] + 1e-9
        assert without <= bound[False] + 0.02
        assert without >= with_ - 0.02
