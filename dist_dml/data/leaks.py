"""`dist-dml leaks`: images that are in two splits of a data set, or in one under two labels.

A test image that was trained on flatters every score. Found are equal bytes, equal pixels, and near
copies: re-encoded, resized, brightened, and in part cropped by a few percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dist_dml.data.faults import StorageFault
from dist_dml.data.image_comparison import KINDS, Compared, compare_images
from dist_dml.data.image_hashes import ImageHashes, hash_images
from dist_dml.data.index import Index, load_index
from dist_dml.data.labels import TRAIN
from dist_dml.data.leak_pairs import near_pairs
from dist_dml.data.leak_report import contact_sheet, web_page
from dist_dml.data.leak_summary import (
    LeakPairs,
    LeakSummary,
    SplitLeaks,
    exclude_leaks,
    joined_pairs,
    write_pairs,
)
from dist_dml.data.quarantine import QUARANTINE_FILE
from dist_dml.errors import RunError, UsageError

LEAKS_FILE = "leaks.parquet"
PICTURE_FILE = "leaks.png"
DISTANCE = 8
"""Bits of the hash that may differ in a candidate. Of 41 photos it finds all halved, 40 re-encoded
at quality 30 or brightened, 40 cropped by 2%, 33 by 5%, and 13 by 5% at one corner (2026-11)."""
CORRELATION = 0.95
"""Of the aligned thumbnails of a near copy. Of those photos' copies that the hash finds it refuses
the cropped ones in 0 to 3%, and 11% of those both cropped and halved; of pairs of different glyphs
that the hash proposes it passes 0.5%, of those of different photos (35,497) none is left."""
PARTNERS = 8
"""Candidates that are compared for one image, the nearest ones."""


def report_leaks(
    index: Index,
    processes: int = 0,
    distance: int = DISTANCE,
    picture: bool = True,
    correlation: float = CORRELATION,
    between: Sequence[tuple[str, str]] | None = None,
    within: Sequence[str] | None = None,
) -> LeakSummary:
    """Find the leaks of a data set; write `leaks.parquet`, and `leaks.png` if there are any.

    Costs one decoding of every image the first time (see `hash_images`), the search of
    `near_pairs` for every comparison, and 1 to 2 ms for each candidate that looks alike.

    Args:
        index: the data set.
        processes: decoding and comparing processes; 0 takes one per core.
        distance: bits of the perceptual hash that may differ in a candidate, 0..32.
        picture: whether to draw the worst pairs.
        correlation: of the aligned thumbnails, from which a candidate is a near copy.
        between: pairs of splits (a, b), of which a should not give b away; by default `train` with
            every other split.
        within: splits that are searched for equal images of different classes; by default all.

    Raises:
        UsageError: a setting is out of range, or a split is not there.
        RunError: the storage fails.
    """
    _check(index, distance, correlation)
    if between is None:
        others = [name for name in index.split_names if name != TRAIN]
        between = [(TRAIN, name) for name in others] if TRAIN in index.split_names else []
    within = index.split_names if within is None else within
    asked = [*between, *((name, name) for name in within)]
    rows = {name: index.select(name) for pair in asked for name in pair}
    try:
        hashes = hash_images(index, processes)
        found = [_search(index, hashes, rows, a, b, distance) for a, b in asked]
        compared = compare_images(
            index,
            np.concatenate([_NO_IDS, *(part.id_a for part in found)]),
            np.concatenate([_NO_IDS, *(part.id_b for part in found)]),
            correlation,
            processes,
        )
    except StorageFault as error:
        raise RunError(f"{index.folder}: {error}; run the same command again") from None
    summary = _summarise(index, hashes, rows, found, compared)
    settings = {"distance": str(distance), "correlation": str(correlation)}
    write_pairs(index.folder / LEAKS_FILE, summary, settings)
    target = index.folder / PICTURE_FILE
    target.unlink(missing_ok=True)  # An older picture would show what is no longer there.
    if picture and len(summary.pairs):
        contact_sheet(summary).savefig(target)
    return summary


def _check(index: Index, distance: int, correlation: float) -> None:
    if index.joined is not None:
        raise UsageError("leaks are searched in one data set, and this is a mixture; name a folder")
    if not 0 <= distance <= 32:
        raise UsageError(f"--distance={distance}: expected 0..32 of the 64 bits; 8 is usual")
    if not 0 < correlation <= 1:
        raise UsageError(f"--correlation={correlation}: expected a number above 0, up to 1")


_NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Pairs of sample ids of two splits that may be the same; of one split if both are equal."""

    split_a: str
    split_b: str
    id_a: Int64[np.ndarray, " p"]
    id_b: Int64[np.ndarray, " p"]
    distance: Int64[np.ndarray, " p"]
    num_crowded: int

    @property
    def within(self) -> bool:
        return self.split_a == self.split_b


