"""Reads parquet files and Hugging Face data sets with the ``datasets`` library, which keeps rows on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError, one_line

_MAX_REASON = 300  # characters of a library's own message that are repeated in an error
_UNSUPPORTED_FEATURES = ("Image", "Audio", "Video", "Pdf")


class Table:
    """The rows of a ``datasets.Dataset``.

    Args:
        rows: Memory-mapped data set.
        origin: Where the data set comes from, for messages.
        name: Short name, for keys.

    Attributes:
        name: Short name, for keys.

    Raises:
        UserError: If the data set is empty, or holds anything but text.
    """

    def __init__(self, rows: Any, origin: str, name: str) -> None:
        self.name, self._origin, self._rows = name, origin, rows
        if not len(rows):
            raise UserError(f"task.path {origin}: the data set has no rows; name another one")
        for column, feature in rows.features.items():
            kind = type(getattr(feature, "feature", feature)).__name__
            if kind in _UNSUPPORTED_FEATURES:
                raise UserError(
                    f"task.path {origin}: column {column} is of type {kind}, and prompts hold text only; "
                    "write a copy without it"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def location(self, row: int) -> str:
        """Returns origin and number of a row, for messages; the first row is row 0."""
        return f"{self._origin}: row {row}"

    def key(self, row: int) -> str:
        """Returns the name of a row across epochs."""
        return f"{self.name}/{row}"

    def row_of(self, key: str) -> int | None:
        """Returns the row with this `key`, or None if there is none."""
        name, _, number = key.rpartition("/")
        return int(number) if name == self.name and number.isdigit() and int(number) < len(self) else None

    def entry(self, row: int) -> Any:
        """Returns a row's columns by name."""
        return self._rows[row]

    def entries(self) -> Iterator[Any]:
        """Yields all rows in order."""
        for batch in self._rows.iter(batch_size=1000):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def parquet_table(path: Path) -> Table:
    """Opens a parquet file.

    Raises:
        UserError: If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"task.path is {path}: no such file; write the path of a parquet file")
    datasets = _import_datasets()
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path.resolve()), split="train")
    except Exception as error:  # pyarrow and datasets raise many types for a broken file
        reason = one_line(error.__cause__ or error, _MAX_REASON)
        raise UserError(
            f"task.path is {path}, which is not a parquet file that can be read ({reason}); write another"
        ) from None
    return Table(rows, str(path), path.stem)


def huggingface_table(config: TaskConfig) -> Table:
    """Opens a Hugging Face data set: a directory, or the id of a data set on the hub.

    A directory is one that ``save_to_disk`` wrote, or one that holds data files.

    Raises:
        UserError: If the data set cannot be loaded; the message says whether it is missing or gated, or the
            hub cannot be reached.
    """
    datasets = _import_datasets()
    assert config.path is not None
    path, origin = Path(config.path), f"{config.path} ({config.split})"
    try:
        if (path / "state.json").is_file():
            rows = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if config.split not in splits:
                raise UserError(
                    f"task.split is {config.split!r}, which {config.path} lacks; write one of "
                    f"{', '.join(splits)}"
                )
            rows = splits[config.split]
        else:
            rows = datasets.load_dataset(config.path, config.subset, split=config.split)
    except UserError:
        raise
    except Exception as error:  # from the hub, from files, and from unknown names
        raise UserError(f"task.path {config.path}: {_failure(error, path.is_dir())}") from None
    if not hasattr(rows, "features"):
        raise UserError(f"task.split is {config.split!r}, which is not a single split; name one")
    return Table(rows, origin, path.name)


def _import_datasets() -> Any:
    """Imports ``datasets``, which takes a second, and silences it, because our errors say what is wrong."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _failure(error: BaseException, local: bool) -> str:
    """Describes why a data set could not be loaded, and what to do.

    Args:
        error: Exception that ``datasets`` raised.
        local: Whether ``task.path`` is a directory.
    """
    chain, current = [], error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    names = " ".join(type(e).__name__ for e in chain)
    texts = " ".join(str(e).lower() for e in chain)
    if local:
        return (
            f"the directory holds no data set that can be read ({one_line(error, _MAX_REASON)}); name one "
            "that datasets' save_to_disk wrote"
        )
    if "GatedRepo" in names or "gated" in texts:
        return "the data set is gated; accept its terms on its hub page and set HF_TOKEN"
    if (
        "Offline" in names
        or "Connection" in names
        or "Timeout" in names
        or "offline" in texts
        or "couldn't reach" in texts
    ):
        return (
            f"the hub cannot be reached ({one_line(error, _MAX_REASON)}); name a directory that datasets' "
            "save_to_disk wrote"
        )
    if "NotFound" in names:
        return (
            "there is no such directory, and the hub has no such data set, or it is private; correct the "
            "path, or set HF_TOKEN"
        )
    # for an unknown split or subset, the library's own message lists those that exist
    return one_line(error, _MAX_REASON)
