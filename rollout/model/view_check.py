"""Compares the engine's view of a policy with the policy's own forward in transformers, whenever an engine is
built.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from paceline.rollout.model.attention import ForwardBatch
from paceline.rollout.model.fusion_check import in_two_forwards
from paceline.rollout.model.inference_view import InferenceView, copy_sharing
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.transformers_api import TESTED_RELEASES, run_causal_lm, use_attention, version
from paceline.rollout.values import error_line

_TEXTS, _TOKENS = 2, 8
# Largest values of `logit_gap` that pass. On SmolLM2 (30 layers), rounding alone gives 3e-6 in float32, 0.03
# in bfloat16; a wrong mask gives 1 or more, a softmax scale off by a tenth 0.08 (docs/versions.md).
# `layer_probe` compares each kind of layer in float32 before.
_TOLERANCES = {torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.15}
_STRICTEST = min(_TOLERANCES.values())


class UnfusedWarning(RuntimeWarning):
    """A policy decodes without fused layers, because with them it would compute something else."""


def checked_view(model: PreTrainedModel, dtype: torch.dtype, shape: CacheShape) -> InferenceView:
    """Makes a view of a policy and checks that it computes the policy's logits, with fused layers if they
    pass the check.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: What the engine computes in.
        shape: The engine's cache.

    Raises:
        ValueError: for a model which computes something else in the engine with the installed release of
            transformers.
    """
    view, trouble = _attempt(model, dtype, shape, fuse=True)
    if view is not None and trouble is None:
        return view
    reason = trouble
    if not isinstance(reason, NotImplementedError) and (view is None or view.fused):
        view, trouble = _attempt(model, dtype, shape, fuse=False)
        if view is not None and trouble is None:
            warnings.warn(
                f"{type(model).__name__} decodes without fused layers, which is slower: with transformers "
                f"{version()} they "
                f"fail the engine's check ({_said(reason)}); transformers{TESTED_RELEASES} is tested",
                UnfusedWarning,
                stacklevel=2,
            )
            return view
    name = type(model).__name__
    if isinstance(trouble, NotImplementedError) and str(trouble):
        raise ValueError(
            f"{name} cannot run in the engine: it {_said(trouble)}; choose another policy, see docs/models.md"
        )
    raise ValueError(
        f"{name} does not run in the engine with transformers {version()}: {_said(trouble)}; if "
        "docs/models.md lists its family, "
        f"install transformers{TESTED_RELEASES}, the releases that are tested, else choose another policy"
    )


def _said(trouble: Exception | str | None) -> str:
    if isinstance(trouble, NotImplementedError):
        return str(trouble)
    return error_line(trouble) if isinstance(trouble, Exception) else str(trouble)


def _attempt(
    model: PreTrainedModel, dtype: torch.dtype, shape: CacheShape, fuse: bool
) -> tuple[InferenceView | None, Exception | str | None]:
    """A view, None where it cannot be made, and what is wrong with it, None where nothing is."""
    view = None
    try:
        view = InferenceView(model, dtype, fuse)
        gap = logit_gap(view, model, shape)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a release of transformers makes of our call is the reason to give
        return view, error
    if gap <= _TOLERANCES.get(dtype, _STRICTEST):
        return view, None
    return view, f"its logits differ from transformers' own by {gap:.2g} of their norm"


@torch.no_grad()
def logit_gap(view: InferenceView, model: PreTrainedModel, shape: CacheShape) -> float:
    """How far a view's logits are from those of the policy's own forward in transformers, on a few tokens.

    The view reads two texts side by side in two forwards over a cache of its own, as the engine does;
    transformers reads each alone in one forward without a cache, with its eager attention.

    Args:
        view: The engine's view of the model.
        model: The trainer's unwrapped causal LM.
        shape: The engine's cache.

    Returns:
        ‖difference‖ / ‖logits‖, each token's logits less their mean: the median over the tokens of a forward,
        so that a token of a mixture of experts that rounding sends to another expert does not count, and of
        both forwards and texts the largest. 0 where the policy's own logits are not finite.
    """
    device, vocabulary = model.device, model.config.get_text_config().vocab_size
    tokens = torch.arange(1, _TEXTS * _TOKENS + 1, device=device).view(_TEXTS, _TOKENS) * 7919 % vocabulary
    reference = copy_sharing(model)
    use_attention(reference, "eager")
    wanted = torch.cat([reference(input_ids=text[None], use_cache=False).logits for text in tokens]).float()
    cache = SlotCache(replace(shape, slots=_TEXTS, capacity=_TOKENS, taps=0), device)

    def forward(part: slice, batch: ForwardBatch) -> torch.Tensor:
        read, positions = tokens[:, part], batch.positions
        if batch.ragged is not None:
            read, positions = read.reshape(1, -1), batch.ragged.seats[0]
        every = torch.arange(read.shape[1], device=device)
        return run_causal_lm(view.module, read, positions, cache, keep=every, forward_batch=batch)

    got = in_two_forwards(cache, _TOKENS, view.takes_ragged, forward, _TEXTS).float()
    if not bool(wanted.isfinite().all()):
        return 0.0
    wanted, got = (x - x.mean(-1, keepdim=True) for x in (wanted, got))
    gaps = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    return max(float(part.median(dim=1).values.max()) for part in (gaps[:, :-2], gaps[:, -2:]))
