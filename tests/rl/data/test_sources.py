"""Files and tables of rows: read when they are wanted, found by their keys, and what is wrong with them said
in a line.
"""

import json

import datasets
import numpy as np
import pytest

from paceline.rl.config.task import TaskConfig
from paceline.rl.data.jsonl import JsonlFile
from paceline.rl.errors import UserError
from paceline.rl.tasks.task import load_task

VERL = [
    {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "extra_info": {"index": i, "split": "train"},
    }
    for i in range(5)
]


def said(tmp_path, content: bytes) -> str:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_task(TaskConfig(source="jsonl", path=str(path)), seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_lines_by_offset_are_the_lines_of_the_file(tmp_path, monkeypatch):
    """Also where lines are blank, end in CRLF, begin with a byte-order mark or lack the last newline, and
    across chunks.
    """
    monkeypatch.setattr("paceline.rl.data.jsonl._CHUNK_BYTES", 16)
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b"   ",
        b'  {"a": "\xc3\xa9"}',
        b'{"a": 3}\r',
        b"\t",
        b'{"a": [4, 5, 6, 7, 8, 9]}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    file = JsonlFile(path)
    assert [entry["a"] for entry in file.entries()] == [1, "é", 3, [4, 5, 6, 7, 8, 9]]
    assert [file.key(row) for row in range(len(file))] == [f"rows.jsonl/{line}" for line in (1, 4, 5, 7)]
    assert [file.row_of(f"rows.jsonl/{line}") for line in range(9)] == [
        None,
        0,
        None,
        None,
        1,
        2,
        None,
        3,
        None,
    ]
    assert file.row_of("other.jsonl/1") is None and file.row_of("rows.jsonl/x") is None


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    good = b'{"prompt": "1", "answer": "1"}\n'
    assert ":2: answer is null" in said(tmp_path, good + b'{"prompt": "1", "answer": null}\n')
    assert ":3: prompt is the number 5" in said(tmp_path, good + b"\n" + b'{"prompt": 5, "answer": "1"}\n')
    assert "write one object per line" in said(tmp_path, b'[\n{"prompt": "1", "answer": "1"}\n]\n')
    assert ":1: half of a surrogate pair" in said(tmp_path, b'{"prompt": "\\ud83d", "answer": "1"}\n')
    assert ":1: JSON is nested too deeply" in said(tmp_path, b'{"a":' + b"[" * 200_000 + b"\n")
    assert "no problems" in said(tmp_path, b"")


def tables(tmp_path):
    """The same rows in every form that tables have."""
    rows = datasets.Dataset.from_list(VERL)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    return {
        "rows": TaskConfig(source="parquet", path=str(tmp_path / "rows.parquet")),
        "saved": TaskConfig(source="huggingface", path=str(tmp_path / "saved")),
        "splits": TaskConfig(source="huggingface", path=str(tmp_path / "splits")),
        "files": TaskConfig(source="huggingface", path=str(tmp_path / "files")),
    }


def test_tables_in_every_form_give_the_same_problems(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, config in tables(tmp_path).items():
        task = load_task(config, seed=0)
        assert [(p.key, p.question, p.answer, p.dataset) for p in task.problems] == [
            (f"{name}/{i}", f"What is {i} + 1?", str(i + 1), "gsm8k") for i in range(5)
        ]
        assert task.find(f"{name}/3").entry == VERL[3] and task.find(f"{name}/3").messages == tuple(
            VERL[3]["prompt"]
        )
        for unknown in (f"{name}/5", "other/1", f"{name}/-1"):
            with pytest.raises(KeyError):
                task.find(unknown)
    test = TaskConfig(source="huggingface", path=str(tmp_path / "splits"), split="test")
    assert len(load_task(test, seed=0).problems) == 2


def test_tables_that_cannot_be_read_are_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def says(**config):
        with pytest.raises(UserError) as error:
            load_task(TaskConfig(**config), seed=0)
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "bad.parquet").write_text("PAR1 and no more")
    assert "not a parquet file" in says(source="parquet", path=str(tmp_path / "bad.parquet"))
    assert "no such file" in says(source="parquet", path=str(tmp_path / "none.parquet"))
    (tmp_path / "empty").mkdir()
    assert "holds no data set" in says(source="huggingface", path=str(tmp_path / "empty"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(VERL)}).save_to_disk(tmp_path / "splits")
    assert "task.split is 'dev', " in says(source="huggingface", path=str(tmp_path / "splits"), split="dev")
    datasets.Dataset.from_list([{"prompt": "q", "answer": None}]).save_to_disk(tmp_path / "null")
    assert "row 0: answer is null" in says(source="huggingface", path=str(tmp_path / "null"))
    images = datasets.Features(
        {"prompt": datasets.Value("string"), "image": datasets.Image(), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_list([{"prompt": "q", "image": None, "answer": "1"}], features=images).save_to_disk(
        tmp_path / "images"
    )
    assert "column image is of type Image, and prompts hold text only" in says(
        source="huggingface", path=str(tmp_path / "images")
    )


class GatedRepoError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError("403"), "gated; accept its terms on its hub page and set HF_TOKEN"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
            "is gated",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            "the hub has no such data set",
        ),
        (ConnectionError("Couldn't reach 'a/b'\non the Hub"), "the hub cannot be reached"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']"),
            "Please pick one among",
        ),
    ],
)
def test_what_keeps_a_data_set_of_the_hub_away_is_said(monkeypatch, error, says):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=says) as raised:
        load_task(TaskConfig(source="huggingface", path="a/b"), seed=0)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("task.path a/b: ")


