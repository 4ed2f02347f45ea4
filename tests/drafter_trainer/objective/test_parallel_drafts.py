"""Drafts in one pass are trained as they are drafted."""

from dataclasses import replace

import pytest
import torch

from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.objective.parallel_drafts import retained_shares
from paceline.drafter_trainer.objective.training_time_test import unrolled_loss
from paceline.drafter_trainer.storage.stored_trace import StoredTrace
from paceline.drafter_trainer.trace_buffer import Entry, Piece
from paceline.rollout import Request, Strategy
from paceline.rollout.drafters import DraftContext, Eagle3Drafter
from paceline.rollout.sequence import SequenceState
from tests.drafter_trainer.objective.test_training_time_test import (
    learner_for,
    pack_pieces,
    packed,
    reader_of,
    traces_of,
)
from tests.engines import tiny_eagle3, tiny_llama

DEPTH = 4


@pytest.fixture(scope="module")
def model():
    return tiny_llama(sharpness=4.0)


@pytest.fixture(scope="module")
def rollouts(model):
    return traces_of(model, count=4)[1]


def logits_of(monkeypatch, eagle, model, batch, objective, draw=None) -> list[torch.Tensor]:
    """The logits of the first position, and those of all further positions in one tensor."""
    seen, original = [], type(eagle).logits
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(eagle), "logits", lambda self, x: seen.append(original(self, x)) or seen[-1])
        unrolled_loss(eagle, model.model.embed_tokens, batch, objective, draw=draw)
    return seen


def test_training_computes_what_drafting_computes(model, rollouts, monkeypatch):
    """The logits of each anchor and position in training are those that are drafted from there."""
    eagle, trace = tiny_eagle3(model, parallel=True), rollouts[0].trace
    batch = packed([trace], model, eagle.vocabulary, unroll=DEPTH)
    batch.trained[:] = True
    first, later = logits_of(monkeypatch, eagle, model, batch, Objective(unroll=1, parallel=DEPTH))
    anchors = len(batch.anchor_index)
    trained = torch.cat([first[None], later.view(DEPTH - 1, anchors, -1)])
    drafter = Eagle3Drafter(eagle, model.model.embed_tokens, slots=1, capacity=64, dtype=torch.float32)
    taps = torch.zeros(1, 64, 4, 64)
    taps[0, :anchors, :3] = trace.taps.view(anchors, 3, 64)
    found, read = [], drafter._network.read
    drafter._network.read = lambda reading: found.append(read(reading)) or found[-1]
    for anchor in range(anchors - 1):
        sequence = SequenceState(Request(trace.token_ids[: anchor + 2].tolist()), 0, 64)
        context = DraftContext([sequence], reader_of(taps))
        drafted = drafter.propose_parallel(context, Strategy("parallel", DEPTH)).tokens[0]
        drafter.release(0)
        assert torch.equal(drafted, eagle.vocabulary[trained[:, anchor].argmax(-1)])
        torch.testing.assert_close(found[-1][1][0], trained[:, anchor], rtol=1e-4, atol=1e-4)
    assert len(set(trained.argmax(-1).flatten().tolist())) > 3


def test_a_cut_trace_with_its_context_gives_the_logits_of_the_uncut_one(model, rollouts, monkeypatch):
    eagle, trace = tiny_eagle3(model, parallel=True), rollouts[0].trace
    entry, objective = Entry(StoredTrace(trace)), Objective(unroll=1, parallel=DEPTH)
    found = []
    for begin in (0, 8):
        batch = pack_pieces([Piece(entry, begin, 16)], model, eagle.vocabulary, unroll=DEPTH)
        batch.trained[:] = True
        first, later = logits_of(monkeypatch, eagle, model, batch, objective)
        found.append([x[-8:] for x in (first, *later.chunk(DEPTH - 1))])
    torch.testing.assert_close(found[0], found[1])


def test_dropping_anchors_changes_no_expectation(model, rollouts):
    """The mean loss over many draws is the loss of all anchors, and far positions have fewer of them."""
    eagle = tiny_eagle3(model, parallel=True)
    batch = packed([r.trace for r in rollouts], model, eagle.vocabulary, unroll=DEPTH)
    objective = Objective(unroll=2, parallel=DEPTH, retained=0.5)
    assert retained_shares(objective) == [0.5, 0.25, 0.2]

    def loss(seed: int | None) -> float:
        draw = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return float(unrolled_loss(eagle, model.model.embed_tokens, batch, objective, draw=draw).loss)

    drawn = torch.tensor([loss(seed) for seed in range(200)])
    assert drawn.std() > 0
    assert abs(float(drawn.mean()) - loss(None)) < 4 * float(drawn.std()) / 200**0.5


def test_gradients_are_those_of_anchors_one_by_one(model, rollouts):
    """Anchors do not see each other's masks: the gradient of all is the mean of those of each alone."""
    eagle = tiny_eagle3(model, parallel=True)
    batch = packed([rollouts[0].trace], model, eagle.vocabulary, unroll=DEPTH)
    objective = Objective(unroll=1, parallel=DEPTH)

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        eagle.zero_grad()
        weighted = replace(batch, weights=weights)
        unrolled_loss(eagle, model.model.embed_tokens, weighted, objective).loss.backward()
        return eagle.mask_hidden.grad.clone()

    drafting = batch.trained[batch.anchor_index].nonzero()[:, 0]
    alone = [gradient(torch.zeros(len(batch.weights)).index_fill(0, row, 1.0)) for row in drafting]
    torch.testing.assert_close(gradient(batch.weights), torch.stack(alone).mean(0), atol=1e-7, rtol=1e-4)


def test_a_drafter_learns_to_draft_in_one_pass(model, rollouts):
    learner = learner_for(tiny_eagle3(model, parallel=True), model, lr=3e-3)
    pieces = [Piece(Entry(StoredTrace(r.trace)), 3, len(r.trace.token_ids) - 1) for r in rollouts]
    learner.objective = Objective(unroll=1, parallel=DEPTH)
    before = learner.evaluate(pieces)
    for _ in range(60):
        assert learner.update(pieces, [1.0] * len(pieces)) is not None
    after = learner.evaluate(pieces)
    assert len(after.parallel_acceptance) == DEPTH
    assert all(
        a > b + 0.05 for a, b in zip(after.parallel_acceptance, before.parallel_acceptance, strict=True)
    )
    assert after.length > before.length + 0.5
    learner.objective = Objective(unroll=DEPTH)
    assert learner.evaluate(pieces).acceptance[0] == pytest.approx(after.acceptance[0])


def test_an_update_does_not_depend_on_those_of_other_learners(model, rollouts):
    """Which anchors are dropped follows from the number of the update: a resumed run drops the same."""
    pieces = [Piece(Entry(StoredTrace(r.trace)), 3, len(r.trace.token_ids) - 1) for r in rollouts]
    ends = []
    for seed in (0, 7):
        torch.manual_seed(seed)
        learner = learner_for(tiny_eagle3(model, parallel=True), model, lr=1e-3)
        learner.objective = Objective(unroll=2, parallel=DEPTH, retained=0.5)
        for _ in range(3):
            learner.update(pieces, [1.0] * len(pieces))
        ends.append(learner.model.mask_hidden.detach().clone())
    assert torch.equal(*ends)
