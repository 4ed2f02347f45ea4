"""Training-time test computes what drafting computes."""

from dataclasses import replace
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.objective.training_time_test import unrolled_loss
from paceline.drafter_trainer.packing import pack
from paceline.drafter_trainer.spot_trainer import SpotTrainer
from paceline.drafter_trainer.storage.stored_trace import StoredTrace
from paceline.drafter_trainer.teacher import Teacher
from paceline.drafter_trainer.trace_buffer import Entry, Piece, TraceBuffer, pieces_of
from paceline.drafter_trainer.vocabulary import choose_vocabulary, coverage
from paceline.rollout import Request, RolloutEngine, SamplingParams, Strategy, mean_acceptance_length
from paceline.rollout.drafters import DraftContext, Eagle3Drafter
from paceline.rollout.drafters.eagle3_model import eagle3_config
from paceline.rollout.sequence import SequenceState
from tests.engines import engine_for, tiny_eagle3, tiny_llama


def reader_of(taps: torch.Tensor):
    """Reads taps [slots, places, taps + 1, hidden] as an engine's cache does."""
    return lambda slots, places: taps[slots, places].flatten(1)


def traces_of(model, count=6, tokens=20, **options):
    engine = engine_for(model, collect_traces=True, **options)
    requests = [Request([3, 1, 4, i], SamplingParams(max_tokens=tokens - i), seed=i) for i in range(count)]
    return engine, engine.generate(requests)


def learner_for(drafter, model, *, lr, unroll=3, context=512, positions=None) -> DrafterLearner:
    return DrafterLearner(
        drafter,
        model.model.embed_tokens,
        model.lm_head,
        Objective(unroll=unroll),
        lr=lr,
        temperature=1.0,
        autocast=partial(torch.autocast, "cpu", enabled=False),
        context=context,
        positions=positions,
    )


def buffer_of(rollouts, **options) -> TraceBuffer:
    buffer = TraceBuffer(**{"held_out_every": 0, **options})
    buffer.begin_step()
    buffer.add(rollouts)
    return buffer


def packed(traces, model, vocabulary, temperature=1.0, unroll=2, rejected=False):
    pieces = [Piece(Entry(StoredTrace(t)), 0, len(t.token_ids) - 1) for t in traces]
    return pack_pieces(pieces, model, vocabulary, temperature, unroll, rejected=rejected)


def pack_pieces(pieces, model, vocabulary, temperature=1.0, unroll=2, context=512, rejected=False):
    weights, cpu = [1.0] * len(pieces), torch.device("cpu")
    teacher = Teacher(model.lm_head, vocabulary, temperature)
    return pack(pieces, weights, teacher, unroll, context, cpu, rejected)


