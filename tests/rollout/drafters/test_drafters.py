"""What each drafter proposes, against brute force; what it keeps, and what it forgets."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.rollout import Request, RolloutEngine, SamplingParams, Strategy, mean_acceptance_length
from paceline.rollout.drafter_factory import DrafterParts, build_drafter
from paceline.rollout.drafters import (
    ClaspDrafter,
    CompositeDrafter,
    ConsensusDrafter,
    DraftContext,
    DraftModelDrafter,
    DraftRules,
    Eagle3Drafter,
    NgramDrafter,
    StandDrafter,
    SuffixDrafter,
    TokenRecyclingDrafter,
    VerifiedStep,
    eagle3,
)
from paceline.rollout.drafters.clasp import _Search
from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.eagle3_expander import ParallelExpander
from paceline.rollout.drafters.suffix_automaton import SuffixAutomaton
from paceline.rollout.native import load_kernels
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.stop_policy import EntropyThreshold, LearnedThreshold
from paceline.rollout.trees import DraftTree
from tests.engines import engine_for, full_engine, tiny_eagle3, tiny_llama


def begin(drafter, tokens, group="g", prompt=2):
    """A sample whose tokens the drafter has observed as they were committed."""
    s = SequenceState(Request(tokens[:prompt], group=group), 0, 100)
    drafter.observe(s, prompt)
    for token in tokens[prompt:]:
        s.append(token, -0.1, 0)
        drafter.observe(s, 1)
    return s


def draft(drafter, s, text="suffix:4"):
    tree = drafter.propose(DraftContext([s], None), Strategy.parse(text))
    return tree.tokens[0, : tree.lengths[0]].tolist()


# The suffix automaton


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_automaton_knows_every_substring_and_how_often_it_occurs(texts, random):
    """Texts grow in turns, as samples do; occurrences of every substring against counting."""
    automaton = SuffixAutomaton()
    last, grown = [0] * len(texts), [0] * len(texts)
    turns = [i for i, text in enumerate(texts) for _ in text]
    random.shuffle(turns)
    for i in turns:
        last[i] = automaton.extend(last[i], texts[i][grown[i]], 1.0)
        grown[i] += 1
    for text in texts:
        for a, b in itertools.combinations(range(len(text) + 1), 2):
            state = 0
            for token in text[a:b]:
                state = automaton.following[state][token]
            count = sum(
                other[i : i + b - a] == text[a:b] for other in texts for i in range(len(other) - (b - a) + 1)
            )
            assert automaton.weight[state] == count
    assert len(automaton) <= 2 * sum(map(len, texts)) + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_the_match_is_the_longest_suffix_that_occurred_before(text):
    drafter = SuffixDrafter()
    s = begin(drafter, text, prompt=1)
    expected = max(
        n
        for n in range(len(text))
        if any(text[i : i + n] == text[len(text) - n :] for i in range(len(text) - n)) or n == 0
    )
    assert drafter.matched(s) == expected


# Drafters that need no model


def test_suffix_continues_a_siblings_text():
    drafter = SuffixDrafter()
    begin(drafter, [1, 2, 3, 4, 5, 6, 7])
    assert draft(drafter, begin(drafter, [1, 2, 9, 3, 4])) == [5, 6, 7]
    assert draft(drafter, begin(drafter, [1, 2, 9, 3, 4], "other")) == []
    assert draft(drafter, begin(drafter, [1, 2, 9, 3, 4], None)) == []
    alone = SuffixDrafter()
    assert draft(alone, begin(alone, [1, 2, 3, 1, 2])) == [3, 1, 2, 3], "its own text counts"


def test_suffix_starts_with_what_siblings_said_after_the_prompt():
    drafter = SuffixDrafter()
    begin(drafter, [1, 2, 3, 4])
    assert draft(drafter, begin(drafter, [1, 2])) == [3, 4]


def test_longest_match_wins_then_the_most_frequent_and_recent():
    drafter = SuffixDrafter()
    for text in ([0, 0, 8, 5, 6, 1], [0, 0, 8, 5, 6, 1], [0, 0, 7, 4, 5, 6, 2]):
        begin(drafter, text)
    assert draft(drafter, begin(drafter, [0, 0, 3, 5, 6]), "suffix:1") == [1]
    assert draft(drafter, begin(drafter, [0, 0, 7, 4, 5, 6]), "suffix:1") == [2]
    assert draft(drafter, begin(drafter, [0, 0, 3, 3, 5, 6]), "suffix:1x2/2") == [1, 2], (
        "a tree takes both, likelier first"
    )
    fading = SuffixDrafter(decay=0.3)
    for text in ([0, 0, 8, 5, 1], [0, 0, 8, 5, 1], [0, 0, 8, 5, 2]):
        begin(fading, text)
    assert draft(fading, begin(fading, [0, 0, 9, 8, 5]), "suffix:1") == [2], (
        "the newest outweighs two older ones"
    )


def test_suffix_without_sharing_knows_its_own_text_only():
    drafter = SuffixDrafter(shared=False)
    begin(drafter, [1, 2, 3, 4, 5])
    assert draft(drafter, begin(drafter, [1, 2, 9, 3, 4])) == []


def test_suffix_memory_is_bounded_by_dropping_the_oldest_prompt():
    drafter = SuffixDrafter(max_states=60)
    for group in range(10):
        drafter.forget(begin(drafter, [group * 20 + i for i in range(15)], group))
    assert drafter._states <= 60
    assert draft(drafter, begin(drafter, [180, 181], 9)) == [182, 183, 184, 185]
    assert draft(drafter, begin(drafter, [0, 1], 0)) == []
    alone = SuffixDrafter()
    alone.forget(begin(alone, [1, 2, 3], None))
    assert alone._states == 0 and not alone._groups


def test_ngram_copies_after_the_most_recent_occurrence():
    drafter = NgramDrafter()
    assert draft(drafter, begin(drafter, [5, 6, 1, 2, 5, 6, 3, 4, 5, 6])) == [3, 4, 5, 6]
    drafter = NgramDrafter()
    s = begin(drafter, [5, 6, 7])
    assert draft(drafter, s) == []
    drafter.forget(s)
    assert not drafter._seen


def test_consensus_follows_the_other_samples_votes():
    drafter = ConsensusDrafter()
    samples = [begin(drafter, [1, 2, *text]) for text in ([7, 8, 3], [7, 8, 3], [7, 9, 4])]
    s = begin(drafter, [1, 2, 5, 7])
    assert draft(drafter, s, "consensus:2") == [8, 3]
    assert draft(drafter, s, "consensus:2x2/4") == [8, 3, 9, 4]
    assert draft(drafter, begin(drafter, [1, 2, 5, 7], "other")) == []
    for sample in (*samples, s):
        drafter.forget(sample)
    assert "g" not in drafter._index, "the index goes with the last live sample"


def logits_of(*rows, vocab=12):
    """A row of logits whose largest are the given tokens, in that order."""
    out = torch.zeros(len(rows), vocab)
    for i, row in enumerate(rows):
        for rank, token in enumerate(row):
            out[i, token] = 10.0 - rank
    return out


def test_recycling_drafts_the_candidates_that_were_seen():
    drafter = TokenRecyclingDrafter(12)
    s = begin(drafter, [1, 2])
    step = VerifiedStep(
        [s],
        Strategy(),
        DraftTree(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1).long()),
        logits_of([3, 4]),
        [[]],
    )
    drafter.verified(step)
    assert draft(drafter, s, "recycling:1x2/2") == [3, 4]
    tried = DraftTree(torch.tensor([[3]]), torch.tensor([1]))
    drafter.verified(VerifiedStep([s], Strategy(), tried, logits_of([3, 4], [5, 6]), [[]]))
    assert draft(drafter, s, "recycling:2") == [3, 5], "rejected nodes' candidates are kept too"


def test_stand_draws_from_what_the_target_gave_after_the_longest_context():
    drafter = StandDrafter()
    s = begin(drafter, [1, 2, 3], prompt=3)
    nothing = DraftTree(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1).long())
    drafter.verified(VerifiedStep([s], Strategy(), nothing, logits_of([5, 6]), [[]]))
    tree = drafter.propose(DraftContext([s], None), Strategy("stand", 1, 2, 2))
    assert tree.lengths.tolist() == [2]
    expected = torch.softmax(logits_of([5, 6])[0].topk(8).values, -1)
    assert tree.probs[0, 0].sort(descending=True).values.tolist() == pytest.approx(
        expected.tolist(), abs=1e-6
    )
    first = (tree.vocabulary[0, 0] == tree.tokens[0, 0]).nonzero().item()
    assert tree.probs[0, 1, first] == 0 and tree.probs[0, 1].sum() == pytest.approx(1), (
        "the second is drawn without the first"
    )
    small = StandDrafter(max_contexts=2)
    small.verified(VerifiedStep([s], Strategy(), nothing, logits_of([5]), [[]]))
    assert len(small._table) == 2


# Drafters with models


def test_composite_takes_the_long_match_and_the_model_elsewhere():
    class Model:
        needs_taps, calls = False, 0

        def propose(self, context, strategy):
            Model.calls += 1
            return DraftTree(
                torch.full((len(context.sequences), 2), 99), torch.full((len(context.sequences),), 2)
            )

    suffix = SuffixDrafter()
    composite = CompositeDrafter(suffix, Model(), threshold=3)
    begin(suffix, [1, 2, 3, 4, 5, 6, 7])
    long, short = begin(suffix, [1, 2, 9, 3, 4, 5]), begin(suffix, [1, 2, 8, 3])
    tree = composite.propose(DraftContext([long, short], None), Strategy("composite", 3))
    assert tree.tokens[0, : tree.lengths[0]].tolist() == [6, 7]
    assert tree.tokens[1, : tree.lengths[1]].tolist() == [99, 99]
    composite.propose(DraftContext([long], None), Strategy("composite", 3))
    assert Model.calls == 1, "the model does not run where every sequence has a long match"


@pytest.mark.parametrize("strategy", ["eagle3:4", "eagle3:4x3/9"])
def test_a_window_that_holds_everything_changes_nothing_and_a_small_one_stays_bounded(strategy):
    model = tiny_llama(97, sharpness=6.0)
    requests = [Request([5, 6, 7, i], SamplingParams(max_tokens=180), seed=i) for i in range(4)]
    results = []
    for window in (None, 400, 16):
        engine = engine_for(model, slots=4, context=200, max_nodes=9)
        capacity = engine.capacity_for(200, 9)
        embed = engine.runner.view.module.get_input_embeddings()
        drafter = Eagle3Drafter(
            tiny_eagle3(model), embed, slots=4, capacity=capacity, dtype=torch.float32, window=window
        )
        engine.drafters["eagle3"] = drafter
        engine.use_strategy(strategy)
        results.append([(r.token_ids, r.stats.accepted) for r in engine.generate(requests)])
    assert results[0] == results[1]
    assert [tokens for tokens, _ in results[2]] == [tokens for tokens, _ in results[0]], (
        "the window is no matter of correctness"
    )
    assert drafter.cache.span <= 2 * 16 + 4 + 64, "the cache keeps its size however long the sequences"


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_a_window_keeps_the_first_tokens_of_the_text(steps):
    """The drafter's logits are those of its layer over four sinks and the window: where a long prompt was
    skipped, and where the window has moved several times.
    """
    model, window, grown = tiny_llama(97, sharpness=6.0), 16, 4
    eagle, embed = tiny_eagle3(model), model.model.embed_tokens
    text = torch.randint(0, 97, (90 + grown * steps,), generator=torch.Generator().manual_seed(0))
    taps = torch.randn(1, 400, 4, 64, generator=torch.Generator().manual_seed(1))
    drafter = Eagle3Drafter(eagle, embed, slots=1, capacity=300, dtype=torch.float32, window=window)
    found, read = [], drafter._network.read
    drafter._network.read = lambda reading: found.append(read(reading)) or found[-1]
    sequence = SequenceState(Request(text[:90].tolist()), 0, 400)
    context = DraftContext([sequence], lambda slots, places: taps[slots, places].flatten(1))
    for step in range(steps):
        drafter.propose(context, Strategy("eagle3", 1))
        shift, end = drafter._shift[0], len(sequence.tokens) - 2
        seen = torch.tensor([*range(4), *range(shift + 4, end + 1)])
        assert window <= end + 2 - (shift + 4) <= 2 * window + 2
        with torch.no_grad():
            features = eagle.fc(taps[0, seen, :3].flatten(1))[None]

            def attend(query, key, value):
                weights = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 16**-0.5).softmax(-1)
                return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)

            tokens = torch.tensor(sequence.tokens)[seen + 1]
            expected = eagle.logits(eagle.step(embed(tokens)[None], features, seen[None], attend))[0, -1]
        torch.testing.assert_close(found[-1][1][0, 0], expected, rtol=1e-4, atol=1e-4)
        for token in text[90 + grown * step : 90 + grown * (step + 1)].tolist():
            sequence.append(token, -0.1, 0)
    assert drafter.cache.span <= 2 * window + 4 + 64 + 64


@pytest.mark.skipif(load_kernels("cpu", torch.bfloat16) is None, reason="no C++ compiler")
@pytest.mark.parametrize("window", [None, 12])
def test_a_chain_in_one_call_is_the_chain_of_its_steps(window):
    model = tiny_llama(97, sharpness=6.0).bfloat16()
    eagle, embed = tiny_eagle3(model, draft_vocab_size=48), model.model.embed_tokens
    taps = torch.randn(3, 400, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    texts = torch.randint(0, 97, (3, 80), generator=torch.Generator().manual_seed(0)).tolist()
    drafts = []
    for in_one_call in (True, False):
        drafter = Eagle3Drafter(eagle, embed, slots=3, capacity=300, dtype=torch.bfloat16, window=window)
        assert drafter._network._use_int8
        if not in_one_call:
            drafter._network.chains = lambda *_: None
        sequences = [SequenceState(Request(text[: 5 + i]), 0, 400) for i, text in enumerate(texts)]
        context = DraftContext(sequences, lambda slots, places: taps[slots, places].flatten(1))
        found = []
        for step in range(25):
            tree = drafter.propose(context, Strategy("eagle3", 1 + step % 5))
            assert tree.lengths.tolist() == [1 + step % 5] * 3 and tree.parents is None
            found.append(tree.tokens.tolist())
            for i, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
                for token in text[len(sequence.tokens) :][: 1 + (step + i) % 3]:
                    sequence.append(token, -0.1, 0)
        drafts.append(found)
    assert drafts[0] == drafts[1]
    assert len({token for found in drafts[0] for row in found for token in row}) > 10


def test_a_draft_in_one_pass_leaves_no_trace_in_what_later_drafts_read():
    """Masks are written over: chains drafted after such a draft are those that no such draft came before."""
    model = tiny_llama(97, sharpness=6.0)
    requests = [Request([5, 6, 7, i], SamplingParams(max_tokens=40), seed=i) for i in range(5)]
    drafted = []
    for first in ("parallel:5", "plain"):
        engine = engine_for(model, slots=3)
        steps = itertools.cycle([first, first, "eagle3:3"])
        engine.speculation.selector = SimpleNamespace(
            choose=lambda active, context, steps=steps: Strategy.parse(next(steps)),
            record=lambda feedback: None,
        )
        drafts, propose = {}, engine.drafters["eagle3"].propose

        def note(context, strategy, propose=propose, drafts=drafts):
            draft = propose(context, strategy)
            for sequence, tokens in zip(context.sequences, draft.tokens.tolist(), strict=True):
                drafts[sequence.request.seed, len(sequence.tokens)] = tokens
            return draft

        engine.drafters["eagle3"].propose = note
        engine.generate(requests)
        drafted.append(drafts)
    alike = [drafts for key, one in drafted[0].items() if (drafts := (one, drafted[1].get(key)))[1]]
    assert len(alike) > 10
    for one, other in alike:  # a neighbour near its end asks for fewer tokens
        assert one[: len(other)] == other[: len(one)]


def test_a_draft_in_one_pass_is_one_pass():
    engine = engine_for(tiny_llama(97, sharpness=6.0), slots=4)
    network, passes = engine.drafters["eagle3"]._network, []
    network.step = None
    network.read = lambda reading, read=network.read: passes.append(reading.masks) or read(reading)
    for strategy, masks in (("parallel:1", 0), ("parallel:5", 4), ("parallel:3x2/5", 2)):
        passes.clear()
        engine.use_strategy(strategy)
        engine.generate([Request([1, 2, i], SamplingParams(max_tokens=9), seed=i) for i in range(4)])
        assert max(passes) == masks
        assert len(passes) <= len(engine.records)


def test_every_node_of_a_level_has_the_distribution_of_its_level():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    expander = ParallelExpander(
        logits, DraftRows.of((), torch.device("cpu"), padding=(2, 0)), torch.arange(7)
    )
    assert torch.equal(expander.root(), logits[:, 0])
    children = expander.expand(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[-1, -1], [-1, -1]]))
    assert torch.equal(children, logits[:, [1, 1]])
    # a grandchild, another child, and in the next level a great-grandchild
    mixed = expander.expand(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[1, -1], [-1, 0]]))
    assert torch.equal(mixed, torch.stack([logits[0, [2, 1]], logits[1, [1, 2]]]))
    last = expander.expand(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[2], [3]]))
    assert torch.equal(last, logits[:, [3]])


def test_the_parallel_drafter_needs_eagle3_with_a_mask():
    engine = engine_for(tiny_llama(), slots=2)
    engine.drafters.pop("eagle3")
    with pytest.raises(ValueError, match="add that drafter first"):
        build_drafter("parallel", engine, DrafterParts())
    engine.add_drafter(build_drafter("eagle3", engine, DrafterParts(eagle3=tiny_eagle3(tiny_llama()))))
    with pytest.raises(ValueError, match="trained to draft in one pass"):
        build_drafter("parallel", engine, DrafterParts())


def drafts_of(engine, requests, strategy):
    """What each request drafted and accepted, and the tokens that the drafter read for each draft."""
    read, network = [], engine.drafters["eagle3"]._network

    def counted(reading, original=network.read):
        read.append(sum(reading.counts))
        return original(reading)

    network.read = counted
    engine.use_strategy(strategy)
    rollouts = engine.generate(requests)
    return [(r.token_ids, r.stats.drafted, r.stats.accepted) for r in rollouts], read


@pytest.mark.parametrize("piece", [1024, 48])
def test_a_prompt_is_read_for_one_of_its_samples(monkeypatch, piece):
    """Also where it is read in pieces, and where a sample joins later; its drafts are those of it alone."""
    monkeypatch.setattr(eagle3, "_READ_TOKENS", piece)
    model = tiny_llama(sharpness=6.0)
    prompts = [list(range(1, 60)), list(range(30, 80))]
    requests = [
        Request(prompts[i % 2], SamplingParams(max_tokens=5 + 3 * (i % 4)), seed=i, group=i % 2)
        for i in range(10)
    ]
    together, read = drafts_of(engine_for(model, slots=6), requests, "eagle3:3")
    alone = [drafts_of(engine_for(model, slots=1), [request], "eagle3:3")[0][0] for request in requests]
    assert together == alone
    committed = sum(len(tokens) for tokens, *_ in together)
    assert sum(read) < sum(map(len, prompts)) + committed + 6 * len(read)


def test_an_engine_says_when_a_drafter_had_to_catch_up():
    engine = engine_for(tiny_llama(sharpness=6.0), slots=4)
    engine.add_drafter(CompositeDrafter(engine.drafters["suffix"], engine.drafters["eagle3"]))
    plan = ["plain"] * 6 + ["eagle3:2"] * 2 + ["plain"] + ["eagle3:2"] + ["plain"] * 20 + ["composite:2"] * 2
    steps = iter(plan)
    engine.speculation.selector = SimpleNamespace(
        choose=lambda active, context: Strategy.parse(next(steps, "plain")), record=lambda feedback: None
    )
    seen = []
    requests = [Request([5, 6, i], SamplingParams(max_tokens=60)) for i in range(4)]
    engine.generate(requests, on_step=lambda record: seen.append(record.feedback.caught_up))
    assert [i for i, caught_up in enumerate(seen) if caught_up] == [6, 30]


def test_a_draft_model_that_is_the_target_is_always_right_at_temperature_0():
    model = tiny_llama(97, sharpness=6.0)
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=100, max_nodes=6)
    engine.add_drafter(
        DraftModelDrafter(model, 97, slots=3, capacity=engine.capacity_for(100, 6), dtype=torch.float32)
    )
    engine.use_strategy("draft_model:4")
    rollouts = engine.generate(
        [Request([3, i], SamplingParams(temperature=0, max_tokens=51), seed=i) for i in range(7)]
    )
    assert mean_acceptance_length(rollouts) == 5.0
    with pytest.raises(ValueError, match="97 tokens, the policy 50"):
        DraftModelDrafter(model, 50, slots=1, capacity=10, dtype=torch.float32)


def test_clasp_that_leaves_out_useless_layers_is_always_right():
    """Layers whose outputs are zero: the search must find them, and drafts without them are the target's own
    tokens.
    """
    model = tiny_llama(97, sharpness=6.0, layers=6)
    with torch.no_grad():
        for useless in (1, 4):
            model.model.layers[useless].self_attn.o_proj.weight.zero_()
            model.model.layers[useless].mlp.down_proj.weight.zero_()
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=100, max_nodes=6)
    clasp = ClaspDrafter(engine.runner, 2)
    engine.add_drafter(clasp)
    engine.use_strategy("clasp:3")
    rollouts = engine.generate(
        [Request([3, i], SamplingParams(temperature=0, max_tokens=41), seed=i) for i in range(5)]
    )
    assert clasp.skipped_layers == (1, 4)
    assert mean_acceptance_length(rollouts) == 4.0
    with pytest.raises(ValueError, match="skips 6 of 6"):
        ClaspDrafter(engine.runner, 6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_the_search_is_the_dynamic_program(seed, skipped):
    """Against the recurrence written out over dictionaries."""
    g = torch.Generator().manual_seed(seed)
    layers = [torch.randn(8, 8, generator=g) * 0.5 for _ in range(5)]
    start = torch.randn(8, generator=g)
    search = _Search(skipped + 1, torch.device("cpu"))
    states = start.expand(skipped + 1, -1)
    for w in layers:
        states = search.step(states, states + torch.tanh(states @ w))
    best = {0: (start, ())}
    for i, w in enumerate(layers):
        goal = best[0][0] + torch.tanh(best[0][0] @ w)
        following = {}
        for j in range(min(i + 1, skipped) + 1):
            options = []
            if j in best:
                options.append((best[j][0] + torch.tanh(best[j][0] @ w), best[j][1]))
            if j - 1 in best and j > 0:
                options.append((best[j - 1][0], (*best[j - 1][1], i)))
            following[j] = max(options, key=lambda o: float(torch.cosine_similarity(o[0], goal, dim=0)))
        best = following
    assert search.skipped_layers() == best[skipped][1]


# Stop policies


def test_svip_stops_where_the_entropy_is_high():
    policy = EntropyThreshold(1.0)
    sure, unsure = torch.tensor([0.97, 0.01, 0.01, 0.01]).log(), torch.full((16,), 1 / 16).log()
    assert policy.should_continue(sure[None]).tolist() == [True]
    assert policy.should_continue(unsure[None]).tolist() == [False]  # √(ln 16) = 1.67


def test_specdec_learns_when_drafts_are_rejected():
    """Tokens the drafter is unsure of are rejected: after some verifications it stops after them and goes on
    after sure ones.
    """
    policy = LearnedThreshold(0.5)
    sure, unsure = torch.tensor([[0.95, 0.03, 0.02]]).log(), torch.tensor([[0.4, 0.3, 0.3]]).log()
    token = torch.zeros(1, dtype=torch.long)
    for _ in range(300):
        for log_q, accepted in ((sure, 1), (unsure, 0)):
            policy.begin(1)
            policy.drawn(log_q, token)
            policy.learn([1], [accepted])
    for log_q, expected in ((sure, True), (unsure, False)):
        policy.begin(1)
        policy.drawn(log_q, token)
        assert policy.should_continue(sure).tolist() == [expected]


@pytest.mark.parametrize(
    "rules", [DraftRules(stop="svip", stop_threshold=0.0), DraftRules(stop="svip", stop_threshold=9.0)]
)
def test_the_policy_decides_how_much_is_drafted(rules):
    model = tiny_llama(97, sharpness=6.0)
    engine = engine_for(model, rules=rules, max_nodes=6)
    engine.use_strategy("eagle3:5")
    rollouts = engine.generate([Request([5, 6, i], SamplingParams(max_tokens=30), seed=i) for i in range(5)])
    mean = np.mean([r.stats.drafted / r.stats.steps for r in rollouts])
    assert mean <= 1 if rules.stop_threshold == 0 else mean > 4


def test_rules_that_do_not_fit_are_refused():
    for options in (
        {"tree": "dynamic", "draw": "replacement"},
        {"tree": "dyspec", "draw": "replacement"},
        {"tree": "static"},
    ):
        with pytest.raises(ValueError, match="write"):
            DraftRules(**options)
    with pytest.raises(ValueError, match="write one of"):
        DraftRules(tree="bonsai")


def test_length_aware_budgets_draft_more_for_the_longest_and_change_no_token():
    class Lengths:
        def predict(self, request):
            return 60.0 if request.seed == 0 else 20.0

        def observe(self, request, tokens): ...

    model = tiny_llama(97, sharpness=6.0)
    requests = [Request([5, 6, i], SamplingParams(max_tokens=60), seed=i) for i in range(8)]
    plain = [r.token_ids for r in engine_for(model, slots=8).generate(requests)]
    engine = full_engine(model, slots=8, max_nodes=12, budgets="length_aware", lengths=Lengths())
    engine.use_strategy("eagle3:5x3/6")
    rollouts = engine.generate(requests)
    assert [r.token_ids for r in rollouts] == plain
    drafted = [r.stats.drafted / r.stats.steps for r in rollouts]
    assert drafted[0] > 1.5 * np.mean(drafted[1:])
