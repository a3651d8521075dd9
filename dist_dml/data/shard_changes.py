"""Whether the tars of a data set are still those that were indexed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dist_dml.errors import UsageError


def is_url(name: str) -> bool:
    """Whether a shard's name is the URL of a remote one."""
    return "://" in name


def check_shards(
    root: Path,
    shards: Sequence[Mapping[str, Any]],
    columns: Mapping[str, np.ndarray],
    quarantined: Int64[np.ndarray, " q"],
) -> None:
    """Refuse local tars that have changed: offsets into them would read other bytes.

    A `stat` a shard. Copies have another time and the same bytes: where only the time differs, the
    first, middle and last sample decide. A shard that was changed elsewhere passes here, and each
    image's checksum finds it when it is read.

    Args:
        root: folder of the index.
        shards: their entries in `dataset.json`.
        columns: `offset`, `size` and `checksum` of all samples, shard after shard.
        quarantined: sample ids that are known to be damaged, and not looked at.

    Raises:
        UsageError: names the first shard that is missing or another one.
    """
    start = 0
    for shard in shards:
        stop = start + shard["samples"]
        name = shard["name"]
        if not is_url(name):
            path = root / name
            state = _state(root, name)
            if state.st_size != shard["bytes"]:
                raise UsageError(
                    f"data.path={root}: shard {name} has {state.st_size} bytes and was indexed "
                    f"with {shard['bytes']}; {_remedy(root)}"
                )
            if state.st_mtime_ns != shard.get("modified", state.st_mtime_ns):
                try:
                    _check_content(root, path, np.arange(start, stop), columns, quarantined)
                except OSError as error:
                    raise UsageError(
                        f"data.path={root}: shard {name} cannot be read ({error.strerror}); mend "
                        f"its permissions or the disk, or {_remedy(root)}"
                    ) from None
        start = stop


def _state(root: Path, name: str) -> os.stat_result:
    try:
        return os.stat(root / name)
    except OSError:
        raise UsageError(
            f"data.path={root}: shard {name} is missing; bring it back or {_remedy(root)}"
        ) from None


def _check_content(
    root: Path,
    path: Path,
    rows: np.ndarray,
    columns: Mapping[str, np.ndarray],
    quarantined: np.ndarray,
) -> None:
    rows = rows[~np.isin(rows, quarantined, assume_unique=True)]
    if not len(rows):
        return
    with path.open("rb") as stream:
        for row in {int(rows[0]), int(rows[len(rows) // 2]), int(rows[-1])}:
            stream.seek(int(columns["offset"][row]))
            if zlib.crc32(stream.read(int(columns["size"][row]))) != columns["checksum"][row]:
                raise UsageError(
                    f"data.path={root}: shard {path.name} was changed after it was indexed (sample "
                    f"{row} has another checksum); {_remedy(root)}, or look for damage with "
                    f"`dist-dml verify {root}`"
                )


def _remedy(root: Path) -> str:
    return f"run `dist-dml index {root}`"
