"""A drafter that reads tokens later has the same cache as one that reads them at once.

Steps without drafts are sampled as without a drafter.
"""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from paceline.rollout.backends.adaptive.undrafted_steps import defer_drafting, sample_plainly

BLOCK = 4


@dataclass
class Metadata:
    """The fields of vLLM's CommonAttentionMetadata that proposers of one attention group read."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor


class Proposer:
    """Writes what it reads into a cache, as vLLM's EAGLE proposer does, and counts its forwards."""

    method, needs_extra_input_slots, uses_mrope = "eagle3", False, False
    supports_mm_inputs = use_heterogeneous_vocab = False

    def __init__(self, max_num_tokens=64):
        self.block_size, self.max_num_tokens = BLOCK, max_num_tokens
        self.cache = {}  # by slot: position, id of the next token, hidden state
        self.forwards, self.queries = 0, []

    def propose(
        self,
        num_speculative_tokens,
        target_token_ids,
        target_positions,
        target_hidden_states,
        next_token_ids,
        token_indices_to_sample,
        common_attn_metadata,
    ):
        metadata = common_attn_metadata
        n = metadata.num_actual_tokens
        last = token_indices_to_sample
        if last is None:
            last = metadata.query_start_loc[1:] - 1
        ids = target_token_ids.roll(-1)
        ids[last] = next_token_ids
        assert n <= self.max_num_tokens
        assert len(ids) == n == int(metadata.query_start_loc[-1])
        for i in range(n):
            entry = int(target_positions[i]), int(ids[i]), float(target_hidden_states[i, 0])
            self.cache[int(metadata.slot_mapping[i])] = entry
        self.forwards += 1
        self.queries.append(metadata.query_start_loc.diff().tolist())
        return target_positions[last].unsqueeze(1).expand(-1, num_speculative_tokens)


