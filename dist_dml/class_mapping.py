"""From the classes of one catalogue to those of another: by name, renamed, merged, dropped, new.

Dimensions: C old classes, N new ones, M further sources of merged classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from dist_dml.data.csv_rows import csv_rows
from dist_dml.errors import UsageError

NONE = -1
_HEAD = ["old", "new"]


@dataclass(frozen=True)
class ClassMapping:
    """Where each new class comes from.

    Attributes:
        source: (N,) an old class, or `NONE` for a class that is new.
        merged_new: (M,) new classes that have further sources, and
        merged_old: (M,) these.
        num_old: C.
    """

    source: Int[np.ndarray, " N"]
    merged_new: Int[np.ndarray, " M"]
    merged_old: Int[np.ndarray, " M"]
    num_old: int

    @property
    def new(self) -> Int[np.ndarray, " n"]:
        """Classes without a source."""
        return np.flatnonzero(self.source == NONE)

    @property
    def dropped(self) -> Int[np.ndarray, " n"]:
        """Old classes that go nowhere."""
        used = np.zeros(self.num_old, bool)
        used[self.source[self.source != NONE]] = True
        used[self.merged_old] = True
        return np.flatnonzero(~used)

    def first_new(self) -> Int[np.ndarray, " C"]:
        """For every old class the first new one that it goes to; `NONE` for those dropped."""
        found = np.full(self.num_old, NONE, np.int64)
        # Backwards, so that the first of several stays.
        for old, new in (
            (self.merged_old, self.merged_new),
            (self.source, np.arange(len(self.source))),
        ):
            known = old != NONE
            found[old[known][::-1]] = new[known][::-1]
        return found

    def describe(self) -> str:
        """One line for people."""
        merged = len(np.unique(self.merged_new))
        return (
            f"{self.num_old:,} classes -> {len(self.source):,}: "
            f"{len(self.source) - len(self.new):,} carried over ({merged:,} of them merged from "
            f"several), {len(self.new):,} new, {len(self.dropped):,} dropped"
        )


def map_classes(
    old: Sequence[str], new: Sequence[str], renames: Sequence[tuple[str, str]] = ()
) -> ClassMapping:
    """Classes of equal name are the same, but for old ones that `renames` speaks of.

    Args:
        old: names by class id; no name twice.
        new: likewise.
        renames: (old, new) pairs. Several old ones for one new one merge; several new ones for one
            old one all start from it; an empty new one drops the old.

    Raises:
        UsageError: a name of `renames` is in neither catalogue where it should be.
    """
    olds, news = pa.array(old, pa.string()), pa.array(new, pa.string())
    renamed_old, renamed_new = (
        pa.array([pair[side] for pair in renames], pa.string()) for side in (0, 1)
    )
    source = _places(news, olds)
    # Renamed ones go where they are told, and nowhere else.
    told = np.zeros(len(old) + 1, bool)
    told_ids = _places(renamed_old, olds)
    _refuse_unknown(renames, told_ids, 0, "the checkpoint's catalogue")
    told[told_ids] = True
    source = np.where(told[source], NONE, source)
    kept = np.array([bool(pair[1]) for pair in renames], bool)
    goals = _places(renamed_new, news)
    _refuse_unknown(renames, np.where(kept, goals, 0), 1, "the new catalogue")
    extra_new, extra_old = [], []
    for from_id, goal in zip(told_ids[kept].tolist(), goals[kept].tolist(), strict=True):
        if source[goal] == NONE:
            source[goal] = from_id
        elif source[goal] != from_id:
            extra_new.append(goal)
            extra_old.append(from_id)
    return ClassMapping(
        source, np.array(extra_new, np.int64), np.array(extra_old, np.int64), len(old)
    )


def _places(wanted: pa.Array, among: pa.Array) -> Int[np.ndarray, " n"]:
    # Functions of pyarrow.compute are made when it is imported.
    found = pc.index_in(wanted, value_set=among)  # pyright: ignore[reportAttributeAccessIssue]
    return pc.fill_null(found, NONE).to_numpy(zero_copy_only=False).astype(np.int64)


def _refuse_unknown(
    renames: Sequence[tuple[str, str]], places: Int[np.ndarray, " n"], side: int, where: str
) -> None:
    unknown = np.flatnonzero(places == NONE)
    if len(unknown):
        name = renames[int(unknown[0])][side]
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UsageError(
            f"--mapping: {where} has no class {name!r}{more}; give names of training classes, and "
            "an empty `new` to drop a class"
        )


def read_renames(path: str) -> list[tuple[str, str]]:
    """The pairs of a CSV file with the header `old,new`.

    Raises:
        UsageError: it cannot be read, or says something else.
    """
    pairs = []
    for where, row in csv_rows(Path(path)):
        if list(row) != _HEAD:
            raise UsageError(
                f"{where} of --mapping: the header is {','.join(row)}; expected {','.join(_HEAD)}"
            )
        pairs.append((row["old"], row["new"].strip()))
    return pairs
