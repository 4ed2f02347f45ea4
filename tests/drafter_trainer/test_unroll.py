"""Training-time test computes what drafting computes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_trainer.buffer import TraceBuffer
from drafter_trainer.initial import initial_drafter
from drafter_trainer.learner import DrafterLearner
from drafter_trainer.losses import soft_cross_entropy
from drafter_trainer.unroll import make_batch, unrolled_loss
from drafter_trainer.vocabulary import choose_vocabulary, coverage
from rollout import DistillationTrace, Request, SamplingParams, Strategy, mean_acceptance_length
from rollout.drafters import DraftContext, Eagle3Drafter
from rollout.drafters.eagle3_model import eagle3_config
from rollout.sequence import SequenceState
from tests.support import engine_for, tiny_eagle3, tiny_llama


def traces_of(model, count=6, tokens=20, **options):
    engine = engine_for(model, collect_traces=True, **options)
    requests = [Request([3, 1, 4, i], SamplingParams(max_tokens=tokens - i), seed=i) for i in range(count)]
    return engine, engine.generate(requests)


def learner_for(drafter, model, *, lr, unroll) -> DrafterLearner:
    return DrafterLearner(
        drafter,
        model.model.embed_tokens,
        model.lm_head,
        lr=lr,
        temperature=1.0,
        unroll=unroll,
        decay=0.8,
        autocast=lambda: torch.autocast("cpu", enabled=False),
    )


def test_unrolled_outputs_are_those_of_the_drafter(monkeypatch):
    """From each anchor, the greedy tokens of the unrolled model are what the inference drafter proposes, when the text continues as
    the drafter drafts: checked by drafting from every prefix and comparing step 0, and step 1 where the draft was right."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=1)
    trace = rollouts[0].trace
    outputs = []
    original = type(eagle).logits
    monkeypatch.setattr(type(eagle), "logits", lambda self, hidden: outputs.append(original(self, hidden)) or outputs[-1])
    batch = make_batch([trace], model.lm_head, eagle.vocabulary, 1.0, unroll=2)
    batch.trained[:] = True
    with torch.no_grad():
        unrolled_loss(eagle, model.model.embed_tokens, batch, unroll=2, decay=1.0)
    anchors = batch.taps.shape[1]
    step0, step1 = (o.view(anchors, -1) for o in outputs)
    monkeypatch.undo()
    drafter = Eagle3Drafter(eagle, model.model.embed_tokens, slots=1, capacity=64, dtype=torch.float32)
    taps = torch.zeros(1, 64, 4, 64)
    taps[0, :anchors, :3] = trace.taps.view(anchors, 3, 64)
    right = 0
    for anchor in range(anchors - 2):
        sequence = SequenceState(Request(trace.token_ids[: anchor + 2].tolist()), 0, 64)
        tokens = drafter.propose(DraftContext([sequence], taps), Strategy("eagle3", 2)).tokens[0]
        drafter.release(0)
        assert tokens[0] == eagle.vocabulary[step0[anchor].argmax()]
        if tokens[0] == trace.token_ids[anchor + 2]:
            right += 1
            assert tokens[1] == eagle.vocabulary[step1[anchor].argmax()]
    assert right <= anchors


