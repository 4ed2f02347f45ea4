"""The target's distributions over the draft vocabulary, from the stored inputs of its output head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_ROWS_PER_CHUNK = 256  # bounds the memory of logits over the target's whole vocabulary


class Normalizers:
    """The log-sum-exp of the target's logits at the positions of one trace, as far as it has been computed.

    The sum runs over the target's whole vocabulary, mostly many times the draft vocabulary. It stays the same
    for all passes over a trace, all learners and all evaluations, while the output head does not change.

    Args:
        positions: Number of positions.
    """

    def __init__(self, positions: int) -> None:
        self.known = torch.zeros(
            positions, dtype=torch.bool
        )  # on the CPU: no batch waits for a GPU to read it
        self.values = torch.zeros(positions)


@dataclass(frozen=True, slots=True)
class Teacher:
    """What the drafter learns: the target's probabilities at the rollouts' temperature.

    Attributes:
        head: The target's output head.
        vocabulary: int64 [W], the draft vocabulary.
        temperature: Sampling temperature of the rollouts.
    """

    head: nn.Module
    vocabulary: torch.Tensor
    temperature: float

    def probs(
        self, final: torch.Tensor, spans: Sequence[tuple[Normalizers, slice]] | None = None
    ) -> torch.Tensor:
        """Returns the target's probabilities of the draft vocabulary, float32 [M, W].

        A row sums to less than 1 where tokens outside the draft vocabulary are likely.

        Args:
            final: [M, hidden], inputs of the output head; they may be in another precision than the head.
            spans: The traces' normalizers and the positions in each that the rows are, in their order. Those
                that are known are used and the others added. None computes all and keeps none.
        """
        inputs = final.to(next(self.head.parameters()).dtype)
        log_sums = self._log_sums(inputs) if spans is None else self._kept_log_sums(inputs, spans)
        return torch.exp(self._draft_logits(inputs).float() / self.temperature - log_sums[:, None])

    def _draft_logits(self, inputs: torch.Tensor) -> torch.Tensor:
        head = self.head
        if not isinstance(head, nn.Linear):  # an adapter's layer, for example
            return torch.cat([head(x)[:, self.vocabulary] for x in inputs.split(_ROWS_PER_CHUNK)])
        bias = None if head.bias is None else head.bias[self.vocabulary]
        return nn.functional.linear(inputs, head.weight[self.vocabulary], bias)

    def _log_sums(self, inputs: torch.Tensor) -> torch.Tensor:
        chunks = inputs.split(_ROWS_PER_CHUNK)
        return torch.cat([torch.logsumexp(self.head(x).float() / self.temperature, -1) for x in chunks])

    def _kept_log_sums(
        self, inputs: torch.Tensor, spans: Sequence[tuple[Normalizers, slice]]
    ) -> torch.Tensor:
        for kept, _ in spans:
            kept.values = kept.values.to(inputs.device)
        log_sums = torch.cat([kept.values[places] for kept, places in spans])
        missing = (~torch.cat([kept.known[places] for kept, places in spans])).nonzero()[:, 0]
        if not len(missing):
            return log_sums
        rows = missing.to(inputs.device)
        log_sums[rows] = self._log_sums(inputs[rows])
        sizes = [places.stop - places.start for _, places in spans]
        for (kept, places), values in zip(spans, log_sums.split(sizes), strict=True):
            kept.values[places], kept.known[places] = values, True
        return log_sums
