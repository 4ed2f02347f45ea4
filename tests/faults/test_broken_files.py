"""A few of the campaign's broken files; the whole of it is a command."""

import pytest

from tests.faults import broken_files


@pytest.mark.ci
def test_broken_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr("paceline.rl.run.fit_process", lambda local_world_size: None)
    bad = []
    counts = broken_files.run(
        8, 0, lambda broken: bad.append(broken) if broken.outcome in ("silent", "traceback") else None
    )
    assert not bad
    assert counts["refused in a line"] + counts["went on and said so"] >= 4
