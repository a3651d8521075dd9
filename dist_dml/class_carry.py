"""ENTRY: go on with other classes: a checkpoint's classes carried into another catalogue.

    dist-dml classes carry runs/old run.name=new data.path=datasets/new
    dist-dml train --config runs/new/config.yaml --resume auto

Classes of equal name keep their weights and optimizer state, to the bit; classes that the new data
set lacks are dropped; new ones begin from the embeddings of a few of their images. `--mapping`
renames, merges and drops. The result is a run folder with one checkpoint, at the same share of the
same epoch.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_dml.checkpoint import SHARED, finish_checkpoint, flushed_entry
from dist_dml.checkpoint_manifest import Manifest, newest_checkpoint, verify_checkpoint
from dist_dml.class_beginnings import NewRows
from dist_dml.class_mapping import NONE, ClassMapping, map_classes, read_renames
from dist_dml.class_store import StoredClasses, cut_classes, write_class_file
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, resolve, to_yaml
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError
from dist_dml.resuming import step_in_plan
from dist_dml.training_run import planned


def find_checkpoint(text: str) -> tuple[Path, Manifest]:
    """A checkpoint by its own folder, or the newest intact one of a run folder.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = Path(text)
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise UsageError(f"{path} has no checkpoint yet; train it first")
        return newest
    return path, verify_checkpoint(path)


def open_catalogue(config: Config, manifest: Manifest, checkpoint: Path) -> Index:
    """The data set that a checkpoint was trained on, for the names of its classes.

    Raises:
        UsageError: it is not there, or is another one by now.
    """
    try:
        index = open_index(config.data)
    except UsageError as error:
        raise UsageError(
            f"{checkpoint} names its classes by the data set it was trained on, and {error}"
        ) from None
    if index.fingerprint != manifest.plan["fingerprint"]:
        raise UsageError(
            f"{config.data.path} has fingerprint {index.fingerprint}, and {checkpoint} was trained "
            f"on {manifest.plan['fingerprint']}: its class ids mean other classes; give the data "
            "set as it was with --catalogue PATH"
        )
    return index


def known_names(index: Index, num_classes: int) -> list[str]:
    """The names of a classifier's classes, by class id.

    Those that `data.num_classes` adds to the catalogue's have no images, and get a name by number.
    """
    names = list(index.class_names[: min(index.num_classes, num_classes)])
    return names + [f"\0class {number}" for number in range(len(names), num_classes)]


def carry(arguments: argparse.Namespace) -> Path:
    """Write the new run folder. Returns its checkpoint.

    Raises:
        UsageError: for a checkpoint, a catalogue, a mapping or a folder that cannot be used.
    """
    checkpoint, manifest = find_checkpoint(arguments.checkpoint)
    stored_yaml = str(checkpoint / "config.yaml")
    origin = [f"data.path={arguments.catalogue}"] if arguments.catalogue else []
    before = resolve(stored_yaml, origin).config
    config = resolve(stored_yaml, ["run.resume=auto", *arguments.overrides]).config
    folder = Path(config.run.root) / config.run.name
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; choose another run.name for the new classes")
    old = open_catalogue(before, manifest, checkpoint)
    new = open_index(config.data)
    _check_same_model(before, config)
    _, facts = planned(config, new)
    num_new = config.data.num_classes or new.num_classes
    new.check_labels(config.data.split, num_new)
    names, known = known_names(new, num_new), known_names(old, manifest.num_classes)
    mapping = map_classes(
        known, names, read_renames(arguments.mapping) if arguments.mapping else []
    )
    print(mapping.describe(), file=sys.stderr)
    if len(mapping.new) == len(names):
        raise UsageError(
            f"no class of {config.data.path} has the name of one of {before.data.path}; start a "
            "new training, or say what is what with --mapping"
        )
    stored = StoredClasses.open(checkpoint, manifest)
    _check_disk(folder, stored, num_new, checkpoint)
    start = NewRows(config, stored, mapping, new, checkpoint, arguments.images)
    progress = replace(
        manifest.progress,
        step=step_in_plan(manifest.progress.step, manifest.plan, facts),
        # A score on other data is no measure.
        best_score=None,
        best_step=None,
    )
    final = folder / "checkpoints" / f"step-{progress.step:09d}"
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir(parents=True)
    try:
        files, parts = _write_classes(temporary, stored, mapping, start)
        files |= write_others(temporary, checkpoint, manifest, mapping, config)
        written = Manifest(progress, facts, num_new, config_hash(config), parts, files)
        finish_checkpoint(temporary, final, written)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return final


def _check_same_model(before: Config, now: Config) -> None:
    """Refuse overrides that the stored tensors do not fit."""
    for section in ("model", "loss", "classes", "proxies"):
        ours, theirs = (getattr(c, section).model_dump() for c in (now, before))
        differing = [key for key in ours if ours[key] != theirs[key]]
        if differing:
            key = differing[0]
            raise UsageError(
                f"{section}.{key} {theirs[key]!r} -> {ours[key]!r}: carrying changes classes only; "
                "change it when training goes on, if its state allows"
            )


