"""Parquet files and Hugging Face data sets, through the ``datasets`` library: rows stay on disk until they
are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError, one_line

_REASON = 300  # characters of a library's own message
_NO_TEXT = ("Image", "Audio", "Video", "Pdf")


class Table:
    """The rows of a ``datasets.Dataset``.

    Args:
        rows: The data set, memory-mapped.
        place: Where it came from, for messages.
        name: Short, for keys.

    Raises:
        UserError: when it is empty, or holds what is not text.
    """

    def __init__(self, rows: Any, place: str, name: str) -> None:
        self.name, self._place, self._rows = name, place, rows
        if not len(rows):
            raise UserError(f"{place}: no rows")
        for column, feature in rows.features.items():
            kind = type(getattr(feature, "feature", feature)).__name__
            if kind in _NO_TEXT:
                raise UserError(
                    f"{place}: column {column} is of type {kind}, and prompts hold text only: write a copy "
                    "without it"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, row: int) -> str:
        """Where a row stands, for messages; the first row is row 0."""
        return f"{self._place}: row {row}"

    def key(self, row: int) -> str:
        """A row's name across epochs."""
        return f"{self.name}/{row}"

    def row_of(self, key: str) -> int | None:
        """The row of a `key`; None where there is none."""
        name, _, number = key.rpartition("/")
        return int(number) if name == self.name and number.isdigit() and int(number) < len(self) else None

    def entry(self, row: int) -> Any:
        """A row's columns by name."""
        return self._rows[row]

    def entries(self) -> Iterator[Any]:
        """All rows, in order."""
        for batch in self._rows.iter(batch_size=1000):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def parquet_table(path: Path) -> Table:
    """A parquet file.

    Raises:
        UserError: when there is none, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"task.path {path}: there is no such file")
    datasets = _library()
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path.resolve()), split="train")
    except Exception as error:  # whatever pyarrow finds wrong with it
        raise UserError(
            f"task.path {path}: not a parquet file that can be read "
            f"({one_line(error.__cause__ or error, _REASON)})"
        ) from None
    return Table(rows, str(path), path.stem)


def huggingface_table(config: TaskConfig) -> Table:
    """A directory that ``save_to_disk`` wrote or that holds data files, or a data set of the hub's by its id.

    Raises:
        UserError: when it cannot be loaded; the message says whether it is missing or gated, or the hub
            cannot be reached.
    """
    datasets = _library()
    assert config.path is not None
    path, place = Path(config.path), f"{config.path} ({config.split})"
    try:
        if (path / "state.json").is_file():
            rows = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if config.split not in splits:
                raise UserError(f"task.split is {config.split!r}: {config.path} has {', '.join(splits)}")
            rows = splits[config.split]
        else:
            rows = datasets.load_dataset(config.path, config.subset, split=config.split)
    except UserError:
        raise
    except Exception as error:  # of the hub's, of files, of names: said in a line each
        raise UserError(f"task.path {config.path}: {_why(error, path.is_dir())}") from None
    if not hasattr(rows, "features"):
        raise UserError(f"task.split is {config.split!r}: name one split")
    return Table(rows, place, path.name)


def _library() -> Any:
    """``datasets``, silent: it takes a second to import, and what goes wrong is said in a line of ours."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _why(error: BaseException, local: bool) -> str:
    """What kept a data set from being loaded, and what to do."""
    chain, seen = [], error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    names = " ".join(type(e).__name__ for e in chain)
    texts = " ".join(str(e).lower() for e in chain)
    if local:
        return f"the directory holds no data set that can be read ({one_line(error, _REASON)})"
    if "GatedRepo" in names or "gated" in texts:
        return "the data set is gated: accept its terms on its page at the hub and set HF_TOKEN"
    if (
        "Offline" in names
        or "Connection" in names
        or "Timeout" in names
        or "offline" in texts
        or "couldn't reach" in texts
    ):
        return (
            f"the hub cannot be reached ({one_line(error, _REASON)}): name a directory that datasets' "
            f"save_to_disk wrote"
        )
    if "NotFound" in names:
        return (
            "there is no such directory, and the hub has no such data set, or it is private: then set "
            "HF_TOKEN"
        )
    # an unknown split or subset: the library's own words list those that there are
    return one_line(error, _REASON)
