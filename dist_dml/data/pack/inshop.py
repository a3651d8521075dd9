"""`dist-dml pack inshop`: DeepFashion's In-Shop Clothes Retrieval, with its own query and gallery.

The only one of the common benchmarks whose queries are searched in a gallery of other images: the
splits are `train`, `query` and `gallery`. The images are those of `img.zip` (256 x 256 pixels);
`img_highres` is another data set, with which published scores cannot be compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_dml.data.index import Index
from dist_dml.data.pack.image_files import ImageSample, Tree, find_tree, open_tree, unique_keys
from dist_dml.data.pack.listed_images import (
    PackOptions,
    Published,
    add_pack_arguments,
    note,
    pack_listed,
    run_packer,
)
from dist_dml.data.pack.official_lists import four_numbers, read_table, whole_number
from dist_dml.errors import UsageError

PUBLISHED = Published(
    kind="inshop",
    version=1,
    title="In-Shop Clothes Retrieval",
    counts={"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)},
)
_LIST, _BOXES = "Eval/list_eval_partition.txt", "Anno/list_bbox_inshop.txt"
_COLUMNS = "image_name item_id evaluation_status"
_BOX_COLUMNS = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
_LAYOUT = f"{_LIST}, {_BOXES} and Img/img/WOMEN/ (or Img/img.zip)"


def pack_inshop(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    strict_counts: bool = False,
    skip_missing: bool = False,
) -> Index:
    """Pack In-Shop with its official splits `train`, `query` and `gallery`.

    The label is the item's id. The `.json` has `item_id` and, if the list of boxes is there,
    `clothes_type`, `pose_type` and `box`.

    Args:
        src: the folder with `Eval/` and `Img/`, the one it lies in, or a zip of it. `img.zip` need
            not be extracted.
        out: data set folder.
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that are listed and not there.

    Raises:
        UsageError: another layout, a missing file, a damaged list, an item that is trained on and
            searched for, or see `pack_listed`.
        RunError: an image cannot be read, or not decoded where it is resized.
    """
    options = PackOptions(seed, resize, shard_samples, processes, strict_counts, skip_missing)
    tree = find_tree(Path(src), (_LIST,), _LAYOUT)
    splits = _splits(tree)
    return pack_listed(Path(out), _images(tree), PUBLISHED, splits, options)


def _images(tree: Tree) -> Tree:
    """Where the paths of the list start: the folder, or the zip, that holds `img/`."""
    for folder in ("Img", ""):
        parent = tree.below(folder)
        if parent.below("img").folders():
            return parent
        if not tree.zipped and parent.size("img.zip") > 0:
            return open_tree(Path(parent.where("img.zip")), _LAYOUT)
    other = "img_highres" in {*tree.folders(), *tree.below("Img").folders()}
    hint = " (img_highres is another data set)" if other else ""
    raise UsageError(f"{tree.where('Img/img')}: no such folder{hint}; expected {_LAYOUT}")


def _splits(tree: Tree) -> dict[str, list[ImageSample]]:
    """The samples by split, in the order of the list."""
    facts = _annotations(tree)
    table = read_table(tree, _LIST, _COLUMNS, header=True, counted=True)
    splits: dict[str, list[ImageSample]] = {name: [] for name in PUBLISHED.counts}
    keys = unique_keys(row[0] for _, row in table)
    for key, (where, (path, item, status)) in zip(keys, table, strict=True):
        if status not in splits:
            raise UsageError(
                f"{where}: status {status[:20]!r}, expected {', '.join(splits)}; correct the file"
            )
        described, box = facts.get(path, ({}, None))
        splits[status].append(ImageSample(key, item, path, {"item_id": item, **described}, box))
    searched = {sample.label for sample in splits["gallery"]}
    lone = sorted({sample.label for sample in splits["query"]} - searched)
    if lone:
        note(f"{tree.where(_LIST)}: {len(lone)} query items are not in the gallery ({lone[0]})")
    return splits


def _annotations(
    tree: Tree,
) -> dict[str, tuple[dict[str, int], tuple[float, float, float, float]]]:
    """Types and box of each image, by path; metadata that training does not need."""
    if tree.size(_BOXES) < 0:
        note(f"{tree.where(_BOXES)}: no such file, so the samples have no box")
        return {}
    found = {}
    for where, row in read_table(tree, _BOXES, _BOX_COLUMNS, header=True, counted=True):
        left, top, right, bottom = four_numbers(row[3:], where)
        types = {
            "clothes_type": whole_number(row[1], where, lowest=0),
            "pose_type": whole_number(row[2], where, lowest=0),
        }
        found[row[0]] = types, (left, top, right - left, bottom - top)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack inshop`."""
    add_pack_arguments(parser, f"folder with {_LAYOUT}")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack inshop`. Returns the exit code."""
    return run_packer(pack_inshop, arguments)