def _check_disk(folder: Path, stored: StoredClasses, num_new: int, checkpoint: Path) -> None:
    others = sum(path.stat().st_size for path in checkpoint.glob("[!c]*.safetensors"))
    needed = num_new * stored.row_bytes + others
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UsageError(
            f"the checkpoint of {num_new:,} classes takes {needed / 2**30:.3g} GiB and "
            f"{existing} has {free / 2**30:.3g} GiB free; free the disk or set run.root"
        )


def _write_classes(
    folder: Path, stored: StoredClasses, mapping: ClassMapping, start: NewRows
) -> tuple[dict[str, dict], list[tuple[int, int, str]]]:
    """All files of classes; holds one of them. Returns their entries and their cut."""
    files, parts = {}, []
    progress = ProgressLine("classes", len(mapping.source), "classes")
    for first, stop, name in cut_classes(len(mapping.source), stored.row_bytes):
        tensors = {
            key: carried_rows(stored, key, mapping, np.arange(first, stop), start.rows)
            for key in stored.layout
        }
        files[name] = write_class_file(folder / name, {**tensors, **stored.scalars})
        parts.append((first, stop, name))
        progress.advance(stop - first)
    progress.finish()
    return files, parts


def carried_rows(
    stored: StoredClasses,
    key: str,
    mapping: ClassMapping,
    ids: Int[np.ndarray, " n"],
    new_rows: Callable[[str, Int[np.ndarray, " m"]], Tensor | None],
) -> Tensor:
    """One tensor's rows of some new classes: as they were, means of merged ones, or new.

    Args:
        stored: the old rows.
        key: the tensor.
        mapping: from which classes.
        ids: a range of new class ids, ascending.
        new_rows: rows of classes without a source; None for zeros.
    """
    source = mapping.source[ids]
    rows = stored.take(key, np.where(source == NONE, 0, source))
    fresh = np.flatnonzero(source == NONE)
    if len(fresh):
        begun = new_rows(key, ids[fresh])
        rows[torch.from_numpy(fresh)] = 0 if begun is None else begun
    merged = (mapping.merged_new >= ids[0]) & (mapping.merged_new <= ids[-1])
    if merged.any() and rows.dtype.is_floating_point:
        at = torch.from_numpy(mapping.merged_new[merged] - ids[0])
        others = stored.take(key, mapping.merged_old[merged])
        count = torch.ones(len(ids)).index_add(0, at, torch.ones(len(at)))
        total = rows.double().index_add(0, at, others.double())
        chosen = at.unique()
        shape = (-1, *[1] * (rows.ndim - 1))
        rows[chosen] = (total[chosen] / count[chosen].view(shape)).to(rows.dtype)
    return rows


def write_others(
    folder: Path, checkpoint: Path, manifest: Manifest, mapping: ClassMapping | None, config: Config
) -> dict[str, dict]:
    """Everything that is of no class; the labels of a cross-batch memory follow their classes.

    Args:
        folder: of the new checkpoint.
        checkpoint: the old one.
        manifest: its.
        mapping: of the classes; None if they stay.
        config: of the new run.

    Returns:
        Their entries for the manifest.
    """
    entries = {}
    class_files = {name for _, _, name in manifest.class_files}
    for name in manifest.files:
        if name in class_files or name == "config.yaml":
            continue
        if name == SHARED and mapping is not None:
            save_file(_carried_memory(load_file(checkpoint / name), mapping, config), folder / name)
        else:
            shutil.copyfile(checkpoint / name, folder / name)
        entries[name] = flushed_entry(folder / name)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    entries["config.yaml"] = flushed_entry(folder / "config.yaml")
    return entries


def _carried_memory(
    tensors: dict[str, Tensor], mapping: ClassMapping, config: Config
) -> dict[str, Tensor]:
    """Rows of dropped classes take no part any more."""
    labels = tensors.get("labels")
    if labels is None:
        return tensors
    moved = torch.from_numpy(mapping.first_new())
    known = (labels >= 0) & (labels < mapping.num_old) & (labels != config.loss.ignore_index)
    found = moved[torch.where(known, labels, 0)]
    none = config.loss.ignore_index
    found = torch.where(known & (found != NONE), found, none)
    return {**tensors, "labels": torch.where(known, found, labels)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="what to go on from")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="run.name and data.path of the new run, and what else changes",
    )
    parser.add_argument("--mapping", default="", metavar="FILE", help="CSV with the header old,new")
    parser.add_argument(
        "--images",
        type=int,
        default=5,
        metavar="N",
        help="images that a new class begins from (default 5); 0 draws it at random",
    )
    parser.add_argument(
        "--catalogue",
        default="",
        metavar="PATH",
        help="where the old data set lies now, if not at its data.path",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry the classes over. Returns the exit code."""
    final = carry(arguments)
    folder = final.parents[1]
    print(f"{final}\ngo on with: dist-dml train --config {folder / 'config.yaml'} --resume auto")
    return 0