def test_second_step_matches_inference_when_text_follows_the_draft():
    """Builds the text from the drafter's own proposals, so that step 1 of the unrolled model must give its second token."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=1)
    trace = rollouts[0].trace
    anchor = 9
    drafter = Eagle3Drafter(eagle, model.model.embed_tokens, slots=1, capacity=64, dtype=torch.float32)
    taps = torch.zeros(1, 64, 4, 64)
    taps[0, : len(trace.taps), :3] = trace.taps.view(-1, 3, 64)
    sequence = SequenceState(Request(trace.token_ids[: anchor + 2].tolist()), 0, 64)
    drafted = drafter.propose(DraftContext([sequence], taps), Strategy("eagle3", 3)).tokens[0]
    text = torch.cat([trace.token_ids[: anchor + 2], drafted])
    followed = DistillationTrace(text, 3, trace.taps[: len(text) - 1], trace.final[: len(text) - 1])
    seen = []
    original = type(eagle).logits
    type(eagle).logits = lambda self, hidden: seen.append(original(self, hidden)) or seen[-1]
    try:
        batch = make_batch([followed], model.lm_head, eagle.vocabulary, 1.0, unroll=3)
        batch.trained[:] = True
        with torch.no_grad():
            unrolled_loss(eagle, model.model.embed_tokens, batch, unroll=3, decay=1.0)
    finally:
        type(eagle).logits = original
    anchors = batch.taps.shape[1]
    made = [eagle.vocabulary[step.view(anchors, -1)[anchor].argmax()] for step in seen]
    assert torch.stack(made).tolist() == drafted.tolist()


def test_teacher_is_the_targets_distribution():
    model = tiny_llama(sharpness=4.0)
    _, rollouts = traces_of(model, count=3)
    vocabulary = torch.arange(0, 97, 3)
    traces = [r.trace for r in rollouts]
    batch = make_batch(traces, model.lm_head, vocabulary, 0.7, unroll=2)
    for row, trace in enumerate(traces):
        with torch.no_grad():
            p = torch.softmax(model(trace.token_ids[None]).logits[0] / 0.7, -1)
        inside = slice(trace.num_prompt - 1, len(trace.token_ids) - 1)
        torch.testing.assert_close(batch.teacher[row, inside], p[inside][:, vocabulary], rtol=1e-3, atol=1e-5)
        assert batch.trained[row].sum() == len(trace.token_ids) - trace.num_prompt


def test_soft_cross_entropy_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): −½ ln ¼ − ½ ln ¾ = 0.8370."""
    q = torch.tensor([[0.25, 0.75]])
    torch.testing.assert_close(soft_cross_entropy(q.log(), torch.tensor([[0.5, 0.5]])), torch.tensor([0.8370]), atol=1e-4, rtol=0)


def test_learning_raises_acceptance_length():
    """After passes over some rollouts, decoding the same requests accepts more: the learner and the engine's drafter agree."""
    model = tiny_llama(sharpness=40.0)
    engine, rollouts = traces_of(model, count=16, tokens=40, slots=8)
    config = eagle3_config(model.config, 97, engine.runner.tap_layers)
    drafter = initial_drafter(config, torch.arange(97), model, seed=0)
    learner = learner_for(drafter, model, lr=3e-3, unroll=3)
    buffer = TraceBuffer()
    buffer.begin_step()
    buffer.add(rollouts)
    before = learner.train(buffer, budget=512, passes=1, seed=0)
    after = learner.train(buffer, budget=512, passes=40, seed=1)
    last = learner.train(buffer, budget=512, passes=1, seed=2)
    assert last.loss < before.loss
    assert last.acceptance[0] > before.acceptance[0] + 0.2
    assert after.skipped == 0
    again = [r.request for r in rollouts]
    engine.use_strategy(Strategy("eagle3", 3))
    untrained = mean_acceptance_length(engine.generate(again))
    engine.drafters["eagle3"] = Eagle3Drafter(
        learner.model,
        engine.runner.view.module.get_input_embeddings(),
        slots=8,
        capacity=engine.capacity_for(200, 6),
        dtype=torch.float32,
    )
    assert mean_acceptance_length(engine.generate(again)) > untrained + 0.3


def test_a_nan_trace_is_skipped_and_leaves_the_weights():
    model = tiny_llama()
    _, rollouts = traces_of(model, count=2)
    rollouts[0].trace.taps[:] = float("nan")
    rollouts[1].trace.taps[:] = float("nan")
    eagle = tiny_eagle3(model)
    learner = learner_for(eagle, model, lr=1e-3, unroll=2)
    buffer = TraceBuffer()
    buffer.begin_step()
    buffer.add(rollouts)
    weights = eagle.fc.weight.detach().clone()
    report = learner.train(buffer, budget=512, passes=1, seed=0)
    assert (report.updates, report.skipped) == (0, 1)
    assert torch.equal(eagle.fc.weight, weights)


def test_buffer_keeps_one_step_back_and_the_longest():
    model = tiny_llama()
    _, rollouts = traces_of(model, count=6)
    buffer = TraceBuffer(max_tokens=50)
    buffer.begin_step()
    buffer.add(rollouts)
    kept = [len(t.token_ids) for batch in buffer.batches(1000, 0) for t in batch]
    assert kept == sorted((len(r.trace.token_ids) for r in rollouts), reverse=True)[: len(kept)]
    assert sum(kept) <= 50 and buffer.tokens == sum(kept)
    buffer.begin_step()
    assert buffer.tokens == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=6), st.integers(1, 41))
def test_vocabulary_is_the_most_frequent_tokens(texts, size):
    vocabulary = choose_vocabulary(texts, size, 41)
    assert len(vocabulary) == size
    assert (vocabulary.diff() > 0).all()
    best = coverage(texts, vocabulary)
    assert best >= coverage(texts, torch.arange(size)) - 1e-9
