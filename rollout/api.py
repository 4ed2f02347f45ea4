"""The rollout engine's public records: sampling parameters, requests and finished rollouts."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from paceline.rollout.values import as_finite_float, as_int, as_list, as_token_ids, short_repr

# within this range float32 holds a temperature and its inverse, with headroom for the logits
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-30, 1e30


class FinishReason(enum.StrEnum):
    """Says why a rollout ended."""

    STOP = "stop"  # a stop token or a stop string was generated
    LENGTH = "length"  # max_tokens or the maximum context was reached
    PAUSED = "paused"  # the call's token budget was spent; pass the rollout as `Request.resume` to continue
    CANCELLED = "cancelled"  # `RolloutEngine.cancel` was called; the tokens so far are returned
    FAILED = "failed"  # the request could not be served; `Rollout.error` says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Says how one completion is sampled.

    Args:
        temperature: Softmax temperature; ``0`` is greedy decoding. Must be finite and at least 0. Values
            outside [1e-30, 1e30] are clamped when logits are divided, because float32 cannot tell them from
            greedy or uniform sampling.
        top_k: Number of most likely tokens to keep; ``0`` keeps all.
        top_p: Probability mass in ``(0, 1]`` that the smallest set of most likely tokens must reach to be
            kept.
        max_tokens: Maximum number of tokens to generate, at least 1.
        stop_token_ids: Token ids that end the completion. The stop token is kept in the output. A single id
            may be given without a tuple.
        stop_strings: Strings that end the completion, with the token that completes one of them. Special
            tokens are matched by their text. A single string may be given without a tuple. Needs an engine
            with ``decode_text``.

    Raises:
        ValueError: A field has the wrong type or is out of range; the one-line message names the field.
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
        """Validates all fields and converts them to plain Python numbers and tuples.

        Raises:
            ValueError: A field has the wrong type or is out of range; the one-line message names the field.
        """
        temperature, top_p = as_finite_float(self.temperature), as_finite_float(self.top_p)
        top_k, max_tokens = as_int(self.top_k), as_int(self.max_tokens)
        ids = as_token_ids(
            self.stop_token_ids if as_int(self.stop_token_ids) is None else [self.stop_token_ids]
        )
        strings = [self.stop_strings] if isinstance(self.stop_strings, str) else as_list(self.stop_strings)
        if temperature is None or temperature < 0:
            raise ValueError(
                f"temperature is {short_repr(self.temperature)}: write 0 (greedy) or a positive finite number"
            )
        if top_k is None or top_k < 0:
            raise ValueError(
                f"top_k is {short_repr(self.top_k)}: write 0 to keep all tokens or a positive integer"
            )
        if top_p is None or not 0 < top_p <= 1:
            raise ValueError(f"top_p is {short_repr(self.top_p)}: write a number in (0, 1]")
        if max_tokens is None or max_tokens < 1:
            raise ValueError(f"max_tokens is {short_repr(self.max_tokens)}: write an integer of at least 1")
        if ids is None:
            raise ValueError(
                f"stop_token_ids is {short_repr(self.stop_token_ids)}: write a tuple of token ids"
            )
        if strings is None or not all(isinstance(s, str) for s in strings):
            raise ValueError(f"stop_strings is {short_repr(self.stop_strings)}: write a tuple of strings")
        if "" in strings:
            raise ValueError(
                "stop_strings contains an empty string, which would end every completion at once: remove it"
            )
        plain = (temperature, top_k, top_p, max_tokens, tuple(ids), tuple(strings))
        for name, value in zip(self.__slots__, plain, strict=True):
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0

    @property
    def divisor(self) -> float:
        """The number that logits are divided by: the temperature clamped to [1e-30, 1e30], or 1 if greedy."""
        return 1.0 if self.greedy else min(max(self.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE)

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p truncates the distribution."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class Request:
    """Asks for one completion.

    A request that cannot be served does not raise: the engine returns a rollout for it with finish reason
    FAILED, and the other requests are not affected.

    Args:
        prompt_ids: Token ids of the prompt, at least one: a list, tuple, or one-dimensional array or tensor.
        params: Sampling parameters.
        seed: Random seed, any integer; it is taken modulo 2^64. Every random number of the request is a
            function of (seed, position), so the result does not depend on which other requests are in the
            batch (up to the rounding of batched matrix products).
        group: Any hashable value that identifies the prompt. Requests with equal groups are samples of one
            prompt: they share a prefill and model-free drafts, also with earlier requests of the same group.
            ``None`` shares nothing.
        resume: Paused rollout of the same prompt to continue. If the weights have not changed, the result
            equals that of a run without the pause. If they have, the earlier tokens keep the log-probs and
            the policy version they were sampled under.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    group: Hashable | None = None
    resume: Rollout | None = None


@dataclass(slots=True)
class RolloutStats:
    """Counts the work that went into one rollout.

    Attributes:
        steps: Number of target forwards that the sequence took part in after its prefill.
        drafted: Number of draft tokens verified.
        accepted: Number of draft tokens accepted.
        preempted: Number of times that the sequence lost its cache to others and was prefilled again.
        prefilled: Number of known tokens that forwards read for the sequence. Tokens copied from another
            sequence with a shared prefix do not count.
        seconds: Wall time of the last call, from submission to finish.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    prefilled: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class DistillationTrace:
    """Holds the hidden states that verification saw in one rollout, for training a drafter.

    Below, ``n = len(prompt) + len(completion)``.

    Attributes:
        token_ids: Prompt and completion, int64 [n].
        num_prompt: Length of the prompt in tokens.
        taps: Tapped hidden states of the target at positions ``0 .. n-2``, [n - 1, taps * hidden].
        final: Inputs of the target's output head, [n - 1, hidden]. Only rows from ``num_prompt - 1`` on,
            whose next token was generated, are filled; earlier rows are zero.
        refused: Rejected draft tokens, int64 [R, 2]: the position of each and its token id.
        refused_final: Inputs of the target's output head after each rejected token, [R, hidden].
    """

    token_ids: torch.Tensor
    num_prompt: int
    taps: torch.Tensor
    final: torch.Tensor
    refused: torch.Tensor
    refused_final: torch.Tensor


@dataclass(slots=True)
class Rollout:
    """Holds one finished completion.

    Attributes:
        request: Request that the rollout answers.
        token_ids: Token ids of the completion, including a final stop token.
        logprobs: Natural log-probability of each token under the processed distribution (after temperature,
            top-k and top-p). At temperature 0 that distribution is a point mass, so the distribution at
            temperature 1 is used instead.
        finish_reason: Reason why the rollout ended.
        stats: Steps, drafted and accepted tokens.
        segments: Pairs (policy version, number of tokens sampled under it), oldest first. There is more than
            one if the rollout was paused and resumed after `RolloutEngine.refresh_weights`, which increments
            the version.
        entropies: Entropy in nats of the distribution that each token was sampled from, if the engine
            collects it.
        error: One-line error message if ``finish_reason`` is FAILED.
        trace: Training data for a drafter, if the engine collects it.
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
