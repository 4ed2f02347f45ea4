"""Spares steps that draft nothing what vLLM 0.32 does for drafts in all steps alike.

With a draft depth of 0 vLLM still samples with its rejection sampler, and runs an EAGLE drafter to keep its
keys and values. Here such steps are sampled as without a drafter; the drafter's inputs are kept, and read in
one forward with those of the next step that drafts or reads a prompt. Nothing here imports vLLM.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

_KEPT_SHARE = (
    0.5  # of the tokens of the drafter's largest forward; what does not fit any more is read at once
)


@dataclass
class KeptInputs:
    """The drafter's inputs of steps that drafted nothing, since it last ran.

    Attributes:
        rows: Index of a token in the lists below, by the slot of the drafter's cache that it belongs to.
        positions: Position of each token in its sequence.
        tokens: Their ids: int [n] of each step.
        hidden: The policy's hidden states: [n, H] of each step.
    """

    rows: dict[int, int] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, slots: Sequence[int], positions: Sequence[int], tokens: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """Keeps a step's inputs: one token of each sequence; tensors are copied."""
        self.rows |= {slot: len(self.positions) + i for i, slot in enumerate(slots)}
        self.positions += positions
        self.tokens.append(tokens.clone())
        self.hidden.append(hidden.clone())

    def before(self, position: int, blocks: Sequence[int], block_size: int) -> list[int]:
        """Returns the rows of a sequence's tokens that directly precede ``position``, in order.

        Args:
            position: A position of the sequence.
            blocks: Numbers of the blocks of the drafter's cache that the sequence has.
            block_size: Slots of a block.
        """
        found: list[int] = []
        for earlier in range(position - 1, -1, -1):
            row = self.rows.get(blocks[earlier // block_size] * block_size + earlier % block_size)
            if row is None or self.positions[row] != earlier:
                break
            found.append(row)
        return found[::-1]


@dataclass(frozen=True)
class DrafterInputs:
    """What a proposer of vLLM gets, as far as the kept tokens change it; see its ``propose``.

    Attributes:
        target_token_ids: int [n], tokens that the policy has read, sequence after sequence.
        target_positions: int [n].
        target_hidden_states: [n, H].
        token_indices_to_sample: int [B], index of the token after which each sequence is drafted; None stands
            for the last of each.
        common_attn_metadata: vLLM's ``CommonAttentionMetadata`` of the tokens.
    """

    target_token_ids: torch.Tensor
    target_positions: torch.Tensor
    target_hidden_states: torch.Tensor
    token_indices_to_sample: torch.Tensor | None
    common_attn_metadata: Any


def with_kept(inputs: DrafterInputs, kept: KeptInputs, block_size: int, most: int) -> DrafterInputs:
    """Returns the inputs with the kept tokens of each sequence before its own.

    Args:
        inputs: Inputs of a step.
        kept: Inputs of the steps before it.
        block_size: Slots of a block of the drafter's cache.
        most: Maximum number of tokens; if there are more, the inputs are returned unchanged, and the drafter
            will miss the kept tokens, which costs it acceptance only.
    """
    metadata = inputs.common_attn_metadata
    starts = metadata.query_start_loc_cpu.tolist()
    firsts = inputs.target_positions[metadata.query_start_loc_cpu[:-1]].tolist()
    tables = metadata.block_table_tensor.tolist()
    rows = [
        kept.before(position, blocks, block_size) for position, blocks in zip(firsts, tables, strict=True)
    ]
    added = sum(map(len, rows))
    if not added or starts[-1] + added > most:
        return inputs
    order, ends = [], [0]  # rows of the kept tokens, and of the step's after those; ends of the sequences
    count = len(kept.positions)
    for row, start, end in zip(rows, starts, starts[1:], strict=False):
        order += [*row, *range(count + start, count + end)]
        ends.append(len(order))
    index, now = torch.tensor(order), slice(starts[-1])
    locations = torch.tensor(ends, dtype=metadata.query_start_loc.dtype)
    positions = torch.tensor(kept.positions, dtype=inputs.target_positions.dtype)
    slots = torch.zeros(count, dtype=metadata.slot_mapping.dtype)
    slots[list(kept.rows.values())] = torch.tensor(list(kept.rows), dtype=slots.dtype)
    sample = inputs.token_indices_to_sample
    if sample is not None:
        sample = sample + torch.tensor([len(row) for row in rows]).cumsum(0).to(sample.dtype)
    return DrafterInputs(
        torch.cat([*kept.tokens, inputs.target_token_ids[now]])[index],
        torch.cat([positions, inputs.target_positions[now]])[index],
        torch.cat([*kept.hidden, inputs.target_hidden_states[now]])[index],
        sample,
        replace(
            metadata,
            query_start_loc=locations,
            query_start_loc_cpu=locations,
            num_actual_tokens=len(order),
            max_query_len=max(end - start for start, end in itertools.pairwise(ends)),
            slot_mapping=torch.cat([slots, metadata.slot_mapping[now]])[index],
        ),
    )


def defer_drafting(proposer_class: Any, say: Callable[[str], None]) -> None:
    """Makes the proposers of a class keep the inputs of decode steps that draft nothing.

    It is for CPUs, where a forward of the drafter costs the more of a step, the smaller the model; on GPUs,
    reading positions and slots on the host would make it wait for the device. A second call does nothing.

    Args:
        proposer_class: vLLM's ``SpecDecodeBaseProposer``.
        say: Called with a line if an error has ended it; proposers then run as vLLM wrote them.
    """
    original = proposer_class.propose
    if hasattr(original, "defers"):
        return
    names = [f.name for f in fields(DrafterInputs)]
    working = [True]

    @functools.wraps(original)
    def propose(self: Any, **arguments: Any) -> torch.Tensor:
        if not working[0] or not _defers(self):
            return original(self, **arguments)
        try:
            inputs = DrafterInputs(**{name: arguments[name] for name in names})
            drafted = arguments["num_speculative_tokens"]
            kept = self.__dict__.setdefault("paceline_kept", KeptInputs())
            if not drafted and _keep(inputs, kept, _KEPT_SHARE * self.max_num_tokens):
                self.num_speculative_tokens, self._last_draft_probs = 0, None
                return torch.empty(inputs.common_attn_metadata.num_reqs, 0, dtype=torch.int64)
            changed = with_kept(inputs, kept, self.block_size, self.max_num_tokens)
            arguments |= {name: getattr(changed, name) for name in names}
            del self.paceline_kept
        except Exception as error:  # it would kill vLLM's engine core, for a forward that is only spared
            working[0] = False
            say(f"the drafter runs in every step from now on ({type(error).__name__}: {error})")
        return original(self, **arguments)

    propose.defers = True  # type: ignore[attr-defined]
    proposer_class.propose = propose


def _defers(proposer: Any) -> bool:
    """Whether the proposer reads its inputs as EAGLE does: each token with the hidden state before it."""
    return (
        proposer.method in ("eagle", "eagle3")
        and proposer.block_size > 0
        and not (proposer.needs_extra_input_slots or proposer.uses_mrope or proposer.supports_mm_inputs)
        and not proposer.use_heterogeneous_vocab
    )


def _keep(inputs: DrafterInputs, kept: KeptInputs, most: float) -> bool:
    """Keeps a step's inputs if each sequence has one token and there is room; returns whether it did."""
    metadata = inputs.common_attn_metadata
    count = metadata.num_actual_tokens
    if metadata.max_query_len > 1 or inputs.token_indices_to_sample is not None:
        return False
    if len(kept.positions) + count > most:
        return False
    kept.add(
        metadata.slot_mapping[:count].tolist(),
        inputs.target_positions[:count].tolist(),
        inputs.target_token_ids[:count],
        inputs.target_hidden_states[:count],
    )
    return True


def sample_plainly(runner_class: Any) -> None:
    """Makes model runners of a class sample steps that verify nothing as without a drafter.

    A second call does nothing.

    Args:
        runner_class: vLLM's ``GPUModelRunner``, whose subclass runs on CPUs.
    """
    original = runner_class._prepare_inputs
    if hasattr(original, "samples_plainly"):
        return

    @functools.wraps(original)
    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, scheduler_output, *args, **kwargs)
        if any(scheduler_output.scheduled_spec_decode_tokens.values()):
            return prepared
        logits_indices, _, most_sampled = prepared  # the metadata of drafts in between is that of none
        return logits_indices, None, most_sampled

    _prepare_inputs.samples_plainly = True  # type: ignore[attr-defined]
    runner_class._prepare_inputs = _prepare_inputs
