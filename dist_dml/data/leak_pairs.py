"""Pairs of images that are the same: candidates by their hashes, then the pixels themselves.

Candidates are all pairs of 64-bit hashes within a Hamming distance, found without comparing all
with all by multi-index hashing (Norouzi, Punjani, Fleet, Fast Search in Hamming Space with
Multi-Index Hashing, CVPR 2012): if two hashes differ in at most d bits, one of their three bands
differs in at most d // 3. Hashes that are equal are searched once, and every image keeps its
nearest partners only, so that a hash which a million images share costs a million and not 10^12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from jaxtyping import Int64, UInt64

from dist_dml.data.progress import ProgressLine

_BANDS = 3
_BLOCK = 2**20
"""Numbers that are worked on at a time: 8 MiB an array."""
_LOOKUP_NANOSECONDS, _CANDIDATE_NANOSECONDS, _BRUTE_NANOSECONDS = 32.0, 80.0, 1.1
"""Per probed bucket, per hash found there, and per pair of all with all (2026-11, one core)."""


@dataclass(frozen=True, eq=False)
class HashPairs:
    """Pairs of positions whose hashes are near, in the order of `left`, nearest first.

    Attributes:
        left: position in the first hashes.
        right: position in the second hashes.
        distance: bits that differ.
        crowded: positions of the first hashes that have more partners than were kept.
    """

    left: Int64[np.ndarray, " p"]
    right: Int64[np.ndarray, " p"]
    distance: Int64[np.ndarray, " p"]
    crowded: Int64[np.ndarray, " k"]


def near_pairs(
    left: UInt64[np.ndarray, " n"],
    right: UInt64[np.ndarray, " m"],
    distance: int,
    most: int,
    groups: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]] | None = None,
    label: str = "",
) -> HashPairs:
    """All pairs of `left` and `right` within a Hamming distance, at most `most` for each of `left`.

    Equal to comparing all with all and keeping the nearest `most` of each row; which of several
    equally near ones are kept is arbitrary, but the same in every run. Memory is bounded: 24 bytes
    for each pair that is kept, 70 MB of tables, and about 100 MB of work or 100 bytes for each of
    `right`, whichever is more. With a distance of 8, 10^6 random hashes are searched for 100,000
    others in 5 s on one core (2026-11); comparing all with all takes 110 s.

    Args:
        left: hashes that look for partners.
        right: hashes that are searched.
        distance: bits that may differ, 0..64.
        most: partners that are kept for each of `left`.
        groups: a number for each hash; pairs of equal numbers are left out.
        label: of the progress line; "" prints none.
    """
    left_rows = _Collapsed.of(left, None if groups is None else groups[0])
    right_rows = _Collapsed.of(right, None if groups is None else groups[1])
    if not len(left) or not len(right):
        empty = np.zeros(0, np.int64)
        return HashPairs(empty, empty, empty, empty)
    search = _Search.over(right_rows.hashes, distance)
    progress = ProgressLine(label, float(len(left_rows.hashes)), "hashes") if label else None
    found: list[HashPairs] = []
    for start in range(0, len(left_rows.hashes), search.rows_at_a_time):
        rows = np.arange(start, min(start + search.rows_at_a_time, len(left_rows.hashes)))
        for queries, items, bits in search.candidates(left_rows.hashes, rows):
            if groups is not None:
                other = left_rows.group[queries] != right_rows.group[items]
                queries, items, bits = queries[other], items[other], bits[other]
            found.append(_expand(left_rows, right_rows, queries, items, bits, most))
        if progress is not None:
            progress.advance(float(len(rows)))
    if progress is not None:
        progress.finish()
    joined = [
        np.concatenate([getattr(part, name) for part in found] or [np.zeros(0, np.int64)])
        for name in ("left", "right", "distance", "crowded")
    ]
    order = np.lexsort((joined[1], joined[2], joined[0]))
    pairs = [column[order] for column in joined[:3]]
    return HashPairs(pairs[0], pairs[1], pairs[2], np.sort(joined[3]))


@dataclass(frozen=True, eq=False)
class _Collapsed:
    """Distinct (hash, group) rows, and the positions that have each."""

    hashes: np.ndarray
    group: np.ndarray
    start: np.ndarray
    """First entry of each row in `members`; one more at the end."""
    members: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray, group: np.ndarray | None) -> _Collapsed:
        group = np.zeros(len(hashes), np.int64) if group is None else group
        order = np.lexsort((group, hashes))
        hashes, group = hashes[order], group[order]
        fresh = np.ones(len(hashes), bool)
        fresh[1:] = (hashes[1:] != hashes[:-1]) | (group[1:] != group[:-1])
        first = np.flatnonzero(fresh)
        return cls(hashes[first], group[first], np.append(first, len(hashes)), order)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return self.start[rows + 1] - self.start[rows]


def _expand(
    left: _Collapsed,
    right: _Collapsed,
    queries: np.ndarray,
    items: np.ndarray,
    bits: np.ndarray,
    most: int,
) -> HashPairs:
    """Pairs of positions from pairs of distinct hashes; `most` for each position of `left`.

    The members of a row of `left` start at different members of a row of `right`: of many copies
    of one image all are seen.
    """
    order = np.lexsort((items, bits, queries))
    queries, items, bits = queries[order], items[order], bits[order]
    sizes = right.sizes(items)
    before = np.cumsum(sizes) - sizes
    opening = np.ones(len(queries), bool)
    opening[1:] = queries[1:] != queries[:-1]
    first = np.maximum.accumulate(np.where(opening, np.arange(len(queries)), 0))
    before = before - before[first] if len(first) else before
    crowded = np.unique(queries[before + sizes > most])
    taken = np.clip(most - before, 0, sizes)
    # One row for each member of the left hash and each partner that it gets.
    partner, number = _ranges(taken)
    member_row, member = _ranges(left.sizes(queries[partner]))
    partner, number = partner[member_row], number[member_row]
    row = items[partner]
    step = (number + member) % right.sizes(row)
    crowded_row, crowded_member = _ranges(left.sizes(crowded))
    return HashPairs(
        left.members[left.start[queries[partner]] + member],
        right.members[right.start[row] + step],
        bits[partner].astype(np.int64),
        left.members[left.start[crowded[crowded_row]] + crowded_member],
    )


def _ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts (2, 0, 3): which count (0 0 2 2 2) and the number in it (0 1 0 1 2)."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True, eq=False)
class _Search:
    """Distinct hashes, ready to be searched: a table of buckets for each band of their bits.

    Bits are dealt to the bands in turn, so that the frequencies of an image hash are spread evenly.
    """

    hashes: np.ndarray
    distance: int
    bands: tuple[_Band, ...]
    """Empty where comparing all with all is less work."""
    rows_at_a_time: int

    @classmethod
    def over(cls, hashes: np.ndarray, distance: int) -> _Search:
        radii = [(distance - band) // _BANDS for band in range(_BANDS)]
        widths = [len(range(band, 64, _BANDS)) for band in range(_BANDS)]
        probes = sum(
            comb(width, bits)
            for width, radius in zip(widths, radii, strict=True)
            for bits in range(radius + 1)
        )
        expected = probes * len(hashes) / 2 ** min(widths)
        if probes * _LOOKUP_NANOSECONDS + expected * _CANDIDATE_NANOSECONDS > (
            len(hashes) * _BRUTE_NANOSECONDS
        ):
            return cls(hashes, distance, (), max(1, _BLOCK // len(hashes)))
        bands = tuple(
            _Band.over(hashes, band, radius) for band, radius in enumerate(radii) if radius >= 0
        )
        return cls(hashes, distance, bands, max(1, _BLOCK // max(len(b.flips) for b in bands)))

    def candidates(
        self, left: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows of `left` and of `hashes` within the distance, and the bits that differ.

        All partners of a row come in one piece. A piece looks at a block of hashes, or, where one
        row alone meets more, at each of `hashes` once a band.
        """
        if not self.bands:
            bits = np.bitwise_count(left[rows, None] ^ self.hashes[None, :])
            which, items = np.nonzero(bits <= self.distance)
            yield rows[which], items, bits[which, items]
            return
        probes = [band.probe(left[rows]) for band in self.bands]
        met = sum(int(counts.sum()) for _, counts in probes)
        if met > _BLOCK and len(rows) > 1:
            half = len(rows) // 2
            yield from self.candidates(left, rows[:half])
            yield from self.candidates(left, rows[half:])
            return
        parts = []
        for number, (starts, counts) in enumerate(probes):
            which, step = _ranges(counts.ravel())
            items = self.bands[number].order[starts.ravel()[which] + step]
            queries = rows[which // counts.shape[1]]
            different = left[queries] ^ self.hashes[items]
            bits = np.bitwise_count(different)
            near = bits <= self.distance
            for band in self.bands[:number]:  # What an earlier band has met is not new.
                near &= np.bitwise_count(different & band.mask) > band.radius
            parts.append((queries[near], items[near], bits[near]))
        queries, items, bits = (np.concatenate(column) for column in zip(*parts, strict=True))
        yield queries, items, bits


@dataclass(frozen=True, eq=False)
class _Band:
    """Hashes by a third of their bits: bucket v holds `order[starts[v] : starts[v + 1]]`."""

    positions: np.ndarray
    mask: np.uint64
    radius: int
    flips: np.ndarray
    """Changes of the bucket number by at most `radius` bits."""
    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def over(cls, hashes: np.ndarray, band: int, radius: int) -> _Band:
        positions = np.arange(band, 64, _BANDS)
        width = len(positions)
        flips = [
            sum(1 << bit for bit in chosen)
            for bits in range(radius + 1)
            for chosen in combinations(range(width), bits)
        ]
        values = _gather(hashes, positions)
        starts = np.zeros(2**width + 1, np.int32)
        np.cumsum(np.bincount(values, minlength=2**width), out=starts[1:])
        mask = np.uint64(sum(1 << int(position) for position in positions))
        order = np.argsort(values, kind="stable").astype(np.int32)
        return cls(positions, mask, radius, np.array(flips, np.int64), order, starts)

    def probe(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First entry in `order` and number of entries of each bucket to look at (rows, flips)."""
        buckets = _gather(hashes, self.positions)[:, None] ^ self.flips[None, :]
        starts = self.starts[buckets]
        return starts, self.starts[buckets + 1] - starts


def _gather(hashes: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The bits of `hashes` at `positions`, next to each other, as int64."""
    values = np.zeros(len(hashes), np.int64)
    for place, position in enumerate(positions.tolist()):
        bit = (hashes >> np.uint64(position)) & np.uint64(1)
        values |= bit.astype(np.int64) << place
    return values
