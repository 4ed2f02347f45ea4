"""The plan of a rank's GPU: what training takes of it, and whether a recipe fits at all."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.memory.parts import ENGINE_COPY, WEIGHTS, cache_shape, other_parts, training_parts
from paceline.rl.sharding import is_shared
from paceline.rollout.model.memory_plan import MemoryPlan, forward_parts, model_shape, plan_memory

PREFILL_TOKENS = 512  # the engine's default


def trainer_memory(config: RunConfig, policy: PreTrainedConfig, ranks: int) -> dict[str, int]:
    """Returns the bytes of a rank's GPU that are not the engine's own, by what takes them.

    Gradients are kept between updates, and an optimizer's moments come with the first one; both are counted
    from the start. The engine counts the weights that it decodes with itself.

    Args:
        config: The recipe.
        policy: Configuration of the policy.
        ranks: Number of ranks.
    """
    parameters = parameter_number(policy)
    parts = training_parts(config, policy, parameters, ranks) + other_parts(config, policy, parameters, ranks)
    own = {ENGINE_COPY, WEIGHTS} if is_shared(config.scale) else {ENGINE_COPY}
    return {part.what: part.size for part in parts if part.what not in own}


def check_memory(config: RunConfig, policy: PreTrainedConfig, ranks: int, room: int) -> MemoryPlan:
    """Returns the plan of a rank's GPU, made before weights are loaded.

    Args:
        config: The recipe.
        policy: Configuration of the policy.
        ranks: Number of ranks.
        room: Bytes of the GPU that the process may use.

    Raises:
        UserError: The recipe does not fit; the line has the numbers.
    """
    parameters, shape = parameter_number(policy), cache_shape(config, policy)
    parts = training_parts(config, policy, parameters, ranks) + other_parts(config, policy, parameters, ranks)
    own = forward_parts(model_shape(policy, shape), shape.slots, PREFILL_TOKENS)
    limit = config.rollout.kv_memory_gb
    try:
        return plan_memory(
            room,
            {**{part.what: part.size for part in parts}, **own},
            shape,
            None if limit is None else int(limit * 1e9),
        )
    except MemoryError as error:
        raise UserError(str(error)) from None


def parameter_number(policy: PreTrainedConfig) -> int:
    """Returns the number of a policy's parameters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(policy).num_parameters()
