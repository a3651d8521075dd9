"""ENTRY: class weights of a checkpoint as a file that others read.

    dist-dml classes export runs/demo weights.parquet
    dist-dml classes export runs/demo weights.safetensors

Parquet has a row for each class (`class_id`, `name`, `weight`, `bias` where there is one) and is
written piece by piece; safetensors has the tensors alone, rows by class id. `weight` holds all
centres of a class, one behind the other.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors.torch import save_file

from dist_dml.class_carry import find_checkpoint, known_names, open_catalogue
from dist_dml.class_store import StoredClasses
from dist_dml.config_loading import resolve
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError
from dist_dml.usable import usable_memory

_GROUP_ROWS = 65_536
_KEYS = ("weight", "bias", "proxies")


def export(arguments: argparse.Namespace) -> Path:
    """Write the file, whole or not at all. Returns its path.

    Raises:
        UsageError: for a checkpoint without class weights, a suffix that is none of both, or too
            little disk or memory.
    """
    out = Path(arguments.out)
    if out.suffix not in (".parquet", ".safetensors"):
        raise UsageError(f"{out} is neither .parquet nor .safetensors; name the file so")
    checkpoint, manifest = find_checkpoint(arguments.checkpoint)
    stored = StoredClasses.open(checkpoint, manifest)
    keys = [key for key in _KEYS if key in stored.layout]
    if not keys:
        raise UsageError(f"{checkpoint} has no class weights: its loss is one of pairs")
    size = stored.num_classes * sum(
        stored.layout[key][0].itemsize * int(np.prod(stored.layout[key][1])) for key in keys
    )
    free = shutil.disk_usage(out.absolute().parent).free
    if size > free:
        raise UsageError(
            f"{out} takes about {size / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free; free "
            "the disk or name another one"
        )
    temporary = out.with_name(out.name + ".tmp")
    try:
        if out.suffix == ".parquet":
            origin = [f"data.path={arguments.catalogue}"] if arguments.catalogue else []
            config = resolve(str(checkpoint / "config.yaml"), origin).config
            names = known_names(open_catalogue(config, manifest, checkpoint), manifest.num_classes)
            _write_parquet(temporary, stored, keys, names)
        else:
            memory = usable_memory()
            if size > memory:
                raise UsageError(
                    f"{out} is held in memory while it is written: {size / 2**30:.3g} GiB, and "
                    f"{memory / 2**30:.3g} GiB are available; export to .parquet instead"
                )
            every = np.arange(stored.num_classes)
            save_file({key: stored.take(key, every) for key in keys}, temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _write_parquet(path: Path, stored: StoredClasses, keys: list[str], names: list[str]) -> None:
    progress = ProgressLine("export", stored.num_classes, "classes")
    writer = None
    try:
        for start in range(0, stored.num_classes, _GROUP_ROWS):
            ids = np.arange(start, min(start + _GROUP_ROWS, stored.num_classes))
            columns: dict[str, pa.Array] = {
                "class_id": pa.array(ids),
                "name": pa.array(names[ids[0] : ids[-1] + 1], pa.string()),
            }
            for key in keys:
                rows = stored.take(key, ids).float()
                flat = pa.array(rows.flatten().numpy())
                width = rows[0].numel()
                columns[key] = (
                    flat if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
                )
            table = pa.table(columns)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            progress.advance(len(ids))
    finally:
        if writer is not None:
            writer.close()
    progress.finish()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("out", metavar="OUT", help="FILE.parquet or FILE.safetensors")
    parser.add_argument(
        "--catalogue",
        default="",
        metavar="PATH",
        help="where the data set lies now, if not at its data.path (for the names)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export. Returns the exit code."""
    out = export(arguments)
    print(f"{out}: {out.stat().st_size / 2**20:,.1f} MiB")
    return 0
