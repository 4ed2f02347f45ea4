"""What is kept, what is mixed in, and what goes to disk."""

from collections import Counter

import torch

from paceline.drafter_trainer.trace_buffer import TraceBuffer
from paceline.rollout import DistillationTrace, FinishReason, Request, Rollout
from paceline.rollout.api import RolloutStats


def rollout(length: int, prompt: int = 3, group: int | None = None) -> Rollout:
    taps, final = torch.full((length - 1, 6), float(length)), torch.zeros(length - 1, 2)
    trace = DistillationTrace(
        torch.arange(length), prompt, taps, final, torch.zeros(0, 2, dtype=torch.long), final[:0]
    )
    completion = list(range(prompt, length))
    return Rollout(
        Request([1] * prompt, group=group),
        completion,
        [0.0] * len(completion),
        FinishReason.STOP,
        RolloutStats(),
        trace=trace,
    )


def through(buffer: TraceBuffer, budget: int) -> list[list]:
    batches = []
    while (batch := buffer.next_batch(budget)) is not None:
        batches.append(batch)
    return batches


def test_what_is_put_back_comes_next_but_not_in_another_step():
    buffer = TraceBuffer(held_out_every=0)
    buffer.begin_step()
    buffer.add([rollout(n) for n in (9, 12, 15)])
    first = buffer.next_batch(10)
    buffer.put_back(first)
    assert buffer.next_batch(10) is first
    buffer.put_back(first)
    buffer.begin_step()
    assert buffer.next_batch(10) is None


def test_a_pass_sees_every_anchor_of_a_completion_once_and_goes_on_where_it_stopped():
    buffer = TraceBuffer(held_out_every=0, passes=2)
    buffer.begin_step()
    buffer.add([rollout(n) for n in (10, 20, 30, 90)])
    first = buffer.next_batch(32)  # a stop may come here: the next call goes on
    batches = [first, *through(buffer, 32)]
    seen = Counter(
        (p.entry.trace.length, a) for batch in batches for p in batch for a in range(p.begin, p.end)
    )
    assert set(seen.values()) == {2}
    assert len(seen) == 7 + 17 + 27 + 87  # from the last of three prompt tokens to the last but one
    assert min(anchor for _, anchor in seen) == 2
    assert all(sum(p.end - p.begin for p in batch) <= 32 for batch in batches)


def test_the_long_ones_of_the_step_before_are_mixed_in_and_count_less():
    buffer = TraceBuffer(held_out_every=0, previous_steps=2, previous_share=0.5, age_decay=0.5)
    buffer.begin_step()
    buffer.add([rollout(n) for n in (10, 12, 40, 50)])
    buffer.begin_step()
    buffer.add([rollout(20) for _ in range(8)])
    batches = through(buffer, 40)
    old = [p for batch in batches for p in batch if p.entry.age == 1]
    assert {p.entry.trace.length for p in old} == {40, 50}
    assert {buffer.weight(p.entry) for p in old} == {0.5}
    tokens = sum(p.end - p.begin for p in old) / sum(p.end - p.begin for batch in batches for p in batch)
    assert 0.25 < tokens < 0.7
    buffer.begin_step()
    assert {(e.age, e.trace.length) for e in buffer.previous} == {(1, 20), (2, 40), (2, 50)}
    buffer.begin_step()
    assert {e.age for e in buffer.previous} == {2}


def test_whole_groups_are_kept_back_for_three_steps_and_never_trained_on():
    buffer = TraceBuffer(held_out_every=2, previous_share=0.5)
    trained, judging = set(), []
    for step in range(5):
        buffer.begin_step()
        buffer.add([rollout(10 + g + 8 * step, group=10 * step + g) for g in range(4) for _ in range(3)])
        judging.append({p.entry.group for (batch,) in [buffer.held_out_batches(10_000, 1)] for p in batch})
        trained |= {p.entry.group for batch in through(buffer, 64) for p in batch}
    assert judging[0] == {1, 3}
    assert judging[-1] == {21, 23, 31, 33, 41, 43}
    assert not trained & {g for groups in judging for g in groups}
    assert {10 * step + g for step in range(5) for g in (0, 2)} == trained
    few, more = buffer.held_out_batches(170, 2)  # a sequence of each group in turn
    assert len({p.entry.group for p in few}) == len(few) >= 4
    assert more and not {id(p.entry) for p in few} & {id(p.entry) for p in more}


def test_memory_is_bounded_and_the_rest_goes_to_disk(tmp_path):
    buffer = TraceBuffer(memory_tokens=100, disk_tokens=60, spill=tmp_path / "traces", held_out_every=0)
    buffer.begin_step()
    buffer.add([rollout(n) for n in (60, 50, 40, 30, 9)])
    on_disk = {e.trace.length for e in buffer.current if e.trace.on_disk}
    in_memory = {e.trace.length for e in buffer.current if not e.trace.on_disk}
    assert sum(in_memory) <= 100 and sum(on_disk) <= 60 and on_disk
    for entry in buffer.current:
        trace = entry.trace.get()
        assert len(trace.token_ids) == entry.trace.length and trace.taps[0, 0] == entry.trace.length
    assert len(list((tmp_path / "traces").iterdir())) == len(on_disk)
    for _ in range(6):
        buffer.begin_step()
    assert not list((tmp_path / "traces").iterdir())


def test_a_disk_that_cannot_be_written_leaves_traces_out_and_goes_on(tmp_path):
    (tmp_path / "traces").write_text("a file where the directory should be")
    buffer = TraceBuffer(memory_tokens=30, disk_tokens=1000, spill=tmp_path / "traces", held_out_every=0)
    buffer.begin_step()
    buffer.add([rollout(n) for n in (25, 24, 23)])
    assert [e.trace.length for e in buffer.current] == [25]
