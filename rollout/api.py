"""What a user of the rollout engine touches: sampling parameters, requests and finished rollouts."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from paceline.rollout.values import listed, real_number, shown, token_list, whole_number

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures, which and whose inverses float32 holds with room for logits


class FinishReason(enum.StrEnum):
    """Why a rollout ended."""

    STOP = "stop"  # a stop token or a stop string was produced
    LENGTH = "length"  # max_tokens, or the model's context, was reached
    PAUSED = "paused"  # the call's token budget was spent; pass the rollout as `Request.resume` to go on
    CANCELLED = "cancelled"  # `RolloutEngine.cancel` was called for it; what it had is returned
    FAILED = "failed"  # this request could not be served; `Rollout.error` says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one completion is sampled.

    Args:
        temperature: Softmax temperature. ``0`` is greedy decoding; negative, infinite or NaN is an error.
            Logits are divided by a temperature within 1e-30 and 1e30, beyond which float32 could not tell it
            from greedy or uniform drawing.
        top_k: Keep the ``top_k`` most likely tokens; ``0`` keeps all.
        top_p: Keep the smallest set of most likely tokens whose mass reaches ``top_p``, in ``(0, 1]``.
        max_tokens: Most tokens to produce, at least 1.
        stop_token_ids: The completion ends with the first of these (it is kept in the token ids). One id
            stands for itself.
        stop_strings: The completion ends with the token that completes one of these; special tokens count by
            their text. One string stands for itself. Needs an engine with ``decode_text``.

    Raises:
        ValueError: one line that names the field, for any value out of range or of another type.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuses what is out of range and keeps plain numbers, whichever library's were given.

        Raises:
            ValueError: one line that names the field.
        """
        temperature, top_p = real_number(self.temperature), real_number(self.top_p)
        top_k, max_tokens = whole_number(self.top_k), whole_number(self.max_tokens)
        ids = token_list(
            self.stop_token_ids if whole_number(self.stop_token_ids) is None else [self.stop_token_ids]
        )
        strings = [self.stop_strings] if isinstance(self.stop_strings, str) else listed(self.stop_strings)
        if temperature is None or temperature < 0:
            raise ValueError(
                f"temperature is {shown(self.temperature)}: write 0 for greedy or a finite number above 0"
            )
        if top_k is None or top_k < 0:
            raise ValueError(f"top_k is {shown(self.top_k)}: write 0 (all tokens) or a positive whole number")
        if top_p is None or not 0 < top_p <= 1:
            raise ValueError(f"top_p is {shown(self.top_p)}: write a number in (0, 1]")
        if max_tokens is None or max_tokens < 1:
            raise ValueError(f"max_tokens is {shown(self.max_tokens)}: write a whole number, at least 1")
        if ids is None:
            raise ValueError(f"stop_token_ids is {shown(self.stop_token_ids)}: write a tuple of token ids")
        if strings is None or not all(isinstance(s, str) for s in strings):
            raise ValueError(f"stop_strings is {shown(self.stop_strings)}: write a tuple of strings")
        if "" in strings:
            raise ValueError(
                "stop_strings has an empty string: it would stop every completion at once; remove it"
            )
        plain = (temperature, top_k, top_p, max_tokens, tuple(ids), tuple(strings))
        for name, value in zip(self.__slots__, plain, strict=True):
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def divisor(self) -> float:
        """What logits are divided by: the temperature, 1 where it is 0, as float32 can hold it and its
        inverse.
        """
        return 1.0 if self.greedy else min(max(self.temperature, COLDEST), HOTTEST)

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p cuts the distribution."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to produce. What cannot be served is said by the engine, in the rollout of this request
    alone.

    Args:
        prompt_ids: Token ids of the prompt, at least one: a list, tuple, or one-dimensional array or tensor.
        params: How to sample.
        seed: Every random number of this request is a function of (seed, position), so the result does not
            depend on which other requests are decoded beside it (up to the rounding of batched matrix
            products). Any whole number; it counts modulo 2^64.
        group: Any hashable value. Requests with an equal group are samples of one prompt. They share a
            prefill and model-free drafts, also with earlier requests of the same group. ``None`` shares
            nothing.
        resume: A paused rollout of the same prompt to go on from. With unchanged weights the result is the
            one that was paused without the pause; with new weights its earlier tokens keep the log-probs and
            version they were drawn under.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    group: Hashable | None = None
    resume: Rollout | None = None


@dataclass(slots=True)
class RolloutStats:
    """What it took to produce one rollout.

    Attributes:
        steps: Target forwards that this sequence took part in after its prefill.
        drafted: Draft tokens verified.
        accepted: Draft tokens that were accepted.
        preempted: Times that its cache was given up for others and read again.
        prefilled: Known tokens that forwards read for it; those copied from a sequence that begins the same
            do not count.
        seconds: Wall time from submission to finish, of the last call.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    prefilled: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class DistillationTrace:
    """What verification saw of one rollout, for training a drafter; ``n = len(prompt) + len(completion)``.

    Attributes:
        token_ids: int64 [n], prompt and completion.
        num_prompt: Length of the prompt.
        taps: [n - 1, taps * hidden], the target's tapped hidden states at positions ``0 .. n-2``.
        final: [n - 1, hidden], what the target's output head read. Only rows ``num_prompt - 1 ..`` are filled
            (those whose next token was generated); earlier rows are zero.
        refused: int64 [R, 2], positions where verification refused a draft, and the draft tokens it refused
            there.
        refused_final: [R, hidden], what the target's output head read after those.
    """

    token_ids: torch.Tensor
    num_prompt: int
    taps: torch.Tensor
    final: torch.Tensor
    refused: torch.Tensor
    refused_final: torch.Tensor


@dataclass(slots=True)
class Rollout:
    """One finished completion.

    Attributes:
        request: The request it answers.
        token_ids: The completion's token ids, a final stop token included.
        logprobs: Natural log-probability of each token under the processed distribution (after temperature,
            top-k and top-p). At temperature 0 that distribution is a point mass, so the unscaled (temperature
            1) one is used.
        finish_reason: Why it ended.
        stats: Steps, drafted and accepted tokens.
        segments: (policy version, tokens drawn under it), oldest first: more than one where the rollout was
            paused and resumed after `RolloutEngine.refresh_weights`, which counts the version up.
        entropies: Entropy in nats of the distribution that each token was drawn from, when the engine was
            asked to collect it.
        error: One line, when ``finish_reason`` is FAILED.
        trace: Training data for a drafter, when the engine was asked to collect it.
    """

    request: Request
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    stats: RolloutStats
    segments: list[tuple[int, int]] = field(default_factory=list)
    entropies: list[float] | None = None
    error: str | None = None
    trace: DistillationTrace | None = None
