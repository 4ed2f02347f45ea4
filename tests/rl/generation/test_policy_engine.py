"""Every command's engine says in a line that names the recipe's key why it cannot be built."""

import pytest
import torch

from paceline.rl.errors import UserError
from paceline.rl.generation.policy_engine import policy_engine
from tests.engines import tiny_llama
from tests.rollout.model.families import BY_KIND, REFUSED, tiny


def test_what_cannot_be_built_is_a_line():
    mamba = next(family for family, _ in REFUSED if family.kind == "mamba")
    options = {"dtype": torch.float32, "max_slots": 2}
    with pytest.raises(
        UserError, match=r"^policy.model: MambaForCausalLM does not let its attention be replaced"
    ):
        policy_engine(tiny(mamba), max_context=64, **options)
    with pytest.raises(
        UserError,
        match=r"^rollout.max_context is 513: GPT2LMHeadModel .* past 512 tokens; write at most that$",
    ):
        policy_engine(tiny(BY_KIND["gpt2"]), max_context=513, **options)
    with pytest.raises(UserError, match=r"lower rollout.max_context or raise rollout.kv_memory_gb"):
        policy_engine(tiny_llama(), max_context=512, kv_memory_bytes=1000, **options)
