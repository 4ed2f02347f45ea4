"""A short campaign of odd requests and interleavings."""

import pytest

from tests.faults.requests import run


@pytest.mark.ci
def test_nothing_is_lost_and_nothing_raises():
    counts = run(300, seed=1)
    for seen in (
        "good, length",
        "good, paused",
        "odd, failed alone",
        "odd, served",
        "calls in between, refused",
        "abandoned",
    ):
        assert counts[seen] > 0, seen
    assert counts["drafters that failed"] > 0 and counts["callbacks that raised"] > 0
