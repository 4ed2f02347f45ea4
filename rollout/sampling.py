"""Conversion of logits to the processed distribution that sampling, verification and log-probs share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.rollout.api import SamplingParams
from paceline.rollout.native import load_kernels, upload

_BLOCK = 256  # weights summed together at the first level of `draw`


def processed_probs(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Returns the distribution that tokens are sampled from.

    The temperature is applied first, then top-k, then top-p; the result is renormalised.

    Tokens tied with the k-th stay, as in transformers' ``TopKLogitsWarper``. Top-p keeps the smallest prefix
    of the sorted tokens whose mass reaches ``top_p`` (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", section 3.1).

    Args:
        logits: Logits of any float dtype, [B, Q, V].
        params: Sampling parameters of each of the B rows. Temperature 0 gives a point mass on the first
            largest logit.

    Returns:
        float32 [B, Q, V]. A row of non-finite logits gives NaN, which the caller must check.
    """
    scaled = logits.float()
    divisors = [p.divisor for p in params]
    # relative to the largest logit, a quotient can only overflow towards probability zero
    if any(d != 1.0 for d in divisors):
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / upload(divisors, logits.device).view(-1, 1, 1)
    probs = torch.softmax(scaled, dim=-1)
    if any(p.greedy for p in params):
        greedy = upload([p.greedy for p in params], logits.device).view(-1, 1, 1)
        probs = torch.where(greedy, _point_mass(logits, probs), probs)
    cuts: dict[tuple[int, float], list[int]] = {}
    for row, p in enumerate(params):
        if p.truncated and not p.greedy:
            cuts.setdefault((p.top_k, p.top_p), []).append(row)
    for (top_k, top_p), rows in cuts.items():
        at = upload(rows, logits.device)
        probs[at] = _truncate(probs[at].flatten(0, 1), top_k, top_p).view(len(rows), *probs.shape[1:])
    return probs


def _point_mass(logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Returns a point mass on the largest logit of each row; rows of NaN stay NaN."""
    best = logits.argmax(dim=-1, keepdim=True)
    mass = torch.zeros_like(probs).scatter_(-1, best, 1.0)
    return torch.where(probs.isnan(), probs, mass)


def _truncate(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Applies top-k, then top-p to float32 probabilities [R, V] and renormalises them."""
    if 0 < top_k < probs.shape[-1]:
        kth = probs.topk(top_k, dim=-1).values[..., -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        probs = _keep_nucleus(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _keep_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zeroes all but the smallest set of most likely tokens whose mass reaches ``top_p``.

    Of tied tokens, the first ones stay. To avoid sorting the whole vocabulary, the set is searched among a
    few top tokens, and among more only if their mass falls short.
    """
    vocab, count = probs.shape[-1], 64
    while True:
        values = probs.topk(min(count, vocab), dim=-1).values
        reached = values.double().cumsum(-1)
        if count >= vocab or bool((reached[:, -1] >= top_p).all()):
            break
        count *= 8
    last = (reached < top_p).sum(-1, keepdim=True).clamp_(max=values.shape[-1] - 1)
    threshold = values.gather(-1, last)
    ties_to_keep = last + 1 - (values > threshold).sum(-1, keepdim=True)
    tied = probs == threshold
    keep = (probs > threshold) | (tied & (tied.cumsum(-1) <= ties_to_keep))
    return probs.masked_fill(~keep, 0.0)


def draw_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one token per row from the processed distribution.

    Args:
        logits: Logits of any float dtype, [R, V].
        params: Sampling parameters of each row. At temperature 0 the token is the first of the largest
            logits.
        uniform: Uniform numbers in [0, 1), float64 [R], on the CPU.

    Returns:
        Tokens int64 [R] and their log-probs float32 [R] under the processed distribution (at temperature 0,
            under the distribution at temperature 1). A row of unusable logits has log-prob NaN.
    """
    kernels = load_kernels(logits.device.type, logits.dtype)
    if kernels is None:
        return _draw_processed(logits, params, uniform)
    tokens, logprobs = kernels.draw(logits, kernel_temperatures(params), uniform)
    cut = [row for row, p in enumerate(params) if p.truncated]
    if cut:  # the other rows stay bit for bit as they would be without truncated ones in the batch
        at = upload(cut, logits.device)
        tokens[at], logprobs[at] = _draw_processed(logits[at], [params[row] for row in cut], uniform[cut])
    return tokens, logprobs


def kernel_temperatures(params: Sequence[SamplingParams]) -> torch.Tensor:
    """Returns the temperatures as float32 for the native kernels, where 0 means greedy."""
    return torch.tensor([0.0 if p.greedy else p.divisor for p in params], dtype=torch.float32)


def _draw_processed(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements `draw_tokens` with torch operators."""
    probs = processed_probs(logits[:, None], params)[:, 0]
    tokens = draw(probs, upload(uniform, logits.device))
    logprobs = probs.gather(-1, tokens[:, None])[:, 0].log()
    if any(p.greedy for p in params):
        scores = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        greedy = upload([p.greedy for p in params], logits.device)
        logprobs = torch.where(greedy, scores, logprobs)
    finite = torch.isfinite(logits.amax(-1))
    return tokens, torch.where(finite, logprobs, torch.nan)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Samples one index per row in proportion to ``weights`` by inverting the cumulative sum.

    The sum has two levels, over blocks of 256 and then within the chosen block, and the first is in float64.
    This avoids a scan of the full vocabulary and does not lose small probabilities to rounding.

    Args:
        weights: Non-negative weights, float32 [R, V], not necessarily normalised; the sum of each row is
            positive.
        uniform: Uniform numbers in [0, 1), float64 [R].

    Returns:
        int64 [R]. A token of weight zero is never returned.
    """
    rows, vocab = weights.shape
    padding = -vocab % _BLOCK
    padded = torch.nn.functional.pad(weights, (0, padding)) if padding else weights
    blocks = padded.view(rows, -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = uniform.to(ends)[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, goal, right=True).clamp_(max=ends.shape[-1] - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(goal))
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]]
    index = torch.searchsorted(inside.double().cumsum(-1), goal - start, right=True).clamp_(max=_BLOCK - 1)
    token = block * _BLOCK + index
    return _nearest_positive(weights, token)


def _nearest_positive(weights: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Replaces tokens of weight zero by the most likely token of the row.

    Rounding can carry the search just past the last positive weight.
    """
    token = token.clamp(max=weights.shape[-1] - 1)
    chosen = weights.gather(1, token)
    return torch.where(chosen > 0, token, weights.argmax(-1, keepdim=True))[:, 0]
