"""`dist-dml pack hub`: an image set of Hugging Face `datasets`, from its Arrow or Parquet files.

The library itself is not needed; layouts: see `hub_files`. Images are a column of {bytes, path} or
of bytes, classes a column of `ClassLabel` numbers, integers or names.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.columns import add_common_arguments, image_extension
from dist_dml.data.pack.division import add_division_arguments, renamed_splits
from dist_dml.data.pack.hub_columns import HubColumns, choose_columns, label_texts
from dist_dml.data.pack.hub_division import RULES, HubDivision, divided
from dist_dml.data.pack.hub_files import Unit, blocks, find_splits, open_file, read_unit
from dist_dml.data.pack.image_files import encoders, shrink
from dist_dml.data.pack.writing import ShardPlan, plan_shards, write_shards
from dist_dml.errors import RunError, UsageError
from dist_dml.keyed_random import generator, key_of

VERSION = 1
_ROW = np.dtype([("unit", "<i4"), ("row", "<i4"), ("label", "<i4")])
_BLOCK = 64
_TAR_BYTES_PER_SAMPLE = 3072


_DIVISION = HubDivision()


def pack_hub(
    src: str | Path,
    out: str | Path,
    division: HubDivision = _DIVISION,
    image_column: str = "",
    label_column: str = "",
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
) -> Index:
    """Pack an image set of Hugging Face `datasets`; a class has its `ClassLabel` name.

    The source's units (row groups, record batches) come in a seeded order, rows in theirs: a unit
    is read once or a few times, and held in memory by each process.

    Args:
        src: folder of `save_to_disk`, of Parquet files, or one file.
        out: data set folder.
        division: see `HubDivision`.
        image_column: name; by default the one of type `Image`.
        label_column: name; by default the `ClassLabel` one.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.

    Raises:
        UsageError: there is no such data set, no such column, or a class is on both sides.
        RunError: an image is missing or none of the formats that are stored.
    """
    if division.rule not in RULES or shard_samples < 1:
        raise UsageError(
            f"--split-rule={division.rule} --shard-samples={shard_samples}: expected one of "
            f"{', '.join(RULES)}, and 1 or more"
        )
    found = find_splits(Path(src))
    names = renamed_splits(division.splits, list(found), str(src))
    files = {split: paths for split, paths in found.items() if split in names}
    units, columns = _survey(files, image_column, label_column)
    rows, labels = _rows(units, columns)
    splits = divided(str(src), units, rows, labels, names, division)
    sizes = {
        f"{split}/{path.name}": path.stat().st_size for split, ps in files.items() for path in ps
    }
    source = {
        "kind": "hub",
        "version": VERSION,
        "name": Path(src).resolve().name,
        **vars(division),
        "image_column": columns.image,
        "label_column": columns.label,
        "resize": resize,
        "shard_samples": shard_samples,
        "files": sizes,
    }
    shards = []
    for split, chosen in splits.items():
        order = generator(key_of(division.seed, "pack order " + split)).permutation(len(units))
        rank = np.argsort(order)[chosen["unit"]]
        shards += plan_shards(split, chosen[np.lexsort((chosen["row"], rank))], shard_samples)
    size = sum(sizes.values()) + _TAR_BYTES_PER_SAMPLE * sum(map(len, splits.values()))
    render = partial(_render, tuple(units), columns, tuple(labels), resize)
    return write_shards(Path(out), shards, render, source, encoders(resize), size, processes)


def _survey(
    files: Mapping[str, Sequence[Path]], image: str, label: str
) -> tuple[list[Unit], HubColumns]:
    """All units, and the columns, which must be the same in all files."""
    units: list[Unit] = []
    columns: HubColumns | None = None
    for split, paths in files.items():
        start = 0
        for path in paths:
            handle, counts = open_file(path)
            found = choose_columns(handle, path, image, label)
            if columns is not None and found != columns:
                raise UsageError(
                    f"{path}: its columns or class names differ from those of {units[0].file}; "
                    "they are not of one data set"
                )
            columns = found
            for number, count in enumerate(counts):
                units.append(Unit(str(path), number, split, start, count))
                start += count
    if columns is None or not sum(unit.rows for unit in units):
        raise UsageError(f"{next(iter(files), 'the data set')}: holds no row; nothing to pack")
    return units, columns


def _rows(units: Sequence[Unit], columns: HubColumns) -> tuple[np.ndarray, list[str]]:
    """A row per image, and the texts of the labels that occur, sorted."""
    codes: dict[str, int] = {}
    parts = []
    for file, members in groupby(enumerate(units), key=lambda member: member[1].file):
        handle, _ = open_file(Path(file))
        for number, unit in members:
            table = read_unit(handle, unit.number, [columns.label], Path(file))
            texts = label_texts(table[columns.label], columns, unit)
            part = np.empty(unit.rows, _ROW)
            part["unit"], part["row"] = number, np.arange(unit.rows)
            part["label"] = [codes.setdefault(text, len(codes)) for text in texts]
            parts.append(part)
    rows, labels = np.concatenate(parts), sorted(codes)
    place = np.empty(len(labels), np.int32)
    place[[codes[text] for text in labels]] = np.arange(len(labels))
    rows["label"] = place[rows["label"]]
    return rows, labels


def _render(
    units: Sequence[Unit],
    columns: HubColumns,
    labels: Sequence[str],
    resize: int,
    shard: ShardPlan,
) -> Iterator[dict[str, str | bytes]]:
    """The samples of one shard, unit by unit."""
    handles: dict[str, Any] = {}
    ids = {name: number for number, name in enumerate(columns.names)}
    members = np.asarray(shard.samples).tolist()
    for number, group in groupby(members, key=lambda member: member[0]):
        unit, chosen = units[number], list(group)
        path = Path(unit.file)
        if unit.file not in handles:
            handles[unit.file], _ = open_file(path)
        table = read_unit(handles[unit.file], unit.number, [columns.image, *columns.others], path)
        images = blocks(table, [int(row) for _, row, _ in chosen], _BLOCK)
        for values, (_, row, label) in zip(chain.from_iterable(images), chosen, strict=True):
            facts = {"label": labels[int(label)], "split": unit.split, "row": unit.start + int(row)}
            if columns.names:
                facts["label_id"] = ids[labels[int(label)]]
            yield _sample(values, columns, facts, resize, f"{path}: row {row} of unit {number}")


def _sample(
    values: Mapping[str, Any],
    columns: HubColumns,
    facts: Mapping[str, Any],
    resize: int,
    where: str,
) -> dict[str, str | bytes]:
    image = values[columns.image]
    data = image.get("bytes") if isinstance(image, dict) else image
    name = image.get("path") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        raise RunError(
            f"{where}: holds no image, only the path {name!r:.80}; save the data set with its "
            "images in it (push_to_hub and save_to_disk embed them)"
        )
    extension = image_extension(data)
    if not extension:
        raise RunError(f"{where}: is no JPEG, PNG or WebP image; convert it")
    if resize:
        data, extension, *_ = shrink(data, extension, resize, where)
    own = {**facts, "path": name} if name else facts
    others = {f"{n}_" if n in own else n: _plain(values[n]) for n in columns.others}
    return {
        "__key__": f"{facts['split']}/{facts['row']:08d}",
        extension: data,
        "cls": facts["label"].encode(),
        "json": json.dumps({**others, **own}, default=str).encode(),
    }


def _plain(value: Any) -> Any:
    """A value that JSON knows: there is no NaN in it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack hub`."""
    parser.add_argument("src", help="folder of save_to_disk or of Parquet files, or one file")
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument("--image-column", default="", help="(the one of type Image)")
    parser.add_argument("--label-column", default="", help="(the ClassLabel one, or label)")
    parser.add_argument(
        "--split-rule", choices=RULES, default="auto", help="own splits, or whole classes (auto)"
    )
    parser.add_argument("--splits", default="", help="theirs=ours,...: splits that are packed")
    add_division_arguments(parser, test_fraction=0.5, seen_per_class=2)
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack hub`. Returns the exit code."""
    a = arguments
    index = pack_hub(
        a.src,
        a.out,
        HubDivision(a.seed, a.split_rule, a.splits, a.test_fraction, a.seen_per_class),
        a.image_column,
        a.label_column,
        a.resize,
        a.shard_samples,
        a.processes,
    )
    print(describe(index))
    return 0
