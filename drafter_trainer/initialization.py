"""Initial weights of a drafter: copied from the target wherever the shapes agree."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from paceline.rollout.drafters.eagle3_model import MASK_TOKEN, Eagle3Model, mask_token_of
from paceline.rollout.model.runner import decoder_layers


@torch.no_grad()
def initial_drafter(
    config: LlamaConfig, vocabulary: torch.Tensor, target: PreTrainedModel, seed: int
) -> Eagle3Model:
    """Returns a float32 drafter that starts near the target.

    The output head starts from the target's rows of the draft vocabulary. The decoder layer starts from the
    target's last layer, and its attention reads the hidden-state half of the input. ``fc`` passes the highest
    tap through. All other weights are sampled from N(0, 0.02²).

    Args:
        config: Drafter configuration from `eagle3_config`.
        vocabulary: int64 [draft vocabulary], increasing.
        target: The policy.
        seed: Seed of the sampled weights; must be equal on every rank.
    """
    drafter = Eagle3Model(config, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in drafter.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
    hidden = config.hidden_size
    drafter.fc.weight[:, -hidden:] += torch.eye(hidden)
    head: torch.Tensor = next(target.get_output_embeddings().parameters())
    drafter.lm_head.weight.copy_(head[vocabulary].float())
    last = dict(decoder_layers(target)[-1].named_parameters())
    for name, parameter in drafter.midlayer.named_parameters():
        source = last.get(name)
        if source is None:
            continue
        if source.shape == parameter.shape:
            parameter.copy_(source.float())
        elif source.dim() == 2 and parameter.shape == (source.shape[0], 2 * source.shape[1]):
            parameter[:, source.shape[1] :] = source.float()
    final_norm = dict(target.base_model.named_parameters()).get("norm.weight")
    if final_norm is not None and final_norm.shape == drafter.norm.weight.shape:
        drafter.norm.weight.copy_(final_norm.float())
    drafter.midlayer.hidden_norm.weight.copy_(drafter.midlayer.input_layernorm.weight)
    return drafter


@torch.no_grad()
def with_mask(drafter: Eagle3Model, wanted: bool, target: PreTrainedConfig, seed: int) -> Eagle3Model:
    """Returns the drafter with a mask, with which it can learn to draft in one pass, or without one.

    Args:
        drafter: Drafter to copy, if it is not as wanted.
        wanted: Whether it should have a mask; an untrained one is added if it has none.
        target: The policy's configuration.
        seed: Seed of the sampled weights; must be equal on every rank.
    """
    if wanted == (drafter.mask_token is not None):
        return drafter
    config = copy.deepcopy(drafter.config)
    setattr(config, MASK_TOKEN, mask_token_of(target) if wanted else None)
    other = Eagle3Model(config, drafter.vocabulary)
    if wanted:
        other.mask_hidden.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
    other.load_state_dict(drafter.state_dict(), strict=False)
    return other