def test_unrolled_outputs_are_those_of_the_drafter(monkeypatch):
    """From each anchor, the greedy tokens of the unrolled model are what the inference drafter proposes, when
    the text continues as
    the drafter drafts: checked by drafting from every prefix and comparing step 0, and step 1 where the draft
        was right."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=1)
    trace = rollouts[0].trace
    outputs = []
    original = type(eagle).logits
    monkeypatch.setattr(
        type(eagle), "logits", lambda self, hidden: outputs.append(original(self, hidden)) or outputs[-1]
    )
    batch = packed([trace], model, eagle.vocabulary)
    batch.trained[:] = True
    with torch.no_grad():
        unrolled_loss(eagle, model.model.embed_tokens, batch, Objective(unroll=2))
    anchors = len(batch.anchor_index)
    step0, step1 = (o.view(anchors, -1) for o in outputs)
    monkeypatch.undo()
    drafter = Eagle3Drafter(eagle, model.model.embed_tokens, slots=1, capacity=64, dtype=torch.float32)
    taps = torch.zeros(1, 64, 4, 64)
    taps[0, :anchors, :3] = trace.taps.view(anchors, 3, 64)
    right = 0
    for anchor in range(anchors - 2):
        sequence = SequenceState(Request(trace.token_ids[: anchor + 2].tolist()), 0, 64)
        tokens = drafter.propose(DraftContext([sequence], reader_of(taps)), Strategy("eagle3", 2)).tokens[0]
        drafter.release(0)
        assert tokens[0] == eagle.vocabulary[step0[anchor].argmax()]
        if tokens[0] == trace.token_ids[anchor + 2]:
            right += 1
            assert tokens[1] == eagle.vocabulary[step1[anchor].argmax()]
    assert right <= anchors


def test_second_step_matches_inference_when_text_follows_the_draft():
    """Builds the text from the drafter's own proposals, so that step 1 of the unrolled model must give its
    second token.
    """
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=1)
    trace = rollouts[0].trace
    anchor = 9
    drafter = Eagle3Drafter(eagle, model.model.embed_tokens, slots=1, capacity=64, dtype=torch.float32)
    taps = torch.zeros(1, 64, 4, 64)
    taps[0, : len(trace.taps), :3] = trace.taps.view(-1, 3, 64)
    sequence = SequenceState(Request(trace.token_ids[: anchor + 2].tolist()), 0, 64)
    drafted = drafter.propose(DraftContext([sequence], reader_of(taps)), Strategy("eagle3", 3)).tokens[0]
    text = torch.cat([trace.token_ids[: anchor + 2], drafted])
    followed = replace(
        trace, token_ids=text, taps=trace.taps[: len(text) - 1], final=trace.final[: len(text) - 1]
    )
    seen = []
    original = type(eagle).logits
    type(eagle).logits = lambda self, hidden: seen.append(original(self, hidden)) or seen[-1]
    try:
        batch = packed([followed], model, eagle.vocabulary, unroll=3)
        batch.trained[:] = True
        with torch.no_grad():
            unrolled_loss(eagle, model.model.embed_tokens, batch, Objective(unroll=3))
    finally:
        type(eagle).logits = original
    anchors = len(batch.anchor_index)
    made = [eagle.vocabulary[step.view(anchors, -1)[anchor].argmax()] for step in seen]
    assert torch.stack(made).tolist() == drafted.tolist()


def test_a_random_distance_moves_all_but_the_first_tokens():
    """Rotary embeddings know differences of positions alone: without the first tokens nothing changes."""
    model = tiny_llama(sharpness=4.0)
    _, rollouts = traces_of(model, count=3)
    learner = learner_for(tiny_eagle3(model), model, lr=1e-3)
    pieces = [Piece(Entry(StoredTrace(r.trace)), 9, len(r.trace.token_ids) - 1) for r in rollouts]
    weights, offsets = [1.0] * len(pieces), [0, 50, 300]
    near, far = learner._pack(pieces, weights), learner._pack(pieces, weights, offsets)
    assert torch.equal(far.positions - near.positions, torch.tensor(offsets)[near.pieces])
    sinks, rest = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7, 8])
    expected = torch.cat([torch.cat([sinks, rest + offset]) for offset in offsets])
    assert torch.equal(far.context.positions, expected)
    assert torch.equal(far.context.tokens, near.context.tokens)

    def loss(batch) -> float:
        return float(unrolled_loss(learner.model, model.model.embed_tokens, batch, learner.objective).loss)

    assert abs(loss(far) - loss(near)) > 1e-5, "the first tokens are farther away"
    learner.context = 0
    near, far = learner._pack(pieces, weights), learner._pack(pieces, weights, offsets)
    assert abs(loss(far) - loss(near)) < 1e-5


def test_random_distances_follow_from_the_number_of_the_update():
    """So a resumed run trains as one that was not stopped; judging is at the real positions."""
    model = tiny_llama(sharpness=4.0)
    _, rollouts = traces_of(model, count=3)
    pieces = [Piece(Entry(StoredTrace(r.trace)), 9, len(r.trace.token_ids) - 1) for r in rollouts]
    ends, seen = [], []
    for seed, positions in ((0, 500), (7, 500), (0, None)):
        torch.manual_seed(seed)
        learner = learner_for(tiny_eagle3(model), model, lr=1e-3, positions=positions)
        learner._pack = lambda *given, pack=learner._pack: seen.append(given[2:]) or pack(*given)
        for _ in range(3):
            learner.update(pieces, [1.0] * len(pieces))
        learner.evaluate(pieces)
        ends.append(learner.model.fc.weight.detach().clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    drawn = [offset for given in seen[:3] for offset in given[0]]
    assert len(set(drawn)) > 5 and min(drawn) >= 0 and max(drawn) <= 500 - max(p.end for p in pieces)
    assert seen[3] == () and seen[-2] == (None,)


def test_teacher_is_the_targets_distribution():
    model = tiny_llama(sharpness=4.0)
    _, rollouts = traces_of(model, count=3)
    vocabulary = torch.arange(0, 97, 3)
    traces = [r.trace for r in rollouts]
    batch = packed(traces, model, vocabulary, temperature=0.7)
    start = 0
    for trace in traces:
        with torch.no_grad():
            p = torch.softmax(model(trace.token_ids[None]).logits[0] / 0.7, -1)
        inside = slice(trace.num_prompt - 1, len(trace.token_ids) - 1)
        block = slice(start + inside.start, start + inside.stop)
        torch.testing.assert_close(batch.teacher[block], p[inside][:, vocabulary], rtol=1e-3, atol=1e-5)
        following = start + len(trace.token_ids) + 2
        assert batch.trained[start:following].sum() == len(trace.token_ids) - trace.num_prompt
        start = following


def test_packing_changes_nothing_but_the_shape():
    """Pieces in one row give what each gives alone: no attention, and no draft, reaches across."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=3)
    traces = [r.trace for r in rollouts]
    embed = model.model.embed_tokens
    with torch.no_grad():
        together = unrolled_loss(eagle, embed, packed(traces, model, eagle.vocabulary), Objective(unroll=2))
        alone = [
            unrolled_loss(eagle, embed, packed([t], model, eagle.vocabulary), Objective(unroll=2))
            for t in traces
        ]
    # anchors whose first drafted token is known
    counts = [len(t.token_ids) - t.num_prompt - 1 for t in traces]
    mean = sum(a.acceptance[0] * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    assert abs(together.acceptance[0] - mean) < 1e-5


def test_a_long_trace_is_cut_at_its_own_positions():
    """A piece from the middle keeps positions and teachers; its drafts may run past its end."""
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=1, tokens=40)
    entry = Entry(StoredTrace(rollouts[0].trace))
    pieces = pieces_of(entry, 16)
    assert [(p.begin, p.end) for p in pieces] == [(3, 19), (19, 35), (35, 43)]
    whole = pack_pieces([Piece(entry, 0, 43)], model, eagle.vocabulary)
    middle = pack_pieces([pieces[1]], model, eagle.vocabulary)
    assert middle.positions.tolist() == list(range(19, 35))
    assert torch.equal(middle.tokens, whole.tokens[19:38])
    torch.testing.assert_close(middle.teacher, whole.teacher[19:38])
    assert middle.context.positions.tolist() == list(range(19))


