"""Slots stay packed, whatever ends when."""

from hypothesis import given
from hypothesis import strategies as st

from paceline.rollout import FinishReason, Request
from paceline.rollout.engine.scheduler import Scheduler
from paceline.rollout.sequence import SequenceState


@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=25))
def test_slots_have_no_gaps_and_nobody_is_lost(slots, lifetimes):
    scheduler = Scheduler(slots)
    sequences = [SequenceState(Request([1]), i, 10) for i in range(len(lifetimes))]
    scheduler.submit(sequences)
    where: list[SequenceState | None] = [None] * slots
    left = dict(enumerate(lifetimes))
    ended = []
    while scheduler.has_work:
        for slot, sequence in scheduler.admit(lambda lengths: len(lengths) <= slots):
            assert where[slot] is None
            where[slot] = sequence
        for sequence in scheduler.active:
            left[sequence.index] -= 1
            if left[sequence.index] == 0:
                sequence.finish = FinishReason.STOP
                ended.append(sequence.index)
        for slot, source in scheduler.retire(lambda s: s.finish is not None):
            where[slot] = where[source] if source != slot else None
            if source != slot:
                where[source] = None
        assert [s for s in where if s is not None] == scheduler.active == where[: len(scheduler.active)]
        assert all(s.finish is None for s in scheduler.active)
    assert sorted(ended) == list(range(len(lifetimes)))
