"""Datasets from local files, `save_to_disk` folders and the hub, with one clear sentence when that fails."""

from __future__ import annotations

from pathlib import Path

import datasets

from prefkern.training.config import DataConfig
from prefkern.training.errors import DataError, nearest

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training rows and, if the configuration names any, the evaluation rows.

    Raises:
        DataError: a dataset cannot be found or read, lacks the split, or is empty.
    """
    train = load_rows(config.train, config.split, config.config, "data.train")
    if config.eval is not None:
        evaluation = load_rows(config.eval, config.eval_split or "train", config.config, "data.eval", only_split=True)
    elif config.eval_split is not None:
        evaluation = load_rows(config.train, config.eval_split, config.config, "data.train")
    elif config.eval_size is not None:
        train, evaluation = _hold_out(train, config.eval_size)
    else:
        evaluation = None
    if config.limit is not None:
        train = train.select(range(min(config.limit, len(train))))
    return train, evaluation


def load_rows(
    source: str, split: str, name: str | None = None, key: str = "data.train", only_split: bool = False
) -> datasets.Dataset:
    """One split of one source.

    Args:
        source: file, folder or hub name.
        split: as in `datasets.load_dataset`, slices included; a single file has the split "train".
        name: configuration name of a hub dataset.
        key: the configuration key that `source` came from, for messages.
        only_split: take the only split of a source that has one, whatever it is called.
    Raises:
        DataError: as `load_splits`.
    """
    path = Path(source).expanduser()
    try:
        rows = _read(path, source, split, name)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds for an unreadable source
        if "corresponds to no data" in str(error):
            raise DataError(f"{key}={source!r} has no rows: a dataset needs at least one") from error
        raise DataError(f"{key}={source!r} cannot be read: {_first_line(error)}") from error
    if isinstance(rows, datasets.DatasetDict):
        if only_split and split not in rows and len(rows) == 1:
            split = next(iter(rows))
        if split not in rows:
            raise DataError(f"{key}={source!r} has no split {split!r}: {nearest(split, rows)}")
        rows = rows[split]
    if len(rows) == 0:
        raise DataError(f"{key}={source!r} has no rows: a dataset needs at least one")
    return rows


def _read(path: Path, source: str, split: str, name: str | None) -> datasets.Dataset | datasets.DatasetDict:
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise DataError(f"{source!r} is not a .json, .jsonl or .parquet file: convert it to one of these")
        if path.stat().st_size == 0:
            raise DataError(f"{source!r} is an empty file: a dataset needs at least one row")
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split=split)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), name, split=split)
    if path.suffix in _FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"there is no file or folder {source!r}: check the path")
    return datasets.load_dataset(source, name, split=split)


def _hold_out(rows: datasets.Dataset, size: int | float) -> tuple[datasets.Dataset, datasets.Dataset]:
    held = round(len(rows) * size) if size < 1 else int(size)
    if not 0 < held < len(rows):
        raise DataError(
            f"data.eval_size={size} would hold out {held} of {len(rows)} rows: at least one must be left on each side"
        )
    parts = rows.train_test_split(test_size=held, seed=0)
    return parts["train"], parts["test"]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
