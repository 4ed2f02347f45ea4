"""A few of the campaign's kills; the whole of it is a command."""

import pytest

from tests.faults import kills


@pytest.mark.slow
def test_kills_lose_nothing():
    counts = kills.run(4, 0)
    assert counts["lost"] == counts["left behind"] == counts["hung"] == 0
