"""Keys and values that are kept between calls: the same tokens, fewer of them read."""

from dataclasses import replace

import pytest
import torch

from paceline.rollout import FinishReason, Request, SamplingParams
from tests.engines import engine_for, tiny_llama, worst_gap

PARAMS = SamplingParams(temperature=0.9, max_tokens=9)
PROMPTS = [[5, 9, 2, 44, 17, *range(10, 10 + i)] for i in range(3)]
ANSWERS = [[7, 7, 30], [61, 3], [8, 15, 16, 23, 42]]


def first_turn(prompts=PROMPTS):
    return [Request(prompt, PARAMS, seed) for seed, prompt in enumerate(prompts)]


def next_turn(rollouts, answers=ANSWERS):
    """Each conversation goes on with an answer of the environment."""
    return [
        Request([*r.request.prompt_ids, *r.token_ids, *answer], PARAMS, 100 + i)
        for i, (r, answer) in enumerate(zip(rollouts, answers, strict=True))
    ]


def play(engine, turns=3):
    rollouts = engine.generate(first_turn())
    played = [rollouts]
    for _ in range(turns - 1):
        rollouts = engine.generate(next_turn(rollouts))
        played.append(rollouts)
    return played


@pytest.mark.parametrize("strategy", ["plain", "suffix:4", "eagle3:3x2/6"])
def test_a_turn_reads_what_is_new_and_draws_the_same(strategy):
    model = tiny_llama(sharpness=4.0)
    engines = [engine_for(model, collect_traces=True) for _ in range(2)]
    for engine in engines:
        engine.use_strategy(strategy)
    engines[1].kept.most_tokens = 500
    without, kept = (play(engine) for engine in engines)
    for turn, (a, b) in enumerate(zip(without, kept, strict=True)):
        assert [r.token_ids for r in a] == [r.token_ids for r in b]
        assert worst_gap(model, b, PARAMS.temperature) < 1e-4
        for mine, reference, answer in zip(b, a, ANSWERS, strict=True):
            assert reference.stats.prefilled == len(reference.request.prompt_ids)
            # what was drawn last was never read, and comes before the answer
            assert mine.stats.prefilled == (len(answer) + 1 if turn else len(mine.request.prompt_ids))
            torch.testing.assert_close(mine.trace.taps, reference.trace.taps, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine.trace.final, reference.trace.final, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_unasked():
    engine = engine_for(tiny_llama())
    play(engine, turns=2)
    assert engine.kept.tokens == 0


def test_other_weights_drop_everything():
    model = tiny_llama(sharpness=4.0)
    engine = engine_for(model)
    engine.kept.most_tokens = 500
    said = engine.generate(first_turn())
    assert engine.kept.tokens == sum(len(r.request.prompt_ids) + len(r.token_ids) - 1 for r in said)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine.refresh_weights()
    assert engine.kept.tokens == 0
    again = engine.generate(next_turn(said))
    assert [r.stats.prefilled for r in again] == [len(r.request.prompt_ids) for r in again]
    assert worst_gap(model, again, PARAMS.temperature) < 1e-4


def test_a_conversation_that_parts_reads_on_from_there():
    """Text that was tokenized anew, or that somebody edited."""
    model = tiny_llama(sharpness=4.0)
    engine = engine_for(model)
    engine.kept.most_tokens = 500
    said = engine.generate(first_turn())
    requests = next_turn(said)
    edited = list(requests[2].prompt_ids)
    edited[6] = (edited[6] + 1) % 97
    again = engine.generate([replace(requests[2], prompt_ids=edited)])
    assert again[0].stats.prefilled == len(edited) - 6
    assert worst_gap(model, again, PARAMS.temperature) < 1e-4
    shortened = engine.generate([replace(requests[1], prompt_ids=requests[1].prompt_ids[:4])])
    assert shortened[0].stats.prefilled == 1
    assert worst_gap(model, shortened, PARAMS.temperature) < 1e-4


def test_the_longest_unused_gives_way():
    engine = engine_for(tiny_llama(), slots=1)
    lengths = [len(p) + PARAMS.max_tokens - 1 for p in PROMPTS]
    engine.kept.most_tokens = lengths[0] + lengths[2] + 1
    said = [engine.generate([request])[0] for request in first_turn()[:2]]
    # what is kept of it takes more room now, and the second goes
    engine.generate([next_turn(said, ANSWERS[:2])[0]])
    assert engine.kept.tokens == lengths[0] + len(ANSWERS[0]) + 1 + PARAMS.max_tokens - 1
    again = engine.generate(next_turn(said, ANSWERS[:2]))
    assert again[1].stats.prefilled > len(again[1].request.prompt_ids) // 2
    engine.kept.most_tokens = 4
    engine.kept.clear()
    engine.generate(first_turn())
    assert engine.kept.tokens == 0  # none is so short


def test_memory_that_is_wanted_elsewhere_is_not_taken(monkeypatch):
    engine = engine_for(tiny_llama())
    engine.kept.most_tokens = 500
    engine.generate(first_turn())
    assert engine.kept.tokens > 0
    monkeypatch.setattr("paceline.rollout.model.kept_prefixes.available_bytes", lambda device: 0)
    engine.generate(first_turn([[3, 4, 5]]))
    assert engine.kept.tokens == 0


def test_paused_rollouts_go_on_from_what_is_kept():
    model = tiny_llama(sharpness=4.0)
    whole = engine_for(model, collect_traces=True).generate(first_turn())
    engine = engine_for(model, collect_traces=True)
    engine.kept.most_tokens = 500
    paused = engine.generate(first_turn(), segment=4)
    assert {r.finish_reason for r in paused} == {FinishReason.PAUSED}
    rest = engine.generate([replace(r.request, resume=r) for r in paused])
    assert [r.token_ids for r in rest] == [r.token_ids for r in whole]
    assert [r.stats.prefilled for r in rest] == [len(r.request.prompt_ids) + 1 for r in rest]
    for mine, reference in zip(rest, whole, strict=True):
        torch.testing.assert_close(mine.trace.final, reference.trace.final, rtol=1e-4, atol=1e-4)


def test_what_failed_is_not_kept():
    model = tiny_llama()
    engine = engine_for(model)
    engine.kept.most_tokens = 500
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    assert {r.finish_reason for r in engine.generate(first_turn())} == {FinishReason.FAILED}
    assert engine.kept.tokens == 0


def test_random_conversations_draw_the_same():
    """Few slots, a small limit, shared beginnings, and talks that lose their end."""
    model = tiny_llama(sharpness=4.0)
    generator = torch.Generator().manual_seed(0)
    plain, kept = engine_for(model, slots=3), engine_for(model, slots=3)
    kept.use_strategy("eagle3:3x2/6")
    kept.kept.most_tokens = 150
    begun = [[1, 2, 3, *torch.randint(0, 97, (4,), generator=generator).tolist()] for _ in range(3)]
    talks = [list(begun[i % 3]) for i in range(8)]
    for turn in range(6):
        requests = [
            Request(list(t), replace(PARAMS, max_tokens=3 + i % 5), 10 * turn + i)
            for i, t in enumerate(talks)
        ]
        reference, mine = plain.generate(requests), kept.generate(requests)
        assert [r.token_ids for r in reference] == [r.token_ids for r in mine]
        for talk, rollout in zip(talks, mine, strict=True):
            talk += [*rollout.token_ids, *torch.randint(0, 97, (2,), generator=generator).tolist()]
            if len(talk) > 60:
                del talk[int(torch.randint(1, len(talk), (1,), generator=generator)) :]
    assert sum(r.stats.prefilled for r in mine) < sum(r.stats.prefilled for r in reference)