def logits_by_anchor(pieces, model, eagle, monkeypatch, context=512) -> dict[tuple[int, int], torch.Tensor]:
    """The drafter's logits of each (draft position, position in the text) that counts."""
    batch, seen = pack_pieces(pieces, model, eagle.vocabulary, context=context), []
    with monkeypatch.context() as patch, torch.no_grad():
        original = type(eagle).logits
        patch.setattr(
            type(eagle), "logits", lambda self, hidden: seen.append(original(self, hidden)) or seen[-1]
        )
        unrolled_loss(eagle, model.model.embed_tokens, batch, Objective(unroll=2))
    counted = batch.trained[batch.anchor_index]
    places = {}
    for step, logits in enumerate(seen):
        counted = counted & batch.trained[batch.anchor_index + 1 + step]
        at = batch.positions[counted].tolist()
        places |= {(step, p): line for p, line in zip(at, logits, strict=True)}
    return places


def test_a_cut_trace_with_its_context_has_the_logits_of_the_whole_one(monkeypatch):
    model = tiny_llama(sharpness=4.0)
    eagle = tiny_eagle3(model)
    _, rollouts = traces_of(model, count=2, tokens=40)
    entries = [Entry(StoredTrace(r.trace)) for r in rollouts]
    wholes = [Piece(e, 0, e.trace.length - 1) for e in entries[:1]]
    whole = logits_by_anchor(wholes, model, eagle, monkeypatch)
    cut = logits_by_anchor(pieces_of(entries[0], 7), model, eagle, monkeypatch)
    assert cut.keys() == whole.keys() and len(cut) == 39 + 38
    for place, logits in cut.items():
        torch.testing.assert_close(logits, whole[place], rtol=1e-4, atol=1e-5)
    without = logits_by_anchor(pieces_of(entries[0], 7), model, eagle, monkeypatch, context=0)
    assert (without[0, 20] - whole[0, 20]).abs().max() > 1e-2


