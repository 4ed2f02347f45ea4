"""Self-speculation: the policy drafts with some of its own layers skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from paceline.rollout.drafters.base import DraftContext, StatelessSlots, VerifiedStep
from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.lm_expander import LMExpander
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.model.runner import ModelRunner
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.transformers_api import hidden_states_in
from paceline.rollout.trees import DraftKind, DraftTree


class ClaspDrafter(StatelessSlots):
    """Drafts chains with the policy's own weights, which need no training and are always up to date.

    CLaSp (Chen et al., "CLaSp: In-Context Layer Skip for Self-Speculative Decoding", arXiv 2505.24196):
    dynamic programming over the layers finds the ones to skip such that the last token's hidden state stays
    closest, by cosine, to that of the full model. State (i, j) is the best hidden state after i layers of
    which j were skipped::

        g(i + 1, j) = the closer of  layer_i(g(i, j))  and  g(i, j − 1)
                      to  layer_i applied to the full model's state

    All j of a layer are evaluated side by side, so that the search costs about one forward of ``skipped`` + 1
    tokens. The paper searches after every verification; this drafter searches at every ``every``-th draft,
    for the first sequence of the batch.

    The draft's keys lie in the policy's cache, where verification overwrites them with its own.

    Args:
        runner: The engine's model runner.
        skipped: Number of layers to skip.
        every: Number of drafts between searches.
        rules: How chains are drawn and ended; None takes the likeliest tokens.

    Raises:
        ValueError: ``skipped`` is not between 1 and the number of layers − 1.
    """

    name = "clasp"
    chains_only = True

    def __init__(
        self, runner: ModelRunner, skipped: int, *, every: int = 32, rules: DraftRules | None = None
    ) -> None:
        layers = runner.shape.layers
        if not 0 < skipped < layers:
            raise ValueError(f"clasp skips {skipped} of {layers} layers: write 1 to {layers - 1}")
        self.runner, self.skipped, self.every = runner, skipped, every
        self.rules = DraftRules() if rules is None else rules
        first = (layers - skipped) // 2  # the middle layers, until the first search
        self.skipped_layers: tuple[int, ...] = tuple(range(first, first + skipped))
        self._drafts = 0

    @classmethod
    def build(cls, host: DrafterHost, parts: DrafterParts) -> ClaspDrafter:
        """Builds the drafter for an engine, with the share of skipped layers that ``parts`` has."""
        layers = host.runner.shape.layers
        skipped = min(max(round(parts.clasp_skipped * layers), 1), layers - 1)
        return cls(host.runner, skipped, rules=parts.rules)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns the kind of a chain under ``rules``, see `Drafter`."""
        return rules.kind(1)

    @torch.no_grad()
    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Drafts chains with the layers skipped, after a new search if one is due."""
        sequences = context.sequences
        room = max(strategy.depth, self.skipped + 1) + 2
        self.runner.cache.reserve([len(s.tokens) + room for s in sequences], active=len(sequences))
        fits = len(sequences[0].tokens) + self.skipped + 1 <= self.runner.cache.shape.capacity
        if self._drafts % self.every == 0 and fits:
            self.skipped_layers = self._choose(sequences)
        self._drafts += 1
        rows = DraftRows.of(sequences, self.runner.cache.device)
        with self.runner.layers_replaced(dict.fromkeys(self.skipped_layers, _Identity)):
            expander = LMExpander(self.runner.branch, None, sequences, rows, rows.trunks)
            return self.rules.grow(expander, Strategy(self.name, strategy.depth), rows)

    def _choose(self, sequences: Sequence[SequenceState]) -> tuple[int, ...]:
        """Returns the layers to skip, from the hidden state of the first sequence's last token."""
        first = sequences[0]
        states = self.skipped + 1
        device = self.runner.cache.device
        search = _Search(states, device)
        layers = range(self.runner.shape.layers)
        # one copy of the token for each state, side by side, each attending to the text before it and itself
        place = torch.arange(states, device=device)[None] + len(first.tokens) - 1
        trunk = torch.full_like(place, len(first.tokens) - 1)
        seats = torch.stack([trunk, place, trunk, 1 << torch.arange(states, device=device)[None]])
        with self.runner.layers_replaced(dict.fromkeys(layers, search.watch)):
            self.runner.branch(torch.full((1, states), first.tokens[-1], device=device), seats)
        return search.skipped_layers()

    def verified(self, step: VerifiedStep) -> None:
        """Passes verifications of this drafter's drafts on to the stop policy."""
        if step.strategy.drafter == self.name:
            self.rules.learn(step)


class _Identity(nn.Module):
    """Replaces a layer that is skipped."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the hidden states that the layer was called with."""
        return hidden_states_in(args, kwargs)


class _Search:
    """Runs the dynamic program; row j of the hidden states skipped j layers, row 0 is the full model."""

    def __init__(self, states: int, device: torch.device) -> None:
        self._possible = torch.zeros(states, dtype=torch.bool, device=device)
        self._possible[0] = True
        self._skips: list[torch.Tensor] = []

    def watch(self, layer: nn.Module) -> nn.Module:
        """Wraps the layer so that a step of the program follows it."""
        return _Watched(layer, self)

    def step(self, before: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Returns the better of keeping and of skipping a layer, for each row.

        Args:
            before: [states, hidden], hidden states before the layer.
            kept: [states, hidden], hidden states after it.
        """
        skipped = before.roll(1, dims=0)
        full_model = kept[:1].float()
        possible = self._possible.roll(1)
        possible[0] = False
        # −2 is below every cosine: states that cannot exist yet are never chosen
        keeping, skipping = (
            torch.cosine_similarity(states.float(), full_model, dim=-1).masked_fill(~exists, -2.0)
            for states, exists in ((kept, self._possible), (skipped, possible))
        )
        skip = skipping > keeping
        self._skips.append(skip)
        self._possible = self._possible | possible
        return torch.where(skip[:, None], skipped, kept)

    def skipped_layers(self) -> tuple[int, ...]:
        """Returns the layers that the last state skipped, traced back from the end."""
        state, layers = len(self._possible) - 1, []
        for index in range(len(self._skips) - 1, -1, -1):
            if bool(self._skips[index][state]):
                layers.append(index)
                state -= 1
        return tuple(sorted(layers))


class _Watched(nn.Module):
    """Calls a layer and then a step of the search."""

    def __init__(self, layer: nn.Module, search: _Search) -> None:
        super().__init__()
        self._layer, self._search = layer, search

    def __getattr__(self, name: str) -> Any:
        """Returns any other attribute that the model reads from its layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the hidden states that the search chose after the layer."""
        out = self._layer(*args, **kwargs)
        kept = out[0] if isinstance(out, tuple) else out
        return self._search.step(hidden_states_in(args, kwargs)[0], kept[0])[None]