class Sequence:
    """A sequence with blocks of its own; its tokens and hidden states are drawn."""

    def __init__(self, number, length, draw):
        self.tokens = [draw.randrange(1000) for _ in range(length + 1)]  # the last one is not read yet
        self.hidden = [draw.random() for _ in range(length + 1)]
        self.read = 0
        self.blocks = [number * 16 + i for i in range(16)]

    def slot(self, position):
        return self.blocks[position // BLOCK] * BLOCK + position % BLOCK


def step(proposer, sequences, depth, draw, rejected=0):
    """Proposes after a step in which each sequence has read its new tokens and ``rejected`` wrong ones."""
    tokens, positions, hidden, slots, starts, last = [], [], [], [], [0], []
    for s in sequences:
        end = len(s.tokens) - 1
        last.append(starts[-1] + end - s.read - 1)
        for position in range(s.read, end + rejected):
            kept = position < end
            tokens.append(s.tokens[position] if kept else -1)
            positions.append(position)
            hidden.append(s.hidden[position] if kept else -1.0)
            slots.append(s.slot(position))
        starts.append(len(tokens))
        s.read = end
    loc = torch.tensor(starts, dtype=torch.int32)
    drafts = proposer.propose(
        num_speculative_tokens=depth,
        target_token_ids=torch.tensor(tokens),
        target_positions=torch.tensor(positions),
        target_hidden_states=torch.tensor(hidden)[:, None],
        next_token_ids=torch.tensor([s.tokens[-1] for s in sequences]),
        token_indices_to_sample=torch.tensor(last, dtype=torch.int32) if rejected else None,
        common_attn_metadata=Metadata(
            loc,
            loc,
            torch.tensor([s.read for s in sequences]),
            len(sequences),
            len(tokens),
            int(loc.diff().max()),
            torch.tensor([s.blocks for s in sequences]),
            torch.tensor(slots),
        ),
    )
    assert drafts.shape == (len(sequences), depth)
    if depth:
        assert drafts[:, 0].tolist() == [s.read - 1 for s in sequences]
    for s in sequences:
        for _ in range(1 + (draw.randrange(depth + 1) if depth else 0)):
            s.tokens.append(draw.randrange(1000))
            s.hidden.append(draw.random())


def deferring(said=None):
    class Deferring(Proposer):
        pass

    defer_drafting(Deferring, (said if said is not None else []).append)
    return Deferring()


def assert_caches_agree(proposer, sequences):
    for s in sequences:
        for position in range(s.read):
            expected = position, s.tokens[position + 1], s.hidden[position]
            assert proposer.cache[s.slot(position)] == pytest.approx(expected)


@pytest.mark.parametrize("rejected", [0, 2])
def test_the_next_drafts_see_every_token(rejected):
    draw = random.Random(0)
    for _ in range(50):
        proposer = deferring()
        sequences = [Sequence(i, draw.randrange(1, 9), draw) for i in range(3)]
        step(proposer, sequences, 0, draw)  # reads the prompts
        assert proposer.forwards == 1
        for _ in range(draw.randrange(1, 10)):
            step(proposer, sequences, 0, draw)
        assert proposer.forwards == 1
        step(proposer, sequences, 2, draw, rejected)
        assert proposer.forwards == 2
        assert_caches_agree(proposer, sequences)


def test_sequences_end_and_begin_in_blocks_of_others():
    draw = random.Random(1)
    proposer = deferring()
    sequences = [Sequence(i, 5, draw) for i in range(3)]
    step(proposer, sequences, 0, draw)
    for number in range(30):
        step(proposer, sequences, 0, draw)
        if number % 7 == 3:  # one ends; another begins in its blocks, and its prompt is read
            sequences[number % 3] = Sequence(number % 3, draw.randrange(1, 9), draw)
            step(proposer, sequences, 0, draw)
            assert_caches_agree(proposer, sequences)
        if number % 11 == 5:
            step(proposer, sequences, 1, draw)
            assert_caches_agree(proposer, sequences)
    assert proposer.forwards < 15  # of 38 steps


def test_what_is_kept_is_read_before_it_is_too_much_for_one_forward():
    draw = random.Random(2)
    proposer = deferring()
    sequences = [Sequence(i, 1, draw) for i in range(4)]
    for _ in range(40):
        step(proposer, sequences, 0, draw)
    assert 1 < proposer.forwards <= 6
    step(proposer, sequences, 1, draw)
    assert_caches_agree(proposer, sequences)


def test_a_step_that_drafts_as_the_last_one_did_is_unchanged():
    draw = random.Random(3)
    proposer = deferring()
    sequences = [Sequence(i, 4, draw) for i in range(2)]
    for _ in range(3):
        step(proposer, sequences, 2, draw)
    assert proposer.queries[0] == [4, 4]
    assert proposer.forwards == 3


def test_a_prompt_that_leaves_no_room_costs_the_kept_tokens_only():
    draw = random.Random(4)
    proposer = deferring()
    sequences = [Sequence(0, 3, draw)]
    step(proposer, sequences, 0, draw)
    step(proposer, sequences, 0, draw)
    long = Sequence(1, 62, draw)
    step(proposer, [*sequences, long], 0, draw)
    assert_caches_agree(proposer, [long])


def test_other_proposers_run_in_every_step():
    draw = random.Random(5)
    proposer = deferring()
    proposer.method = "draft_model"
    sequences = [Sequence(0, 3, draw)]
    for _ in range(5):
        step(proposer, sequences, 0, draw)
    assert proposer.forwards == 5


def test_an_error_ends_it_with_a_line():
    draw, said = random.Random(6), []
    proposer = deferring(said)
    sequences = [Sequence(0, 3, draw)]
    step(proposer, sequences, 0, draw)
    proposer.paceline_kept = "broken"
    for _ in range(3):
        step(proposer, sequences, 0, draw)
    assert proposer.forwards == 4
    assert len(said) == 1
    assert "\n" not in said[0]


def test_only_steps_with_drafts_are_sampled_for_drafts():
    class Runner:
        def _prepare_inputs(self, scheduler_output, scheduled):
            return "indices", "metadata of drafts", scheduled

    sample_plainly(Runner)
    sample_plainly(Runner)
    for drafts, expected in (
        ({}, None),
        ({"a": [], "b": []}, None),
        ({"a": [], "b": [7]}, "metadata of drafts"),
    ):
        step = SimpleNamespace(scheduled_spec_decode_tokens=drafts)
        assert Runner()._prepare_inputs(step, 1) == ("indices", expected, 1)
