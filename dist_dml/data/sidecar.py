"""What the scan of one shard found, kept: a shard that has not changed is not read again.

`sidecars/SHARD.tar.parquet` in the folder of the index has a row per sound sample: key, text of the
label, extension, place, CRC-32, width and height of the image, places of `.cls` and `.json`. Its
metadata say which bytes it describes and what was left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.parquet_files import check_columns, open_parquet, stamp_of, write_parquet
from dist_dml.data.scanning import COLUMNS, LeftOut, ShardScan
from dist_dml.data.shards import IMAGE_EXTENSIONS

FOLDER = "sidecars"
VERSION = 1
"""Changes with what a scan finds: sidecars of another version are not used."""


def sidecar_path(root: Path, name: str) -> Path:
    """Where the sidecar of a shard lies.

    Shards of another folder or of an object store may share a name: theirs starts with a digest.

    Args:
        root: folder of the index.
        name: of the shard, as in `dataset.json`: a path below `root`, another path, or a URL.
    """
    base = name.partition("?")[0].rpartition("/")[2]
    if base != name:
        base = f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{base}"
    return root / FOLDER / f"{base}.parquet"


def write_sidecar(path: Path, scan: ShardScan, made_from: Mapping[str, Any]) -> None:
    """Keep a scan.

    Args:
        path: from `sidecar_path`.
        scan: of the shard.
        made_from: size, time and tag of the shard, and the options of the scan.
    """
    import pyarrow

    columns: dict[str, Any] = {"key": scan.keys, "label": scan.labels, **scan.columns}
    columns["extension"] = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(scan.columns["extension"]), list(IMAGE_EXTENSIONS)
    )
    stamp = {
        "made_from": _text(made_from),
        "left_out": json.dumps([asdict(sample) for sample in scan.left_out]),
    }
    path.parent.mkdir(exist_ok=True)
    write_parquet(path, pyarrow.table(columns), stamp)


def read_sidecar(path: Path, made_from: Mapping[str, Any]) -> ShardScan | None:
    """The scan that was kept, or None if there is none of the same bytes with the same options.

    A damaged sidecar counts as none: everything in it can be found again.
    """
    try:
        with open_parquet(path) as file:
            stamp = stamp_of(file)
            if stamp.get("made_from") != _text(made_from):
                return None
            left_out = tuple(_left_out(row) for row in json.loads(stamp["left_out"]))
            table = _checked_table(file)
        extension = table["extension"].combine_chunks()
        columns = {
            name: np.asarray(
                _codes(extension) if name == "extension" else table[name].to_numpy(), dtype
            )
            for name, dtype in COLUMNS.items()
        }
        for name in ("", "cls_", "json_"):
            _check_places(columns[f"{name}offset"], columns[f"{name}size"], made_from["bytes"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    keys, labels = (table[name].combine_chunks() for name in ("key", "label"))
    return ShardScan(keys, labels, columns, left_out)


def _left_out(row: Any) -> LeftOut:
    found = LeftOut(**row)
    texts = (found.key, found.reason, found.message)
    if type(found.offset) is not int or not all(isinstance(text, str) for text in texts):
        raise ValueError("no entry of a sample")
    return found


def _checked_table(file: Any) -> Any:
    """The columns, if they are of the types that they were written with and without gaps."""
    import pyarrow

    types = {name: pyarrow.from_numpy_dtype(dtype) for name, dtype in COLUMNS.items()}
    types |= {"key": pyarrow.string(), "label": pyarrow.string()}
    types["extension"] = pyarrow.dictionary(pyarrow.int8(), pyarrow.string())
    check_columns(file, types)
    table = file.read(list(types))
    table.validate(full=True)  # Parquet's reader takes any bytes for UTF-8.
    if any(column.null_count for column in table.columns):
        raise ValueError("a row without a value")
    return table


def _codes(extension: Any) -> np.ndarray:
    """The code of each extension in `IMAGE_EXTENSIONS`."""
    import pyarrow
    from pyarrow.compute import index_in  # pyright: ignore[reportAttributeAccessIssue]

    found = index_in(extension.cast(pyarrow.string()), pyarrow.array(IMAGE_EXTENSIONS))
    if found.null_count:
        raise ValueError("an unknown extension")
    return found.to_numpy(zero_copy_only=False)


def _check_places(offset: np.ndarray, size: np.ndarray, num_bytes: int) -> None:
    """Refuse places outside the shard; where there is no member, both are -1."""
    there = (offset != -1) | (size != -1)
    offset, size = offset[there], size[there]
    if np.any((offset < 0) | (size < 0) | (size > num_bytes) | (offset > num_bytes - size)):
        raise ValueError("a place outside the shard")


def _text(made_from: Mapping[str, Any]) -> str:
    return json.dumps({"version": VERSION, **made_from}, sort_keys=True)
