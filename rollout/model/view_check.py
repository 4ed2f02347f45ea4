"""Comparison of the engine's view of a policy with the policy's own forward, at every engine start."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from paceline.rollout.model.attention import ForwardBatch
from paceline.rollout.model.fusion_check import exact_products, in_two_forwards
from paceline.rollout.model.inference_view import InferenceView, copy_sharing
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.transformers_api import TESTED_RELEASES, run_causal_lm, use_attention, version
from paceline.rollout.values import error_line

_TEXTS, _TOKENS = 2, 8
# Largest values of `logit_gap` that pass. On SmolLM2 (30 layers), rounding alone gives 3e-6 in float32 and
# 0.03 in bfloat16, a wrong mask gives 1 or more, and a softmax scale off by a tenth 0.08
# (docs/versions.md).
# `fusion_check.can_fuse` compares each kind of layer in float32 before.
_TOLERANCES = {torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.15}
_STRICTEST = min(_TOLERANCES.values())


class UnfusedWarning(RuntimeWarning):
    """Warns that a policy decodes without fused layers, because with them it would compute something else."""


def checked_view(model: PreTrainedModel, dtype: torch.dtype, shape: CacheShape) -> InferenceView:
    """Returns a view of a policy that is checked to compute the policy's logits.

    It has fused layers if they pass the check.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: Compute dtype of the engine.
        shape: Shape of the engine's cache.

    Raises:
        ValueError: The model computes something else in the engine with the installed release of
            transformers.
    """
    view, problem = _attempt(model, dtype, shape, fuse=True)
    if view is not None and problem is None:
        return view
    reason = problem
    if not isinstance(reason, NotImplementedError) and (view is None or view.fused):
        view, problem = _attempt(model, dtype, shape, fuse=False)
        if view is not None and problem is None:
            warnings.warn(
                f"{type(model).__name__} decodes without fused layers, which is slower: with transformers "
                f"{version()} they fail the engine's check ({_problem_text(reason)}); tested releases are "
                f"transformers{TESTED_RELEASES}",
                UnfusedWarning,
                stacklevel=2,
            )
            return view
    name = type(model).__name__
    if isinstance(problem, NotImplementedError) and str(problem):
        raise ValueError(
            f"{name} cannot run in the engine: it {_problem_text(problem)}; choose another policy, see "
            "docs/models.md"
        )
    raise ValueError(
        f"{name} does not run in the engine with transformers {version()}: {_problem_text(problem)}; if "
        f"docs/models.md lists its family, install transformers{TESTED_RELEASES} (the tested releases), else "
        "choose another policy"
    )


def _problem_text(problem: Exception | str | None) -> str:
    """Returns a problem as one line of text."""
    if isinstance(problem, NotImplementedError):
        return str(problem)
    return error_line(problem) if isinstance(problem, Exception) else str(problem)


def _attempt(
    model: PreTrainedModel, dtype: torch.dtype, shape: CacheShape, fuse: bool
) -> tuple[InferenceView | None, Exception | str | None]:
    """Returns a view, or None if it cannot be built, and its problem, or None if it has none."""
    view = None
    try:
        view = InferenceView(model, dtype, fuse)
        gap = logit_gap(view, model, shape)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers raises is the reason to report
        return view, error
    if gap <= _TOLERANCES.get(dtype, _STRICTEST):
        return view, None
    return view, f"its logits differ from transformers' own by {gap:.2g} of their norm"


@torch.no_grad()
@exact_products()
def logit_gap(view: InferenceView, model: PreTrainedModel, shape: CacheShape) -> float:
    """Returns how far a view's logits are from those of the policy's own forward, on a few tokens.

    The view reads two texts side by side in two forwards over its own cache, as the engine does; transformers
    reads each text alone in one forward without a cache, with its eager attention.

    Args:
        view: The engine's view of the model.
        model: The trainer's unwrapped causal LM.
        shape: Shape of the engine's cache.

    Returns:
        ‖difference‖ / ‖logits‖ with each token's logits centred on their mean: the median over the tokens of
        a forward, and of both forwards and texts the largest. The median disregards single tokens of a
        mixture of experts that rounding sends to another expert. 0 if the policy's own logits are not finite.
    """
    device, vocabulary = model.device, model.config.get_text_config().vocab_size
    tokens = torch.arange(1, _TEXTS * _TOKENS + 1, device=device).view(_TEXTS, _TOKENS) * 7919 % vocabulary
    reference = copy_sharing(model)
    use_attention(reference, "eager")
    expected = torch.cat([reference(input_ids=text[None], use_cache=False).logits for text in tokens]).float()
    cache = SlotCache(replace(shape, slots=_TEXTS, capacity=_TOKENS, taps=0), device)

    def forward(part: slice, batch: ForwardBatch) -> torch.Tensor:
        read, positions = tokens[:, part], batch.positions
        if batch.ragged is not None:
            read, positions = read.reshape(1, -1), batch.ragged.seats[0]
        every = torch.arange(read.shape[1], device=device)
        return run_causal_lm(view.module, read, positions, cache, keep=every, forward_batch=batch)

    actual = in_two_forwards(cache, _TOKENS, view.kernels, forward, _TEXTS).float()
    if not bool(expected.isfinite().all()):
        return 0.0
    expected, actual = (x - x.mean(-1, keepdim=True) for x in (expected, actual))
    gaps = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    return max(float(part.median(dim=1).values.max()) for part in (gaps[:, :-2], gaps[:, -2:]))
