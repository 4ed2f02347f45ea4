"""Checks before training that a policy gives packed sequences the log-probs that it gives each alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from paceline.rl.errors import UserError, one_line
from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack

# prompts, each with its samples
_EXAMPLES = (((1, 2, 3), ((4, 5, 6), (7, 8))), ((9, 10), ((11, 12, 13, 14),)))
# Rounding moves log-probs by 1e-6 to 2e-4 in float32, by a few hundredths in 16 bits; what another sequence's
# tokens do is larger.
_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def decoder_of(policy: PreTrainedModel) -> nn.Module:
    """Returns the part of a causal LM below its output head."""
    decoder = policy.base_model
    # Llama 4's base_model_prefix names an attribute that it does not have
    return decoder if decoder is not policy else policy.model


def turn_off_dropout(policy: PreTrainedModel) -> None:
    """Sets dropout rates and routers' jitter to zero, in modules and in the numbers that they pass on."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


@torch.no_grad()
def check_head(policy: PreTrainedModel) -> torch.Tensor:
    """Checks that a policy's logits are the output of its output head, unchanged.

    Returns:
        Log-probs of the samples of `check_packing`'s batch, from a forward of each sequence alone, float32
        [M].

    Raises:
        UserError: when the policy has no output head, or its logits are soft-capped or scaled.
    """
    vocabulary = policy.config.get_text_config().vocab_size
    large = torch.linspace(-50, 50, vocabulary)
    head = policy.get_output_embeddings()
    if head is None:
        raise UserError(
            f"{type(policy).__name__} has no output head over a vocabulary: choose a causal language model"
        )
    hook = head.register_forward_hook(lambda module, args, output: large.to(output).expand_as(output))
    try:
        seen = policy(
            input_ids=torch.tensor([[1, 2, 3]], device=policy.device) % vocabulary, use_cache=False
        ).logits
    finally:
        hook.remove()
    if not torch.allclose(seen[0, -1], large.to(seen), rtol=1e-3):
        raise UserError(
            f"{type(policy).__name__} caps or scales its logits, which training does not support: choose "
            "another policy"
        )
    wanted = []
    for prompt, samples in _EXAMPLES:
        for sample in samples:
            ids = torch.tensor([[*prompt, *sample]], device=policy.device) % vocabulary
            logprobs = (
                policy(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            )
            wanted.append(logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(wanted)


@torch.no_grad()
def check_packing(
    policy: PreTrainedModel, logprobs: Callable[[PackedBatch], torch.Tensor], wanted: torch.Tensor
) -> None:
    """Checks that packing leaves each sequence's log-probs as they are alone, in training mode.

    Args:
        policy: A causal LM with attention over packed sequences.
        logprobs: Returns the log-probs of a batch, float32 [M].
        wanted: Log-probs of each sequence alone, from `check_head`.

    Raises:
        UserError: when the log-probs differ, or the forward fails.
    """
    vocabulary = policy.config.get_text_config().vocab_size
    rows, index = [], 0
    for prompt, samples in _EXAMPLES:
        made = tuple(Sample(index + i, [t % vocabulary for t in tokens]) for i, tokens in enumerate(samples))
        rows.append(PromptRow([t % vocabulary for t in prompt], made))
        index += len(samples)
    name, training = type(policy).__name__, policy.training
    policy.train()
    try:
        got = logprobs(pack(rows).to(policy.device))
    except NotImplementedError as error:
        raise UserError(
            f"{name} cannot be trained here: it {error}; choose another policy, see docs/models.md"
        ) from None
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{name} cannot be trained on packed sequences ({reason}): choose another policy, see "
            "docs/models.md"
        ) from None
    finally:
        policy.train(training)
    if not bool(wanted.isfinite().all()):
        return  # the weights are not finite, which a step of training reports
    gap = float((got - wanted).abs().nan_to_num(nan=torch.inf).max())
    if gap > _TOLERANCES.get(policy.dtype, 2e-3):
        raise UserError(
            f"{name} gives packed sequences other log-probs than it gives each alone, by {gap:.2g} nats: "
            "choose another policy, see docs/models.md"
        )
