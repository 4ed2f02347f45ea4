"""The rollout section: what vLLM does not do is an error that says what to write."""

import pytest

from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config

TINY = "configs/tiny.yaml"
DRAFTING = ["speculation.drafters=[eagle3]", "drafter.start=drafter"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["measure.plain_every=5"], "measure.plain_every compares vLLM's adaptive drafts with none"),
        (
            ["measure.plain_every=5", "speculation.strategy=eagle3:3", *DRAFTING],
            "measure.plain_every compares vLLM's adaptive drafts with none",
        ),
        (["speculation.drafters=[suffix]"], "drafts with EAGLE-3 or not at all"),
        (["speculation.drafters=[eagle3]"], "name one in drafter.start"),
        (["rollout.segment_tokens=16"], "leave rollout.segment_tokens out"),
        (["length.predictor=prod_d"], "vllm has its own"),
        (["length.rewards=[{name: pear}]"], "pear"),
        (["rollout.vllm.depth=0"], "rollout.vllm.depth is 0"),
        (["rollout.vllm.servers=['http://node1:8000']"], r"rollout\.vllm\.exchange"),
        (["speculation.strategy=suffix:4"], "knows adaptive, plain and eagle3"),
        (["speculation.strategy=eagle3:3x2/4"], "knows adaptive, plain and eagle3"),
    ],
)
def test_what_vllm_does_not_do_is_said(overrides, says):
    base = ["rollout.vllm={}", "speculation.drafters=[]", "measure.plain_every=0"]
    load_config(TINY, base)
    load_config(TINY, [*base, *DRAFTING, "measure.plain_every=5"])
    with pytest.raises(UserError, match=says):
        load_config(TINY, [*base, *overrides])
