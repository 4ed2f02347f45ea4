"""The teacher is the softmax over the target's whole vocabulary, which a step sums once for each position."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paceline.drafter_trainer import teacher
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.storage.stored_trace import StoredTrace
from paceline.drafter_trainer.teacher import Normalizers, Teacher
from paceline.drafter_trainer.trace_buffer import Entry, Piece
from paceline.rollout import Request, SamplingParams
from tests.drafter_trainer.objective.test_training_time_test import (
    buffer_of,
    learner_for,
    pack_pieces,
    traces_of,
)
from tests.engines import tiny_eagle3, tiny_llama

VOCABULARY = torch.arange(0, 97, 3)


def products(pieces, model, vocabulary=VOCABULARY, **options):
    """The batch, and the rows of products with the whole vocabulary that it took; there are 64 inputs."""
    with FlopCounterMode(display=False) as counter:
        batch = pack_pieces(pieces, model, vocabulary, **options)
    drafted = int(batch.trained.sum()) + len(batch.rejected_teacher)
    rows, rest = divmod(counter.get_total_flops() // (2 * 64) - drafted * len(vocabulary), 97)
    assert rest == 0
    return batch, rows


@pytest.fixture(scope="module")
def trace():
    _, rollouts = traces_of(tiny_llama(sharpness=4.0), count=1, tokens=40)
    return rollouts[0].trace


def test_the_whole_vocabulary_is_summed_once_for_each_position(trace):
    model = tiny_llama(sharpness=4.0)
    entry, last = Entry(StoredTrace(trace)), len(trace.token_ids) - 1
    first, rows = products([Piece(entry, 3, 19)], model)
    assert rows == 19 - 3 + 3  # its anchors, and three positions of the drafts after the last
    again, rows = products([Piece(entry, 3, 19)], model)
    assert rows == 0
    torch.testing.assert_close(again.teacher, first.teacher, rtol=0, atol=0)
    other = torch.arange(1, 97, 3)
    later, rows = products([Piece(entry, 10, last)], model, other)
    assert rows == last - 22  # only what no batch had
    fresh = pack_pieces([Piece(Entry(StoredTrace(trace)), 10, last)], model, other)
    torch.testing.assert_close(later.teacher, fresh.teacher)


@pytest.mark.parametrize("same_policy", [False, True])
def test_another_policy_is_summed_anew(same_policy):
    model = tiny_llama(sharpness=4.0)
    _, rollouts = traces_of(model)
    buffer = buffer_of(rollouts)
    pack_pieces(buffer.next_batch(1000), model, VOCABULARY)
    buffer.begin_step(same_policy)
    if not same_policy:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    (entry, *_) = buffer.previous
    begin, end = entry.trace.num_prompt - 1, entry.trace.length - 1
    batch, rows = products([Piece(entry, begin, end)], model)
    assert rows == (0 if same_policy else end - begin)
    with torch.no_grad():
        wanted = torch.softmax(model.lm_head(entry.trace.get().final[begin:end]), -1)[:, VOCABULARY]
    torch.testing.assert_close(batch.teacher[: end - begin], wanted, rtol=1e-4, atol=1e-6)


class Adapted(torch.nn.Module):
    """A head that is more than its base layer, as with an adapter."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("elements", [2**24, 4000, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_any_head_gives_its_own_distribution_in_blocks_of_any_size(bias, adapted, elements, monkeypatch):
    monkeypatch.setattr(teacher, "_ELEMENTS", elements)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 97, bias=bias).requires_grad_(False)
    head = Adapted(head) if adapted else head
    final, kept = torch.randn(300, 8), Normalizers(400)
    wanted = torch.softmax(head(final) / 0.7, -1)[:, VOCABULARY]
    widths, linear = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b: widths.add(len(w)) or linear(x, w, b))
    distribution, places = Teacher(head, VOCABULARY, 0.7), [(kept, slice(50, 350))]
    for probs in (distribution.probs(final), *(distribution.probs(final, places) for _ in range(2))):
        torch.testing.assert_close(probs, wanted, rtol=1e-4, atol=1e-6)
    assert adapted or max(widths - {len(VOCABULARY)}) <= max(elements // len(final), 1)


@pytest.mark.parametrize("fast", [False, True])
def test_a_bfloat16_head_is_multiplied_in_float32_where_there_is_no_autocast(fast, monkeypatch):
    head = torch.nn.Linear(8, 97, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    final, seen, linear = torch.randn(5, 8, dtype=torch.bfloat16), set(), torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b: seen.add((x.dtype, w.dtype)) or linear(x, w, b)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
        probs = Teacher(head, VOCABULARY, 1.0).probs(final)
    assert probs.dtype == torch.float32
    assert seen == {(torch.bfloat16, torch.bfloat16) if fast else (torch.float32, torch.float32)}


def test_distributions_after_rejected_tokens_are_computed_only_if_they_are_trained_on():
    model = tiny_llama(sharpness=4.0)
    engine, _ = traces_of(model)
    engine.use_strategy("suffix:3")
    (rollout,) = engine.generate([Request([3, 1, 4, 1, 3, 1, 4], SamplingParams(max_tokens=60), seed=1)])
    last = len(rollout.trace.token_ids) - 1
    assert len(rollout.trace.refused)
    for rejected in (False, True):
        piece = Piece(Entry(StoredTrace(rollout.trace)), 0, last)
        batch, rows = products([piece], model, rejected=rejected)
        expected = len(rollout.trace.refused) if rejected else 0
        assert len(batch.rejected_teacher) == len(batch.rejected_drafts) == expected
        assert rows == last - rollout.trace.num_prompt + 1 + expected
    learner = learner_for(tiny_eagle3(model), model, lr=1e-3)
    losses = []
    for weight in (0.0, 1.0):
        learner.objective = Objective(on_policy=weight)
        losses.append(float(learner.evaluate([piece]).loss))
    assert losses[1] > losses[0] > 0
