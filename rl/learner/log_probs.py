"""Per-token log-probabilities of packed batches, without padding and without the full logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from paceline.rl.errors import UserError
from paceline.rl.learner.packing import PackedBatch
from paceline.rl.learner.packing_check import check_head, check_packing, decoder_of, turn_off_dropout
from paceline.rollout.model.attention import check_attention, check_window, grouped_attention
from paceline.rollout.model.shape import check_family
from paceline.rollout.model.text_limits import text_limit
from paceline.rollout.transformers_api import register_attention, use_attention

PACKED_ATTENTION = "paceline_packed"
_LOGITS = 1 << 23  # that the output head makes at a time
_CACHED = 1 << 18  # of them that are worked on at a time on a CPU


class _ToRows(torch.autograd.Function):
    """[T, …] → [n, L, …]. Its gradient is a gather, where indexing's own would be a slow accumulating
    scatter: padding, the only thing read twice, never receives a gradient.
    """

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        ctx.packed = packed
        return line[packed.pad_index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.flatten(0, 1)[ctx.packed.flat_index], None


class _ToLine(torch.autograd.Function):
    """[n, L, …] → [T, …], the inverse of `_ToRows`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        ctx.packed, ctx.shape = packed, rows.shape
        return rows.flatten(0, 1)[packed.flat_index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = grad.new_zeros(ctx.shape)
        rows.view(-1, *ctx.shape[2:]).index_copy_(0, ctx.packed.flat_index, grad.contiguous())
        return rows, None


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a packed line: a token sees its prompt and its own sample,
    nothing else.

    Only attention itself works on a padded layout; linear layers see the T real tokens. On a CPU it is two
    batched products: the backward of SDPA there is the slower one at the lengths of a micro-batch.

    Args:
        query: [1, H, T, d]; key and value [1, KV, T, d].
        packed: The layout, through the model's keyword arguments.

    Returns:
        [1, T, H, d].

    Raises:
        NotImplementedError: for attention that computes something else, see
            `paceline.rollout.model.attention.check_attention`.
        TypeError: when the model hands its caller's keyword arguments to no attention function.
    """
    if packed is None:
        raise TypeError("its attention functions get no keyword arguments of the model's caller")
    check_attention(module, attention_mask, others)
    check_window(module, sliding_window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = packed.visible
    if sliding_window is not None:
        near = packed.pad_positions[:, None, :] > packed.pad_positions[:, :, None] - sliding_window
        visible = visible & near
    # Rotary embedding leaves float32 under autocast, and softmax would: here all keep the value's precision:
    # a quarter less memory.
    q, k, v = (
        _ToRows.apply(x[0].transpose(0, 1).to(value.dtype), packed).transpose(1, 2)
        for x in (query, key, value)
    )
    with torch.autocast(query.device.type, enabled=False):
        if query.device.type == "cpu" or softcap is not None:
            bias = (
                torch.zeros((), dtype=q.dtype, device=q.device)
                .expand(visible.shape)
                .masked_fill(~visible, float("-inf"))
            )
            out = grouped_attention(q, k.contiguous(), v.contiguous(), bias[:, None, None], scaling, softcap)
        else:
            attend = nn.functional.scaled_dot_product_attention
            out = attend(q, k, v, attn_mask=visible[:, None], scale=scaling, enable_gqa=True).transpose(1, 2)
    return _ToLine.apply(out, packed)[None], None


register_attention(PACKED_ATTENTION, packed_attention)


class PolicyLogProbs(nn.Module):
    """The policy as a map from packed sequences to log-probabilities: what accelerate wraps and the optimizer
    updates.

    Args:
        policy: A causal LM whose logits are its output head applied to its decoder's output. Its dropout is
            turned off: what is trained is the distribution that was drawn from.

    Raises:
        UserError: when the logits are made in some other way (soft-capped or scaled), or a packed line gives
            other log-probs than
            its sequences alone: either would train another model.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        try:
            check_family(policy)
        except ValueError as error:
            raise UserError(f"policy.model: {error}") from None
        self._limit = text_limit(policy)
        turn_off_dropout(policy)
        wanted = check_head(policy)
        use_attention(policy, PACKED_ATTENTION)
        check_packing(policy, lambda batch: self(batch, 1.0)[0], wanted)

    def forward(
        self, batch: PackedBatch, temperature: float, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target under softmax(logits / temperature), and that distribution's
        entropy.

        Args:
            batch: What to score.
            temperature: Of the rollouts.
            entropy_gradient: Whether the entropy is differentiable.

        Returns:
            Two float32 [M], in nats.

        Raises:
            UserError: for a sequence past the length that the policy sets to its texts.
        """
        if self._limit is not None and int(batch.positions.max()) >= self._limit.tokens:
            name = type(self.policy).__name__
            raise UserError(
                f"{name} {self._limit.reason} past {self._limit.tokens} tokens: write rollout.max_context of "
                "at most that"
            )
        hidden = decoder_of(self.policy)(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, packed=batch
        ).last_hidden_state[0, batch.predict]
        head = self.policy.get_output_embeddings()
        rows = max(_LOGITS // head.weight.shape[0], 1)
        logprobs, entropies = [], []
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            if torch.is_grad_enabled():
                logprob, entropy = checkpoint(
                    _score, head, hidden[piece], batch.targets[piece], temperature, use_reentrant=False
                )
            else:
                logprob, entropy = _score(head, hidden[piece], batch.targets[piece], temperature)
            logprobs.append(logprob)
            entropies.append(entropy if entropy_gradient else entropy.detach())
        return torch.cat(logprobs), torch.cat(entropies)


def _score(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprob, entropy = TokenScores.apply(head(hidden), targets, temperature)
    return logprob, entropy


class TokenScores(torch.autograd.Function):
    """Log-probability of each target and entropy under softmax(logits / temperature), in float32 whatever the
    logits are in.

    With p the distribution and H its entropy, per unit of each output's gradient a logit gets (1[target] − p)
    / T and −p (log p + H) / T. Rows are taken a few at a time on a CPU, so that the dozen passes over them
    stay in its cache: over the whole of a large vocabulary each would go to memory.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: [M, V]; targets: int64 [M]. Returns two float32 [M]."""
        logprobs, entropies = (
            logits.new_empty(len(logits), dtype=torch.float32),
            logits.new_empty(len(logits), dtype=torch.float32),
        )
        for rows in _row_blocks(logits):
            log_p = _log_softmax(logits[rows], temperature)
            logprobs[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
            entropies[rows] = -(log_p.exp().mul_(log_p)).sum(-1)
        ctx.save_for_backward(logits, targets, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, of_logprob: torch.Tensor, of_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        logits, targets, entropies = ctx.saved_tensors
        scale, with_entropy = 1 / ctx.temperature, bool(of_entropy.any())
        grad = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            log_p = _log_softmax(logits[rows], ctx.temperature)
            p = log_p.exp()
            wanted = -of_logprob[rows, None]
            if with_entropy:
                wanted = wanted - of_entropy[rows, None] * (log_p + entropies[rows, None])
            p.mul_(wanted.mul(scale)).scatter_add_(-1, targets[rows, None], of_logprob[rows, None] * scale)
            grad[rows] = p
        return grad, None, None


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows = len(logits) if logits.device.type != "cpu" else max(_CACHED // logits.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(logits), max(rows, 1)))


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(logits, dim=-1)
