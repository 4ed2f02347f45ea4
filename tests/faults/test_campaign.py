"""The page about faults shows what the campaign found."""

import json

import pytest

from tests.faults import campaign
from tests.faults.campaign import PAGE, PARTS, RESULTS, main, table


def test_the_page_has_the_table_of_the_results():
    results = json.loads(RESULTS.read_text())
    assert list(results) == list(PARTS)
    assert table(results) in PAGE.read_text()


def test_a_part_that_finds_something_fails_the_command(tmp_path, monkeypatch, capsys):
    page = tmp_path / "faults.md"
    page.write_text(f"before\n{campaign.BEGIN}\nold\n{campaign.END}\nafter\n")
    monkeypatch.setattr(campaign, "PAGE", page)
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "faults.json")

    def silent():
        raise AssertionError("a file\nwas read without a word")

    monkeypatch.setattr(campaign, "PARTS", {"files": silent, "kills": lambda: {"rank": 3}})
    assert main([]) == 1
    assert "| files |  | AssertionError: a file was read without a word |" in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert "old" not in page.read_text()
    assert "| kills | rank 3 | nothing |" in capsys.readouterr().out
    assert main(["nothing"]) == 2


@pytest.mark.parametrize("name", PARTS)
def test_parts_say_what_they_do(name):
    assert PARTS[name].__doc__
