"""Every length recipe is valid, and whatever two of them are put together works or is refused in one line."""

from itertools import combinations
from pathlib import Path

import pytest

from paceline.rl.dry_run.description import describe
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config
from tests.support import ROOT, tiny_trainer

BUDGETS = ["length.budgets=[4, 8]", "rollout.max_tokens=12"]
TERMS = {
    "alp": "{name: alp, beta: 0.01}",
    "grpo_lambda": "{name: grpo_lambda, share: 0.5}",
    "hbpo": "{name: hbpo}",
    "l1_exact": "{name: l1_exact, alpha: 0.01}",
    "l1_max": "{name: l1_max, alpha: 0.01}",
    "linear": "{name: linear}",
    "overlong": "{name: overlong, cache: 4}",
    "pear": "{name: pear}",
    "shorter_better": "{name: shorter_better}",
    "target": "{name: target}",
}
WAYS = {
    "anytime": ["length.anytime={budgets: [3, 6]}", "update.advantage=brpo"],
    "mask_mastered": ["update.mask_mastered=0.9"],
    "prod_d": ["length.predictor=prod_d"],
    "segments": ["rollout.segment_tokens=5"],
    "tree": ["rollout.tree={segment_tokens: 4}", "update.advantage=tree"],
}
REWARD = "[float('1' in c) for c in completions]"


def combined(*names: str) -> list[str]:
    """Overrides of the tiny recipe for these terms and ways."""
    terms = sorted((name for name in names if name in TERMS), key=lambda name: name != "hbpo")
    ways = [option for name in names if name in WAYS for option in WAYS[name]]
    shaped = [f"length.rewards=[{', '.join(TERMS[name] for name in terms)}]"] if terms else []
    return ["update.kl_coef=0", "measure.plain_every=0", *BUDGETS, *shaped, *ways]


def accepted(*names: str) -> bool:
    try:
        load_config(ROOT / "configs" / "tiny.yaml", combined(*names))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return False
    return True


def runs(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    with tiny_trainer(
        folder, monkeypatch, REWARD, *combined(*names), "update.minibatches=1", "steps=9"
    ) as trainer:
        for step in range(2):
            metrics, _ = trainer.step(step)
    assert metrics["update/skipped"] == 0 and metrics["length/mean"] > 0


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs" / "length").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_every_length_recipe_is_valid(recipe):
    assert "valid" in describe(load_config(recipe), recipe, ranks=1, gpu=80)[0]


def test_which_pairs_are_refused():
    pairs = [pair for pair in combinations([*TERMS, *WAYS], 2) if not accepted(*pair)]
    refused = {frozenset(pair) for pair in pairs}
    alone = {frozenset(("anytime", other)) for other in [*TERMS, "segments", "tree"]}
    of_trees = {frozenset(("tree", "segments"))} | {
        frozenset(("tree", other)) for other in WAYS if other == "anytime"
    }
    budgets = {pair for pair in refused if "tree" in pair} - of_trees
    assert refused - budgets == alone | of_trees
    # subgroups with budgets of their own have no beginning in common
    assert all("tree" in pair for pair in budgets)


@pytest.mark.parametrize(
    "pair",
    [("pear", "grpo_lambda"), ("segments", "hbpo"), ("prod_d", "segments")],
    ids="+".join,
)
def test_pairs_work(pair, tmp_path, monkeypatch):
    runs(tmp_path, monkeypatch, *pair)


@pytest.mark.parametrize(
    "other",
    [
        "pear",
        "prod_d",
        *(pytest.param(name, marks=pytest.mark.ci) for name in ("grpo_lambda", "l1_exact", "mask_mastered")),
    ],
)
def test_trees_go_with_the_rest(other, tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "tree", [*WAYS["tree"], "length.budget_of=prompt"])
    runs(tmp_path, monkeypatch, "tree", other)


@pytest.mark.ci
def test_all_terms_work_together(tmp_path, monkeypatch):
    """One run in the place of their pairs, which run on demand."""
    runs(tmp_path, monkeypatch, *TERMS)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=pytest.mark.slow if TERMS.keys() >= set(pair) else pytest.mark.ci)
        for pair in combinations([*TERMS, *WAYS], 2)
    ],
    ids="+".join,
)
def test_all_pairs_work_or_are_refused(pair, tmp_path, monkeypatch):
    if accepted(*pair):
        runs(tmp_path, monkeypatch, *pair)