def test_a_bounded_context_keeps_the_first_tokens_of_the_text():
    model = tiny_llama()
    _, rollouts = traces_of(model, count=1, tokens=40)
    entry = Entry(StoredTrace(rollouts[0].trace))
    late, early = Piece(entry, 30, 34), Piece(entry, 6, 8)
    context = pack_pieces([late, early], model, torch.arange(97), context=5).context
    assert context.positions.tolist() == [0, 1, 2, 3, 25, 26, 27, 28, 29, 0, 1, 2, 3, 4, 5]
    assert context.counts == (9, 6)
    trace = rollouts[0].trace
    assert torch.equal(context.tokens, trace.token_ids[context.positions + 1])
    assert torch.equal(context.taps, trace.taps[context.positions].float())
    assert not len(pack_pieces([late], model, torch.arange(97), context=0).context.tokens)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_the_largest_tensor_of_an_update_is_linear_in_tokens():
    """Attention's scores included, which is why pieces have at most 512 anchors."""
    model = tiny_llama()
    eagle = tiny_eagle3(model)
    _, (rollout, *_) = traces_of(model, count=1)
    generator, largest = torch.Generator().manual_seed(0), []
    learner = learner_for(eagle, model, lr=1e-3, context=64)
    for length in (1024, 4096):
        trace = replace(
            rollout.trace,
            token_ids=torch.randint(97, (length + 1,), generator=generator),
            taps=torch.randn(length, rollout.trace.taps.shape[1], generator=generator),
            final=torch.randn(length, rollout.trace.final.shape[1], generator=generator),
        )
        pieces = pieces_of(Entry(StoredTrace(trace)), length)
        with LargestTensor() as seen:
            learner.update(pieces, [1.0] * len(pieces))
        largest.append(seen.numel)
    assert largest[1] <= 4 * largest[0]


def test_learning_raises_acceptance_length():
    """After passes over some rollouts, decoding the same requests accepts more: the learner and the engine's
    drafter agree.
    """
    model = tiny_llama(sharpness=40.0)
    engine, rollouts = traces_of(model, count=16, tokens=40, slots=8)
    config = eagle3_config(model.config, 97, engine.runner.tap_layers)
    drafter = initial_drafter(config, torch.arange(97), model, seed=0)
    learner = learner_for(drafter, model, lr=3e-3)
    spot = SpotTrainer([learner], buffer_of(rollouts, passes=40), budget=512)
    everything = [piece for r in rollouts for piece in pieces_of(Entry(StoredTrace(r.trace)), 512)]
    before = learner.evaluate(everything)
    report = spot.run(lambda: False)
    after = learner.evaluate(everything)
    assert report.skipped == 0 and report.updates >= 40
    assert after.loss < before.loss
    assert after.acceptance[0] > before.acceptance[0] + 0.2
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
    trained = mean_acceptance_length(engine.generate(again))
    assert trained > untrained + 0.3
    assert abs(trained - after.likeliest_length) < 0.35  # what training predicts is what decoding gets


def test_a_nan_trace_is_skipped_and_leaves_the_weights():
    model = tiny_llama()
    _, rollouts = traces_of(model, count=2)
    rollouts[0].trace.taps[:] = float("nan")
    rollouts[1].trace.taps[:] = float("nan")
    eagle = tiny_eagle3(model)
    learner = learner_for(eagle, model, lr=1e-3)
    weights = eagle.fc.weight.detach().clone()
    report = SpotTrainer([learner], buffer_of(rollouts), budget=512).run(lambda: False)
    assert (report.updates, report.skipped) == (0, 1)
    assert torch.equal(eagle.fc.weight, weights)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=6), st.integers(1, 41))
def test_vocabulary_is_the_most_frequent_tokens(texts, size):
    vocabulary = choose_vocabulary(texts, size, 41)
    assert len(vocabulary) == size
    assert (vocabulary.diff() > 0).all()
    best = coverage(texts, vocabulary)
    assert best >= coverage(texts, torch.arange(size)) - 1e-9


def test_traces_of_another_precision_than_the_policys_train_the_drafter():
    """As bfloat16 rollouts of a policy that is trained in float32 without autocast."""
    model = tiny_llama(sharpness=4.0)
    engine = RolloutEngine(
        model, dtype=torch.bfloat16, max_slots=4, max_context=64, tap_layers=(1, 2, 3), collect_traces=True
    )
    rollouts = engine.generate(
        [Request([3, 1, 4, i], SamplingParams(max_tokens=12), seed=i) for i in range(4)]
    )
    assert rollouts[0].trace is not None and rollouts[0].trace.final.dtype == torch.bfloat16
    drafter = tiny_eagle3(model)
    before = drafter.lm_head.weight.clone()
    learner = learner_for(drafter, model, lr=1e-3)
    pieces = [Piece(Entry(StoredTrace(r.trace)), 0, len(r.trace.token_ids) - 1) for r in rollouts]
    assert learner.update(pieces, [1.0] * 4) is not None
    assert not torch.equal(drafter.lm_head.weight, before)
    assert all(0 <= share <= 1 for share in learner.evaluate(pieces).acceptance)
