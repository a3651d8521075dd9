"""What a search for leaks has found: pairs, counts, a table, a Parquet file, a quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int64

from dist_dml.data.image_comparison import KINDS
from dist_dml.data.image_hashes import FLAT_CONTRAST, LEAST_SIDE, UnreadableImage
from dist_dml.data.index import Index
from dist_dml.data.parquet_files import write_parquet
from dist_dml.data.quarantine import (
    QUARANTINE_FILE,
    QuarantineEntry,
    read_quarantine,
    write_quarantine,
)
from dist_dml.errors import UsageError

KIND_NAMES = {"bytes": "same bytes", "pixels": "same pixels", "near": "near copy"}
_MOST_LISTED = 10


@dataclass(frozen=True)
class SplitLeaks:
    """What two splits share; or one split with itself, where only other classes count.

    Attributes:
        split_a: the split that should not give anything away, as `train`.
        split_b: the split whose images are counted, as `test`; `split_a` for label conflicts.
        kinds: pairs with the same bytes, with the same pixels only, and near copies.
        other_class: of all these pairs, those whose classes differ.
        affected: images of `split_b` in any of them.
        total: images of `split_b`.
        crowded: images of `split_b` with more candidates than were compared.
    """

    split_a: str
    split_b: str
    kinds: tuple[int, int, int]
    other_class: int
    affected: int
    total: int
    crowded: int

    @property
    def share(self) -> float:
        """Share of the images of `split_b` that are affected."""
        return self.affected / self.total


@dataclass(frozen=True, eq=False)
class LeakPairs:
    """All pairs, one entry each: sample ids, kind (position in `KINDS`), how alike."""

    id_a: Int64[np.ndarray, " p"]
    id_b: Int64[np.ndarray, " p"]
    kind: Int8[np.ndarray, " p"]
    distance: Int64[np.ndarray, " p"]
    correlation: Float32[np.ndarray, " p"]
    conflict: Bool[np.ndarray, " p"]
    """Within a split, of different classes."""

    def __len__(self) -> int:
        return len(self.id_a)

    def worst_first(self, most: int) -> Int64[np.ndarray, " m"]:
        """Entries in the order of KINDS and correlation, leaks before label conflicts.

        No image of `id_b` twice: one picture in a thousand copies is one finding.
        """
        order = np.lexsort((self.distance, -self.correlation, self.kind, self.conflict))
        first = np.sort(np.unique(self.id_b[order], return_index=True)[1])
        return order[first][:most]


def joined_pairs(parts: Sequence[LeakPairs]) -> LeakPairs:
    """All entries, one part after the other."""
    if not parts:
        none = np.zeros(0, np.int64)
        kind, correlation = np.zeros(0, np.int8), np.zeros(0, np.float32)
        return LeakPairs(none, none, kind, none, correlation, np.zeros(0, bool))
    columns = zip(
        *((p.id_a, p.id_b, p.kind, p.distance, p.correlation, p.conflict) for p in parts),
        strict=True,
    )
    return LeakPairs(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True, eq=False)
class LeakSummary:
    """Everything that was found."""

    index: Index
    splits: tuple[SplitLeaks, ...]
    conflicts: tuple[SplitLeaks, ...]
    pairs: LeakPairs
    num_flat: int
    """Nearly uniform and tiny images, of which only equal pixels are found."""
    unreadable: tuple[UnreadableImage, ...]

    @property
    def share(self) -> float:
        """The largest share of a split that another one gives away; 0 where none were compared."""
        return max((part.share for part in self.splits), default=0.0)

    def text(self) -> str:
        """A few lines and a table: pairs by kind and by splits, images affected."""
        lines = [
            f"{self.index.folder}: {len(self.index):,} images; {self.num_flat:,} compared by their "
            f"pixels only (nearly uniform: contrast below {FLAT_CONTRAST:g} levels, or smaller "
            f"than {LEAST_SIDE} pixels); {len(self.unreadable):,} unreadable"
        ]
        lines += [f"  {_unreadable(self.index, image)}" for image in self.unreadable[:_MOST_LISTED]]
        if len(self.unreadable) > _MOST_LISTED:
            lines.append(f"  and more: `dist-dml verify {self.index.folder}` lists all")
        lines += ["", *summary_table(self), ""]
        crowded = ", ".join(
            f"{part.crowded:,} of {part.split_b} in {part.split_a}"
            for part in (*self.splits, *self.conflicts)
            if part.crowded
        )
        if crowded:
            lines.append(f"note: only the nearest of many candidates were compared for {crowded}")
        if not self.splits:
            lines.append("note: no two splits were compared; name them with --between A:B")
        return "\n".join(lines).rstrip()


def _unreadable(index: Index, image: UnreadableImage) -> str:
    shard = index.shards[int(index.shard[image.sample_id])]
    return f"shard {shard}: key {index.key(image.sample_id)}: {image.reason} ({image.kind})"


def summary_rows(summary: LeakSummary) -> list[list[str]]:
    """Heading and a row for each two splits, and each split with itself."""
    heading = ["pairs", "same bytes", "same pixels", "near", "other class", "images affected"]
    rows = [heading]
    for parts, name in ((summary.splits, "{a} - {b}"), (summary.conflicts, "within {b}")):
        for part in parts:
            affected = f"{part.affected:,} of {part.total:,} in {part.split_b} ({part.share:.2%})"
            counts = [f"{count:,}" for count in (*part.kinds, part.other_class)]
            rows.append([name.format(a=part.split_a, b=part.split_b), *counts, affected])
    return rows


def summary_table(summary: LeakSummary) -> list[str]:
    """`summary_rows` in columns. Within a split only pairs of different classes count."""
    rows = summary_rows(summary)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    if summary.conflicts:
        lines.append("(within a split: only pairs of different classes, which are label conflicts)")
    return lines


def write_pairs(path: Path, summary: LeakSummary, settings: dict[str, str]) -> None:
    """All pairs as Parquet: id, key, split and class of both, kind, distance, correlation."""
    import pyarrow

    index, pairs = summary.index, summary.pairs
    columns: dict[str, object] = {}
    for side, column in (("a", pairs.id_a), ("b", pairs.id_b)):
        ids = column.tolist()
        columns[f"id_{side}"] = column
        columns[f"key_{side}"] = pyarrow.array([index.key(i) for i in ids], pyarrow.string())
        for name, values in (
            ("split", [index.split_names[index.split[i]] for i in ids]),
            ("class", [index.class_names[index.class_id[i]] for i in ids]),
        ):
            columns[f"{name}_{side}"] = pyarrow.array(values, pyarrow.string())
    columns["kind"] = pyarrow.array([KINDS[kind] for kind in pairs.kind], pyarrow.string())
    columns["distance"] = pairs.distance
    columns["correlation"] = pairs.correlation
    columns["conflict"] = pairs.conflict
    write_parquet(
        path, pyarrow.table(columns), {"fingerprint": summary.index.fingerprint, **settings}
    )


def exclude_leaks(summary: LeakSummary, split: str) -> int:
    """Put the images of a split that are in another one too into the data set's quarantine.

    Those that are in quarantine already stay there. Label conflicts are left alone: which of the
    two labels is right, nobody can tell from here. Returns the number of images added.

    Raises:
        UsageError: no comparison was made with that split, or the quarantine is damaged.
    """
    index, pairs = summary.index, summary.pairs
    if not any(split in (part.split_a, part.split_b) for part in summary.splits):
        raise UsageError(
            f"--exclude-from={split}: no other split was compared with it; compared were "
            + (", ".join(f"{p.split_a}:{p.split_b}" for p in summary.splits) or "none")
        )
    path = index.folder / QUARANTINE_FILE
    entries = {entry.sample_id: entry for entry in read_quarantine(path)} if path.exists() else {}
    before = len(entries)
    code = index.split_names.index(split)
    for own, other in ((pairs.id_a, pairs.id_b), (pairs.id_b, pairs.id_a)):
        for entry in np.flatnonzero(~pairs.conflict & (index.split[own] == code)).tolist():
            sample_id, twin = int(own[entry]), int(other[entry])
            kind = KINDS[pairs.kind[entry]]
            reason = (
                f"{KIND_NAMES[kind]} of {index.split_names[index.split[twin]]} image "
                f"{index.key(twin)}"
            )
            entries.setdefault(sample_id, QuarantineEntry.of(index, sample_id, "leak", reason))
    write_quarantine(path, list(entries.values()), index.metadata["fingerprint"])
    return len(entries) - before
