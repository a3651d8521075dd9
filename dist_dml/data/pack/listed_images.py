"""Data sets whose lists name every image: check what they promise, then pack.

Shared by the packers of CUB-200-2011, Cars196, Stanford Online Products and In-Shop. Published
counts, disjoint classes and the presence of every file are checked before the first byte is
written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.labels import TRAIN
from dist_dml.data.pack.image_files import ImageSample, Tree, encoders, render
from dist_dml.data.pack.writing import plan_shards, write_pack
from dist_dml.data.progress import ProgressLine
from dist_dml.data.shards import IMAGE_EXTENSIONS
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

Splits = Mapping[str, Sequence[ImageSample]]
"""The samples of each split, in the order of the official lists."""


@dataclass(frozen=True)
class Published:
    """What is known of an official data set.

    Attributes:
        kind: `source.kind` of the pack.
        version: of the packer: changes when the same files would give other samples.
        title: its name in messages.
        counts: images and classes of each split.
    """

    kind: str
    version: int
    title: str
    counts: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class PackOptions:
    """What all packers of listed images are asked.

    Attributes:
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that the lists name and that are not there.
    """

    seed: int
    resize: int
    shard_samples: int
    processes: int
    strict_counts: bool
    skip_missing: bool


def pack_listed(
    out: Path, tree: Tree, published: Published, splits: Splits, options: PackOptions
) -> Index:
    """Check the samples and write them, those of each split in a seeded order.

    Args:
        out: data set folder.
        tree: where the paths of the samples start.
        published: what the official data set is.
        splits: see `Splits`.
        options: see `PackOptions`.

    Raises:
        UsageError: a training class is in another split, an image is listed twice, missing, or has
            a path that leads out of the tree, or (strict) the counts are others.
        RunError: an image cannot be read, or cannot be decoded where it is resized.
    """
    if options.resize < 0 or options.shard_samples < 1 or options.processes < 0:
        raise UsageError(
            f"--resize={options.resize} --shard-samples={options.shard_samples} --processes="
            f"{options.processes}: expected 0 or more, 1 or more, 0 or more"
        )
    _check_paths(tree, splits)
    _check_disjoint(tree, splits)
    sizes = _sizes(tree, splits, options.skip_missing)
    present = {name: [s for s in side if s.path in sizes] for name, side in splits.items()}
    _check_counts(tree, published, present, options.strict_counts)
    shards = []
    for name, samples in present.items():
        order = generator(key_of(options.seed, "pack order " + name)).permutation(len(samples))
        shuffled = [samples[i] for i in order]
        shards += plan_shards(name, shuffled, options.shard_samples)
    source = {
        "kind": published.kind,
        "version": published.version,
        "seed": options.seed,
        "resize": options.resize,
        "shard_samples": options.shard_samples,
        "files": _listing_hash(present, sizes),
    }
    fill = partial(render, tree, options.resize)
    made_with = encoders(options.resize)
    return write_pack(out, shards, fill, source, made_with, sum(sizes.values()), options.processes)


def _check_paths(tree: Tree, splits: Splits) -> None:
    """Paths come from a downloaded list: they must stay below the tree, and name an image once."""
    seen: set[str] = set()
    for samples in splits.values():
        for sample in samples:
            parts = PurePosixPath(sample.path)
            if parts.is_absolute() or ".." in parts.parts or "\\" in sample.path:
                raise UsageError(
                    f"{tree.path}: a list names {sample.path[:80]!r}, which leads out of the data "
                    "set; get the official lists"
                )
            if sample.path.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                raise UsageError(
                    f"{tree.path}: a list names {sample.path[:80]!r}, expected one of "
                    f".{', .'.join(IMAGE_EXTENSIONS)}; get the official lists"
                )
            if sample.path in seen:
                raise UsageError(
                    f"{tree.where(sample.path)}: is listed twice; get the official lists"
                )
            seen.add(sample.path)


def _check_disjoint(tree: Tree, splits: Splits) -> None:
    """Retrieval scores are of classes that were never trained on."""
    trained = {sample.label: sample.path for sample in splits.get(TRAIN, ())}
    for name, samples in splits.items():
        both = {s.label: s.path for s in samples if name != TRAIN and s.label in trained}
        if both:
            label, path = next(iter(both.items()))
            raise UsageError(
                f"{tree.path}: class {label!r} is in train ({trained[label]}) and in {name} "
                f"({path}), {len(both)} such classes; get the official lists"
            )


def _sizes(tree: Tree, splits: Splits, skip_missing: bool) -> dict[str, int]:
    """Bytes of every image that is there and not empty, by path."""
    paths = [sample.path for samples in splits.values() for sample in samples]
    progress = ProgressLine("look for", float(len(paths)), "images")
    sizes = {}
    missing = []
    for path in paths:
        size = tree.size(path)
        progress.advance(1.0)
        if size > 0:
            sizes[path] = size
        else:
            missing.append(path)
    progress.finish()
    empty = [n for n, side in splits.items() if side and not any(s.path in sizes for s in side)]
    if missing and (empty or not skip_missing):
        whole = f", all of {empty[0]}" if empty else ""
        raise UsageError(
            f"{tree.where(missing[0])}: missing or empty, as {len(missing):,} of the {len(paths):,}"
            f" listed images{whole}; extract the images again, or leave some out with "
            "--skip-missing"
        )
    if missing:
        note(f"{tree.where(missing[0])}: left out, as {len(missing):,} images missing or empty")
    if not sizes:
        raise UsageError(f"{tree.path}: its lists name no image; get the official lists")
    return sizes


def _check_counts(tree: Tree, published: Published, splits: Splits, strict: bool) -> None:
    """Note, or refuse, other counts than the published ones."""
    differ = []
    for name, (images, classes) in published.counts.items():
        samples = splits.get(name, ())
        found = len(samples), len({sample.label for sample in samples})
        if found != (images, classes):
            differ.append(
                f"{name} has {found[0]:,} images of {found[1]:,} classes (published "
                f"{images:,} of {classes:,})"
            )
    if differ and strict:
        raise UsageError(
            f"{tree.path}: is not the whole {published.title}: {'; '.join(differ)}; get the "
            "official archive again, or pack it without --strict-counts"
        )
    if differ:
        note(
            f"{tree.path}: is not the whole {published.title}: {'; '.join(differ)}; its scores "
            "cannot be compared with published ones"
        )


def note(text: str) -> None:
    """One line for the user that is no failure, beside the progress on stderr."""
    print(f"note: {text}", file=sys.stderr)


def _listing_hash(splits: Splits, sizes: Mapping[str, int]) -> str:
    """Changes with any path, size, split, label or fact."""
    digest = hashlib.sha256()
    for name, samples in splits.items():
        for s in sorted(samples, key=lambda sample: sample.path):
            row = [name, s.path, sizes[s.path], s.key, s.label, dict(s.facts), s.box]
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]


def add_pack_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """The arguments of every packer of listed images.

    Args:
        parser: of the command.
        source: what its first argument is.
    """
    parser.add_argument("src", help=source)
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--resize", type=int, default=0, help="short side in pixels; 0 copies")
    parser.add_argument("--shard-samples", type=int, default=2048, help="images of a shard")
    parser.add_argument("--processes", type=int, default=0, help="writing processes; 0: all cores")
    parser.add_argument(
        "--strict-counts", action="store_true", help="refuse other counts than the published ones"
    )
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave listed images out that are not there"
    )


def run_packer(pack: Callable[..., Index], arguments: argparse.Namespace) -> int:
    """Call a packer with what `add_pack_arguments` declares. Returns the exit code."""
    index = pack(
        arguments.src,
        arguments.out,
        arguments.seed,
        arguments.resize,
        arguments.shard_samples,
        arguments.processes,
        arguments.strict_counts,
        arguments.skip_missing,
    )
    print(describe(index))
    return 0
