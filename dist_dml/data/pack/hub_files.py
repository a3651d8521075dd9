"""The files of a Hugging Face `datasets` image set, read with pyarrow alone: no code, no pickles.

    save_to_disk of a DatasetDict    dataset_dict.json, SPLIT/state.json, SPLIT/data-*.arrow
    save_to_disk of a Dataset        state.json, dataset_info.json, data-*.arrow
    the hub, a snapshot of it        data/SPLIT-00000-of-00004.parquet, or SPLIT/0000.parquet

What a column means stands in the schema's metadata, under `huggingface`: {"info": {"features":
{"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": [...]}}}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dml.errors import UsageError

LAYOUT = (
    "a folder of save_to_disk (dataset_dict.json or state.json), or Parquet files such as "
    "data/train-00000-of-00001.parquet"
)
_NUMBERED = re.compile(r"(?:.*[^\w])?(\w+)-\d{5}-of-\d{5}")
_FORMATS = (".parquet", ".arrow")


@dataclass(frozen=True)
class Unit:
    """Rows that are read at a time: a row group of Parquet, a record batch of Arrow.

    Attributes:
        file: path.
        number: of the unit in its file.
        split: the source's name of its split.
        start: number of its first row in the split.
        rows: how many.
    """

    file: str
    number: int
    split: str
    start: int
    rows: int


def find_splits(src: Path) -> dict[str, list[Path]]:
    """The files of each split, in order.

    Raises:
        UsageError: there is no data set of these layouts, or several configurations of one.
    """
    if src.is_file() and src.suffix in _FORMATS:
        return {_split_of(src, src.parent)[1]: [src]}
    if not src.is_dir():
        raise UsageError(f"{src}: no such folder or file; expected {LAYOUT}")
    if (src / "dataset_dict.json").is_file():
        names = _json(src / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(_plain_name(name) for name in names):
            raise UsageError(f"{src / 'dataset_dict.json'}: has no list of splits; save it again")
        return {name: _saved(src / name) for name in names}
    if (src / "state.json").is_file():
        name = _json(src / "state.json").get("_split")
        return {str(name) if _plain_name(name) else "train": _saved(src)}
    found: dict[str, list[Path]] = {}
    configurations = set()
    for file in sorted(path for kind in _FORMATS for path in src.rglob("*" + kind)):
        if any(part.startswith(".") for part in file.relative_to(src).parts):
            continue  # Download records of the hub's client.
        configuration, split = _split_of(file, src)
        configurations.add(str(configuration))
        found.setdefault(split, []).append(file)
    if not found:
        raise UsageError(f"{src}: holds no data set; expected {LAYOUT}")
    if len(configurations) > 1:
        raise UsageError(
            f"{src}: holds several configurations ({', '.join(sorted(configurations))[:160]}); "
            "give the folder of one"
        )
    return found


def _split_of(file: Path, top: Path) -> tuple[Path, str]:
    """Folder of the configuration, and split, as the name or the folder of a file tells it."""
    match = _NUMBERED.match(file.stem)
    if match:
        return file.parent, match.group(1)
    if file.parent not in (top, top / "data"):
        return file.parent.parent, file.parent.name
    return file.parent, file.stem if file.stem.isidentifier() else "train"


def _plain_name(name: Any) -> bool:
    """Whether a name that a file states is that of one file or folder beside it."""
    if not isinstance(name, str) or not name.isprintable():  # A zero byte is not printable.
        return False
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is no readable JSON object; save the data set again")
    return content


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of one split of `save_to_disk`."""
    if not (folder / "state.json").is_file():
        raise UsageError(f"{folder / 'state.json'}: no such file; expected {LAYOUT}")
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UsageError(f"{folder}: was saved with indices by an old version; save it again")
    entries = state.get("_data_files")
    names = [e.get("filename") if isinstance(e, dict) else None for e in entries or ()]
    if not names or not all(_plain_name(name) for name in names):
        raise UsageError(f"{folder / 'state.json'}: names no data files; save the data set again")
    for name in names:
        if not (folder / str(name)).is_file():
            raise UsageError(f"{folder / str(name)}: no such file, state.json names it; copy it")
    return [folder / str(name) for name in names]


def open_file(path: Path) -> tuple[Any, list[int]]:
    """A handle for `read_unit`, and the rows of each unit. Arrow files are mapped, not read.

    Raises:
        UsageError: it is neither Parquet nor Arrow, or damaged.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        if path.suffix == ".parquet":
            file = ParquetFile(path)
            groups = file.metadata
            return file, [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        source = pyarrow.memory_map(str(path))
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            source.seek(0)
            reader = pyarrow.ipc.open_stream(source)
            batches = list(reader)
        return (reader.schema, batches), [len(batch) for batch in batches]
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UsageError(f"{path}: no readable {path.suffix[1:]} file ({reason}); copy it again")


def schema_of(handle: Any) -> Any:
    """The Arrow schema of an open file."""
    return handle[0] if isinstance(handle, tuple) else handle.schema_arrow


def read_unit(handle: Any, number: int, columns: Sequence[str], path: Path) -> Any:
    """A unit of an open file as a table with some columns.

    Raises:
        UsageError: it is damaged.
    """
    import pyarrow

    try:
        if isinstance(handle, tuple):
            return pyarrow.Table.from_batches([handle[1][number]]).select(list(columns))
        return handle.read_row_group(number, list(columns))
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def features_of(handle: Any, path: Path) -> Mapping[str, Any]:
    """What the columns mean: from the schema, or `dataset_info.json` beside the file."""
    text = (schema_of(handle).metadata or {}).get(b"huggingface")
    try:
        if text:
            return dict(json.loads(text)["info"]["features"])
    except (ValueError, KeyError, TypeError):
        pass
    info = path.parent / "dataset_info.json"
    features = _json(info).get("features") if info.is_file() else None
    return features if isinstance(features, dict) else {}


def blocks(table: Any, rows: Sequence[int], size: int) -> Iterator[list[dict[str, Any]]]:
    """Some rows of a table as Python objects, a few at a time: images are large."""
    for start in range(0, len(rows), size):
        yield table.take(list(rows[start : start + size])).to_pylist()
