"""The speculation section: what a verifier does not cover is an error."""

import pytest

from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config

TINY = "configs/tiny.yaml"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["drafters=[stand]", "strategy=stand:3x3/6"],
            "strategy stand:3x3/6: spectr verification does not cover siblings drawn without",
        ),
        (["drafters=[stand]"], "empty includes stand:3x3/6"),
        (
            ["drafters=[eagle3]", "draw=without_replacement", "tree=static", "strategy=eagle3:3x3/6"],
            "without replacement",
        ),
        (["drafters=[eagle3]", "draw=replacement", "tree=static", "strategy=eagle3:3x3/6"], None),
        (["drafters=[stand]", "strategy=stand:3"], None),
    ],
)
def test_a_verifier_that_would_change_the_distribution_is_refused(overrides, says):
    given = [f"speculation.{text}" for text in ("verifier=spectr", *overrides)]
    if says is None:
        assert load_config(TINY, given).speculation.verifier == "spectr"
    else:
        with pytest.raises(UserError, match=says):
            load_config(TINY, given)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["speculation.drafters=[parallel]"], "drafts with the weights of eagle3"),
        (
            ["speculation.drafters=[eagle3,parallel]"],
            "which the drafter has to learn",
        ),
        (["drafter.parallel_positions=1"], "parallel_positions is 1: write at least 2"),
        (["drafter.parallel_positions=-2"], "parallel_positions is -2: write at least 2"),
    ],
)
def test_drafts_in_one_pass_need_a_drafter_that_learns_them(overrides, says):
    with pytest.raises(UserError, match=says):
        load_config(TINY, overrides)
    assert load_config(TINY, ["speculation.drafters=[eagle3,parallel]", "drafter.parallel_positions=4"])
