"""One counter says what the ranks of a machine do, and whether anything has changed since."""

from hypothesis import given
from hypothesis import strategies as st

from paceline.drafter_trainer.slowdown.neighbours import Neighbours, packed_change

FIELDS = ("busy", "training", "paused")


@given(st.lists(st.sampled_from(FIELDS), max_size=40), st.data())
def test_a_counter_holds_what_ranks_have_begun_and_not_ended(begun, data):
    """Each of them is ended again or not, in any order after it began."""
    counter, running = 0, dict.fromkeys(FIELDS, 0)
    changes = 0
    for name in begun:
        counter, changes = counter + packed_change(**{name: 1}), changes + 1
        running[name] += 1
        if data.draw(st.booleans()):
            ended = data.draw(st.sampled_from([name for name in FIELDS if running[name]]))
            counter, changes = counter + packed_change(**{ended: -1}), changes + 1
            running[ended] -= 1
    assert Neighbours.unpack(counter) == Neighbours(**running, changes=changes)


def test_a_change_that_was_taken_back_is_still_seen():
    counter = packed_change(training=1)
    there_and_back = counter + packed_change(paused=1) + packed_change(paused=-1)
    assert Neighbours.unpack(counter)[:3] == Neighbours.unpack(there_and_back)[:3]
    assert Neighbours.unpack(counter) != Neighbours.unpack(there_and_back)


def test_the_counter_of_a_large_machine_and_a_long_step_fits_a_store():
    counter = sum(4095 * packed_change(**{name: 1}) for name in FIELDS) + 10**8 * packed_change()
    assert counter < 2**63 and Neighbours.unpack(counter)[:3] == (4095, 4095, 4095)
