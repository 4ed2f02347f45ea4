"""The target's distributions over the draft vocabulary, from the stored inputs of its output head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_ELEMENTS = 2**24  # largest number of logits, and of converted weights, that one block of the vocabulary has
_ROWS = 256  # largest number of rows whose logits are computed at once by a head that has no blocks


class Normalizers:
    """Keeps the log-sum-exp of the target's logits at the positions of one trace, once it is computed.

    The sum runs over the target's whole vocabulary, which mostly has many times as many tokens as the draft
    vocabulary. All passes over the trace, learners and evaluations share it until the output head changes.

    Args:
        positions: Number of positions.

    Attributes:
        known: bool [positions], on the CPU: which values have been computed.
        values: float32 [positions], zero where they have not; on the device of the first batch that asked.
    """

    def __init__(self, positions: int) -> None:
        # on the CPU, so that no batch waits for a GPU to read it
        self.known = torch.zeros(positions, dtype=torch.bool)
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
            spans: For each trace in turn, its normalizers and the positions of its rows. Normalizers that are
                known are used, the others computed and kept. None computes all and keeps none.
        """
        head = self.head
        if not isinstance(head, nn.Linear):  # an adapter's layer, for example
            return self._whole(final)
        log_sums = self._log_sums(head, final) if spans is None else self._kept_log_sums(head, final, spans)
        return torch.exp(self._logits(head, final, self.vocabulary) - log_sums[:, None])

    def _whole(self, final: torch.Tensor) -> torch.Tensor:
        """Returns the probabilities for a head of any kind."""
        inputs = final.to(next(self.head.parameters()).dtype).split(_ROWS)
        probs = (torch.softmax(self.head(x).float() / self.temperature, -1) for x in inputs)
        return torch.cat([p[:, self.vocabulary] for p in probs])

    def _logits(self, head: nn.Linear, final: torch.Tensor, tokens: torch.Tensor | slice) -> torch.Tensor:
        """Returns the logits of some tokens at the rollouts' temperature, float32 [M, tokens]."""
        weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
        if not torch.is_autocast_enabled(final.device.type):  # processors without bfloat16 crawl in it
            weight, final, bias = weight.float(), final.float(), None if bias is None else bias.float()
        return nn.functional.linear(final.to(weight.dtype), weight, bias).float() / self.temperature

    def _log_sums(self, head: nn.Linear, final: torch.Tensor) -> torch.Tensor:
        """Returns the log-sum-exp of the logits at each row, float32 [M]."""
        size = max(_ELEMENTS // max(len(final), head.in_features), 1)
        blocks = (slice(begin, begin + size) for begin in range(0, head.out_features, size))
        return torch.stack([self._logits(head, final, block).logsumexp(-1) for block in blocks]).logsumexp(0)

    def _kept_log_sums(
        self, head: nn.Linear, final: torch.Tensor, spans: Sequence[tuple[Normalizers, slice]]
    ) -> torch.Tensor:
        """Returns the log-sum-exp of the logits at each row, computing only what the normalizers lack."""
        for kept, _ in spans:
            kept.values = kept.values.to(final.device)
        log_sums = torch.cat([kept.values[places] for kept, places in spans])
        missing = (~torch.cat([kept.known[places] for kept, places in spans])).nonzero()[:, 0]
        if not len(missing):
            return log_sums
        rows = missing.to(final.device)
        log_sums[rows] = self._log_sums(head, final[rows])
        sizes = [places.stop - places.start for _, places in spans]
        for (kept, places), values in zip(spans, log_sums.split(sizes), strict=True):
            kept.values[places], kept.known[places] = values, True
        return log_sums
