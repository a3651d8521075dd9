"""Damaged samples, listed in Parquet: those that a data set leaves out, those that a run met."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from dist_dml.data.parquet_files import check_columns, open_parquet, stamp_of, write_parquet
from dist_dml.errors import UsageError

if TYPE_CHECKING:
    from dist_dml.data.index import Index

QUARANTINE_FILE = "quarantine.parquet"


@dataclass(frozen=True)
class QuarantineEntry:
    """One damaged sample: where it is, what kind of damage, and the reason in words."""

    shard: str
    key: str
    sample_id: int
    offset: int
    kind: str
    reason: str

    @classmethod
    def of(cls, index: Index, sample_id: int, kind: str, reason: str) -> QuarantineEntry:
        """The entry of a sample of an index. Reads the keys, at the first call for an index."""
        return cls(
            index.shards[int(index.shard[sample_id])],
            index.key(sample_id),
            int(sample_id),
            int(index.offset[sample_id]),
            kind,
            reason,
        )


def write_quarantine(path: Path, entries: Sequence[QuarantineEntry], fingerprint: str = "") -> None:
    """Replace the list at `path`, which appears whole, ordered by sample id.

    Args:
        path: a file; `QUARANTINE_FILE` in the folder of a data set takes samples out of it.
        entries: may be empty.
        fingerprint: of the index, without quarantine, that the sample ids are of.
    """
    import pyarrow

    rows = sorted(entries, key=lambda entry: entry.sample_id)
    table = pyarrow.table(
        {
            "shard": pyarrow.array([row.shard for row in rows], pyarrow.string()),
            "key": pyarrow.array([row.key for row in rows], pyarrow.string()),
            "sample_id": pyarrow.array([row.sample_id for row in rows], pyarrow.int64()),
            "offset": pyarrow.array([row.offset for row in rows], pyarrow.int64()),
            "kind": pyarrow.array([row.kind for row in rows], pyarrow.string()),
            "reason": pyarrow.array([row.reason for row in rows], pyarrow.string()),
        }
    )
    write_parquet(path, table, {"fingerprint": fingerprint})


def read_quarantine(path: Path) -> list[QuarantineEntry]:
    """The entries of a list, ordered by sample id.

    Raises:
        UsageError: it is damaged.
    """
    try:
        with open_parquet(path) as file:
            return [QuarantineEntry(**row) for row in file.read().to_pylist()]
    except ValueError:
        raise _useless(path, "is damaged") from None


def quarantined_ids(root: Path, fingerprint: str, num_samples: int) -> Int64[np.ndarray, " q"]:
    """The sample ids that a data set leaves out, ascending; none without a quarantine.

    Args:
        root: folder of the data set.
        fingerprint: of its index, without quarantine.
        num_samples: rows of its index.

    Raises:
        UsageError: the list is damaged, or of another index.
    """
    import pyarrow

    path = root / QUARANTINE_FILE
    if not path.exists():
        return np.zeros(0, np.int64)
    try:
        with open_parquet(path) as file:
            recorded = stamp_of(file).get("fingerprint", "")
            check_columns(file, {"sample_id": pyarrow.int64()})
            column = file.read(["sample_id"])["sample_id"].to_numpy()
            if column.dtype != np.int64:  # Of floats, where a value is missing.
                raise ValueError("sample_id has rows without a number")
        ids = np.unique(column)
    except ValueError:
        raise _useless(path, "is damaged") from None
    outside = len(ids) and (ids[0] < 0 or ids[-1] >= num_samples)
    if recorded != fingerprint or outside:
        raise _useless(path, f"is of another index (fingerprint {recorded[:12] or 'unknown'})")
    return ids


def quarantined_fingerprint(fingerprint: str, ids: Int64[np.ndarray, " q"]) -> str:
    """The fingerprint of an index without some samples; its own if that is none."""
    if not len(ids):
        return fingerprint
    return hashlib.sha256(fingerprint.encode() + ids.astype("<i8").tobytes()).hexdigest()


def _useless(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: {what}; run `dist-dml verify {path.parent} --fix` again, or delete it"
    )
