"""The teacher is the softmax over the target's whole vocabulary, which a step sums once for each position."""

import pytest
import torch

from paceline.drafter_trainer.storage.stored_trace import StoredTrace
from paceline.drafter_trainer.teacher import Normalizers, Teacher
from paceline.drafter_trainer.trace_buffer import Entry, Piece
from paceline.rollout import Request, SamplingParams
from tests.drafter_trainer.test_training_time_test import buffer_of, pack_pieces, traces_of
from tests.engines import tiny_llama

VOCABULARY = torch.arange(0, 97, 3)


def rows_read(head, monkeypatch):
    """Returns a list to which every call of the head adds its number of rows."""
    rows, forward = [], head.forward
    monkeypatch.setattr(head, "forward", lambda x: rows.append(len(x)) or forward(x))
    return rows


@pytest.fixture(scope="module")
def trace():
    _, rollouts = traces_of(tiny_llama(sharpness=4.0), count=1, tokens=40)
    return rollouts[0].trace


def test_the_whole_vocabulary_is_summed_once_for_each_position(trace, monkeypatch):
    model = tiny_llama(sharpness=4.0)
    rows = rows_read(model.lm_head, monkeypatch)
    entry, last = Entry(StoredTrace(trace)), len(trace.token_ids) - 1
    first = pack_pieces([Piece(entry, 3, 19)], model, VOCABULARY)
    assert sum(rows) == 19 + 3 - 3  # its anchors, and three positions of the drafts after the last
    again = pack_pieces([Piece(entry, 3, 19)], model, VOCABULARY)
    assert sum(rows) == 19
    torch.testing.assert_close(again.teacher, first.teacher, rtol=0, atol=0)
    other = pack_pieces([Piece(entry, 10, last)], model, torch.arange(1, 97, 3), unroll=3)
    assert sum(rows) == last - 3  # only what no batch had
    fresh = pack_pieces([Piece(Entry(StoredTrace(trace)), 10, last)], model, torch.arange(1, 97, 3), unroll=3)
    torch.testing.assert_close(other.teacher, fresh.teacher)


def test_the_next_steps_policy_is_summed_anew():
    model = tiny_llama(sharpness=4.0)
    _, rollouts = traces_of(model)
    buffer = buffer_of(rollouts)
    pieces = buffer.next_batch(1000)
    pack_pieces(pieces, model, VOCABULARY)
    buffer.begin_step()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    (entry, *_) = buffer.previous
    begin, end = entry.trace.num_prompt - 1, entry.trace.length - 1
    batch = pack_pieces([Piece(entry, begin, end)], model, VOCABULARY)
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_any_head_gives_its_own_distribution(bias, adapted):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 97, bias=bias).requires_grad_(False)
    head = Adapted(head) if adapted else head
    final, kept = torch.randn(300, 8), Normalizers(400)
    wanted = torch.softmax(head(final) / 0.7, -1)[:, VOCABULARY]
    teacher = Teacher(head, VOCABULARY, 0.7)
    for probs in (teacher.probs(final), *(teacher.probs(final, [(kept, slice(50, 350))]) for _ in range(2))):
        torch.testing.assert_close(probs, wanted, rtol=1e-4, atol=1e-6)
    assert kept.known.sum() == 300 and kept.known[50:350].all()


def test_distributions_after_rejected_tokens_are_computed_only_if_they_are_trained_on(monkeypatch):
    model = tiny_llama(sharpness=4.0)
    engine, _ = traces_of(model)
    engine.use_strategy("suffix:3")
    (rollout,) = engine.generate([Request([3, 1, 4, 1, 3, 1, 4], SamplingParams(max_tokens=60), seed=1)])
    assert len(rollout.trace.refused)
    rows, last = rows_read(model.lm_head, monkeypatch), len(rollout.trace.token_ids) - 1
    for rejected in (False, True):
        rows.clear()
        piece = Piece(Entry(StoredTrace(rollout.trace)), 0, last)
        batch = pack_pieces([piece], model, VOCABULARY, rejected=rejected)
        expected = len(rollout.trace.refused) if rejected else 0
        assert len(batch.rejected_teacher) == len(batch.rejected_drafts) == expected
        assert sum(rows) == last - rollout.trace.num_prompt + 1 + expected