def test_a_lookup_by_key_reads_its_own_row_alone(tmp_path):
    """A scoring process does not wait for a million golds: broken lines elsewhere are not even looked at."""
    path = tmp_path / "p.jsonl"
    rows = [json.dumps({"prompt": f"{i} + 1", "answer": f"\\frac{{{i}}}{{2}}"}) for i in range(4)]
    path.write_text("\n".join([*rows[:2], "{broken", *rows[2:]]))
    task = load_task(TaskConfig(source="jsonl", path=str(path)), seed=0, check=False)
    assert task.find("p.jsonl/4").score("Answer: 1") == 1.0
    with pytest.raises(UserError, match=r"p\.jsonl:3: not JSON"):
        task.find("p.jsonl/3")


def test_golds_are_parsed_when_a_completion_is_scored(tmp_path, monkeypatch):
    parsed = []

    class Reference:
        def __init__(self, gold):
            parsed.append(gold)

        def equals(self, completion):
            return True

    monkeypatch.setattr("paceline.rl.tasks.verifiable._Reference", Reference)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i)}) + "\n" for i in range(100)))
    batch = load_task(TaskConfig(source="jsonl", path=str(path)), seed=0).batch(0, 10)
    assert parsed == []
    assert batch[0].score("x") == batch[0].score("y") == 1.0 and parsed == [batch[0].answer]


def test_a_share_is_held_out_by_prompt_and_seed_alone(tmp_path):
    # a quarter comes twice
    rows = [{"prompt": f"What is {i % 300} + 1?", "answer": str(i % 300 + 1)} for i in range(400)]
    questions = []
    for number, order in enumerate((range(400), np.random.RandomState(0).permutation(400))):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
        config = TaskConfig(source="jsonl", path=str(path), heldout=0.2)
        task = load_task(config, seed=5)
        trained, out = ({p.question for p in t.problems} for t in (task, task.heldout()))
        assert not trained & out and len(trained | out) == 300 and 40 <= len(out) <= 80
        assert "are held out" in " ".join(task.notes)
        questions.append(out)
        assert {p.question for p in load_task(config, seed=6).heldout().problems} != out
    assert questions[0] == questions[1]
