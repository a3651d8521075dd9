"""What packers of millions of images share: descriptions are rows of arrays, never an object each.

A *row* describes one image: an entry of a structured array, or of an array of texts.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.pack.image_files import Tree
from dist_dml.data.pack.listed_images import note
from dist_dml.data.pack.writing import Sample, ShardPlan, plan_shards
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

_EXAMPLES = 32
_MARGIN = 1.15
_FETCHED_BYTES = 50_000
"""Assumed of an image that is still to be fetched."""


def shuffled_shards(
    splits: Mapping[str, np.ndarray], seed: int, shard_samples: int
) -> list[ShardPlan]:
    """The shards of all splits, each split in a seeded order of its own: shards mix classes."""
    if shard_samples < 1:
        raise UsageError(f"--shard-samples={shard_samples}: expected 1 or more")
    shards = []
    for split, rows in splits.items():
        order = generator(key_of(seed, "pack order " + split)).permutation(len(rows))
        shards += plan_shards(split, rows[order], shard_samples)
    return shards


def estimated_bytes(render: Callable[[Any], Sample], shards: Sequence[ShardPlan]) -> int:
    """Bytes of all members, from a few samples of the first shard of each split.

    Renders them, so a source that cannot be read ends here, before anything is written.
    """
    firsts = [shard for shard in shards if shard.name.endswith("-000000.tar")]
    total = sum(len(shard.samples) for shard in shards)
    sizes = [
        sum(len(value) for name, value in render(sample).items() if name != "__key__")
        for shard in firsts
        for sample in shard.samples[:_EXAMPLES]
    ]
    return int(_MARGIN * total * sum(sizes) / max(len(sizes), 1))


def present(
    tree: Tree,
    splits: Mapping[str, np.ndarray],
    path_of: Callable[[str, Any], str],
    skip_missing: bool,
) -> tuple[dict[str, np.ndarray], int]:
    """The rows whose image is there and not empty, and the bytes of these images.

    Costs a `stat` of each image: 2 us in a local folder (2026-11).

    Args:
        tree: where the paths start.
        splits: rows by split.
        path_of: path of an image from its split and its row; "" if it is fetched from elsewhere.
        skip_missing: leave rows without an image out, with a note, instead of refusing.

    Raises:
        UsageError: names the first image that is missing, if it is not skipped; or a split has no
            image at all.
    """
    listed = sum(map(len, splits.values()))
    progress = ProgressLine("look for", float(listed), "images")
    found, total, missing, first = {}, 0, 0, ""
    for split, rows in splits.items():
        here = np.ones(len(rows), bool)
        for number, row in enumerate(rows):
            path = path_of(split, row)
            size = tree.size(path) if path else _FETCHED_BYTES
            progress.advance(1.0)
            if size <= 0:
                first, here[number] = first or path, False
                missing += 1
            total += max(size, 0)
        found[split] = rows[here]
    progress.finish()
    empty = [split for split, rows in found.items() if not len(rows)]
    if empty and not missing:
        raise UsageError(
            f"{tree.path}: its lists name no image of {empty[0]}; get the official ones"
        )
    if missing and (empty or not skip_missing):
        whole = f", all of {empty[0]}" if empty else ""
        raise UsageError(
            f"{tree.where(first)}: missing or empty, as {missing:,} of the {listed:,} listed images"
            f"{whole}; extract the images again, or leave some out with --skip-missing"
        )
    if missing:
        note(f"{tree.where(first)}: left out, as {missing:,} images missing or empty")
    return found, total


def image_extension(data: bytes) -> str:
    """The extension that the first bytes of an image call for; "" for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that these packers share, after those that say what is packed."""
    parser.add_argument("--seed", type=int, default=0, help="of division and order")
    parser.add_argument("--resize", type=int, default=0, help="short side in pixels; 0 copies")
    parser.add_argument("--shard-samples", type=int, default=2048, help="images of a shard")
    parser.add_argument("--processes", type=int, default=0, help="writing processes; 0: all cores")


def add_official_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of data sets whose images are listed and counted officially."""
    parser.add_argument(
        "--strict-counts", action="store_true", help="refuse other counts than the published ones"
    )
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave listed images out that are not there"
    )