def _search(
    index: Index,
    hashes: ImageHashes,
    rows: Mapping[str, np.ndarray],
    split_a: str,
    split_b: str,
    distance: int,
) -> _Candidates:
    """Pairs with equal pixels, by the digest, and pairs with near hashes that say something."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    crowded = [_NO_IDS]
    within = split_a == split_b
    for column, usable, bits, label in (
        (hashes.pixels, hashes.readable, 0, ""),
        (hashes.hashes, hashes.telling, distance, f"search {split_a} - {split_b}"),
    ):
        ids_a, ids_b = (rows[name][usable[rows[name]]] for name in (split_a, split_b))
        groups = (index.class_id[ids_b], index.class_id[ids_a]) if within else None
        pairs = near_pairs(column[ids_b], column[ids_a], bits, PARTNERS, groups, label)
        parts.append((ids_a[pairs.right], ids_b[pairs.left]))
        crowded.append(ids_b[pairs.crowded])
    id_a, id_b = (np.concatenate(side) for side in zip(*parts, strict=True))
    if within:  # Each pair was met from both ends.
        id_a, id_b = np.minimum(id_a, id_b), np.maximum(id_a, id_b)
    both = np.unique(np.stack([id_a, id_b]), axis=1)
    bits = np.bitwise_count(hashes.hashes[both[0]] ^ hashes.hashes[both[1]]).astype(np.int64)
    return _Candidates(
        split_a, split_b, both[0], both[1], bits, len(np.unique(np.concatenate(crowded)))
    )


def _summarise(
    index: Index,
    hashes: ImageHashes,
    rows: Mapping[str, np.ndarray],
    found: Sequence[_Candidates],
    compared: Compared,
) -> LeakSummary:
    """Keep the candidates that are copies and count them."""
    parts: list[SplitLeaks] = []
    kept: list[LeakPairs] = []
    start = 0
    for part in found:
        stop = start + len(part.id_a)
        kind, correlation = compared.kind[start:stop], compared.correlation[start:stop]
        start = stop
        real = kind != KINDS.index("different")
        id_a, id_b = part.id_a[real], part.id_b[real]
        kept.append(
            LeakPairs(
                id_a,
                id_b,
                kind[real],
                part.distance[real],
                correlation[real],
                np.full(len(id_a), part.within),
            )
        )
        counts = np.bincount(kind[real], minlength=3)
        touched = np.concatenate([id_a, id_b]) if part.within else id_b
        parts.append(
            SplitLeaks(
                part.split_a,
                part.split_b,
                (int(counts[0]), int(counts[1]), int(counts[2])),
                int(np.sum(index.class_id[id_a] != index.class_id[id_b])),
                len(np.unique(touched)),
                len(rows[part.split_b]),
                part.num_crowded,
            )
        )
    unreadable = {image.sample_id: image for image in (*hashes.bad, *compared.bad)}
    return LeakSummary(
        index,
        tuple(part for part in parts if part.split_a != part.split_b),
        tuple(part for part in parts if part.split_a == part.split_b),
        joined_pairs(kept),
        int(np.sum(hashes.readable & ~hashes.telling)),
        tuple(unreadable[key] for key in sorted(unreadable)),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml leaks`."""
    parser.add_argument("dataset", help="folder of a packed or indexed data set")
    parser.add_argument(
        "--between",
        nargs="+",
        metavar="A:B",
        help="splits to compare; share of B counts (default: train with every other)",
    )
    parser.add_argument(
        "--within", nargs="*", metavar="SPLIT", help="splits to search for label conflicts (all)"
    )
    parser.add_argument(
        "--distance", type=int, default=DISTANCE, help="bits of the hash that may differ"
    )
    parser.add_argument(
        "--correlation", type=float, default=CORRELATION, help="from which images are copies"
    )
    parser.add_argument("--processes", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument(
        "--fail-above", type=float, metavar="SHARE", help="exit 1 if a larger share is affected"
    )
    parser.add_argument(
        "--exclude-from", metavar="SPLIT", help="put its leaking images into quarantine.parquet"
    )
    parser.add_argument("--html", metavar="FILE", help="write a web page with the worst pairs")
    parser.add_argument("--no-picture", action="store_true", help=f"draw no {PICTURE_FILE}")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml leaks`. Returns the exit code."""
    limit = arguments.fail_above
    if limit is not None and not 0 <= limit <= 1:
        raise UsageError(f"--fail-above={limit}: expected a share in 0..1")
    index = load_index(arguments.dataset)
    summary = report_leaks(
        index,
        arguments.processes,
        arguments.distance,
        not arguments.no_picture,
        arguments.correlation,
        None if arguments.between is None else [_two_splits(text) for text in arguments.between],
        arguments.within,
    )
    print(summary.text())
    written = [LEAKS_FILE, *([PICTURE_FILE] if (index.folder / PICTURE_FILE).exists() else [])]
    print(f"wrote {' and '.join(written)} in {index.folder}")
    if arguments.html:
        Path(arguments.html).write_text(web_page(summary), encoding="utf-8")
        print(f"wrote {arguments.html}")
    if arguments.exclude_from:
        added = exclude_leaks(summary, arguments.exclude_from)
        print(
            f"{index.folder / QUARANTINE_FILE}: {added:,} images of {arguments.exclude_from} added"
        )
    if limit is not None and summary.share > limit:
        print(f"leaks: a share of {summary.share:.4f} is affected, above --fail-above={limit}")
        return 1
    return 0


def _two_splits(text: str) -> tuple[str, str]:
    first, _, second = text.partition(":")
    if not first or not second or first == second:
        raise UsageError(f"--between {text}: expected two splits as A:B, such as train:test")
    return first, second
