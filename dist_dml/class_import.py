"""ENTRY: class weights from elsewhere into a run: exported ones, or Partial FC's files.

    dist-dml classes import runs/begun weights.parquet run.name=imported
    dist-dml classes import runs/begun work/checkpoint_gpu_*.pt run.name=imported

The first argument is a run (or checkpoint) of the model that goes on; a run of one step will do.
Its classes get the weights of the files, the optimizer forgets what it knew of them, and all else
stays. The result is a run folder with one checkpoint.

Files: `.parquet` (columns `name`, `weight`, `bias`), whose classes are found by name;
`.safetensors` (`weight`, `bias`), by class id; Partial FC's `softmax_fc_gpu_N.pt`,
`checkpoint_gpu_N.pt` and `rank_N_softmax_weight.pt`, a part of the classes each, in the order of N:
class i is the one whose name is the number i where all names are numbers, and the i-th one
otherwise. Pickles are read as plain tensors only (`weights_only`): what holds anything else is
refused.
"""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_dml.checkpoint import finish_checkpoint
from dist_dml.class_carry import find_checkpoint, known_names, open_catalogue, write_others
from dist_dml.class_mapping import NONE, map_classes
from dist_dml.class_store import StoredClasses, cut_classes, write_class_file
from dist_dml.config_loading import config_hash, resolve, to_yaml
from dist_dml.errors import UsageError

_PARTIAL_FC = re.compile(r"(?:softmax_fc_gpu_|checkpoint_gpu_|rank_)(\d+)(?:_softmax_weight)?\.pt$")
_WEIGHT, _BIAS = "weight", "bias"


@dataclass(frozen=True)
class Foreign:
    """Class weights of other files.

    Attributes:
        weight: (n, D), or (n, K * D) with all centres of a class.
        bias: (n,), where there is one.
        names: of the classes; None where rows are numbered.
    """

    weight: Float[Tensor, "n D"]
    bias: Float[Tensor, " n"] | None
    names: list[str] | None


def read_foreign(paths: Sequence[str]) -> Foreign:
    """The weights of one file, or of all of Partial FC's.

    Raises:
        UsageError: for files of another kind, a part that is missing, or one with more than
            tensors.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is not a file; give exported weights, or Partial FC's parts")
    suffix = files[0].suffix
    if suffix == ".pt":
        return _read_partial_fc(files)
    if len(files) > 1:
        raise UsageError(f"{files[1]}: only Partial FC's weights come in several files; give one")
    if suffix == ".parquet":
        return _read_parquet(files[0])
    if suffix == ".safetensors":
        try:
            found = load_file(files[0])
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{files[0]} cannot be read ({error}); export it again") from None
        if _WEIGHT not in found:
            raise UsageError(f"{files[0]} has no tensor `weight`, it has {', '.join(found)}")
        return Foreign(found[_WEIGHT].flatten(1), found.get(_BIAS), None)
    raise UsageError(f"{files[0]} is none of .parquet, .safetensors and .pt; see `--help`")


def _read_parquet(path: Path) -> Foreign:
    try:
        table = pyarrow.parquet.read_table(path)
        names = table["name"].to_pylist()
        column = table[_WEIGHT].combine_chunks()
        width = column.type.list_size
        weight = torch.from_numpy(np.array(column.flatten())).view(-1, width)
    except (OSError, pyarrow.ArrowException, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is no file of `dist-dml classes export` ({error}); it needs the columns name "
            "and weight, lists of one length"
        ) from None
    bias = None
    if _BIAS in table.column_names:
        bias = torch.from_numpy(np.array(table[_BIAS].combine_chunks()))
    return Foreign(weight, bias, names)


def _read_partial_fc(files: Sequence[Path]) -> Foreign:
    numbered = {}
    for file in files:
        found = _PARTIAL_FC.search(file.name)
        if not found:
            raise UsageError(
                f"{file.name} is not named as Partial FC's files (softmax_fc_gpu_N.pt, "
                "checkpoint_gpu_N.pt, rank_N_softmax_weight.pt); give those of all N"
            )
        numbered[int(found.group(1))] = file
    if sorted(numbered) != list(range(len(files))):
        raise UsageError(
            f"Partial FC's parts are numbered {', '.join(map(str, sorted(numbered)))}; give each "
            f"of 0 to {max(numbered)} once"
        )
    parts = [_partial_fc_weight(numbered[number]) for number in range(len(files))]
    if len({part.shape[1] for part in parts}) > 1:
        widths = ", ".join(f"{part.shape[1]} in {numbered[i].name}" for i, part in enumerate(parts))
        raise UsageError(f"Partial FC's parts have different widths: {widths}")
    return Foreign(torch.cat(parts), None, None)


def _partial_fc_weight(path: Path) -> Float[Tensor, "n D"]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0][:150]
        raise UsageError(
            f"{path} cannot be read as plain tensors ({reason}); nothing else is ever unpickled: "
            "save its weights alone, or as safetensors"
        ) from None
    if isinstance(found, dict):
        # Version 2 saves the module beside the backbone, version 1 the module or its weight.
        found = found.get("state_dict_softmax_fc", found)
    if isinstance(found, dict):
        found = found.get(_WEIGHT)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise UsageError(f"{path} has no matrix `weight` (or state_dict_softmax_fc.weight) in it")
    return found.float()


def import_classes(arguments: argparse.Namespace) -> Path:
    """Write the new run folder. Returns its checkpoint.

    Raises:
        UsageError: for files, a checkpoint or a folder that cannot be used.
    """
    files = [word for word in arguments.rest if "=" not in word or Path(word).is_file()]
    overrides = [word for word in arguments.rest if word not in files]
    if not files:
        raise UsageError("no file of weights is given; see `dist-dml classes import --help`")
    foreign = read_foreign(files)
    checkpoint, manifest = find_checkpoint(arguments.checkpoint)
    stored_yaml = str(checkpoint / "config.yaml")
    before = resolve(stored_yaml, []).config
    config = resolve(stored_yaml, ["run.resume=auto", *overrides]).config
    folder = Path(config.run.root) / config.run.name
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; choose another run.name for the imported weights")
    stored = StoredClasses.open(checkpoint, manifest)
    if _WEIGHT not in stored.layout:
        raise UsageError(f"{checkpoint} has no class weights to replace: its loss has none")
    width = int(np.prod(stored.layout[_WEIGHT][1]))
    if foreign.weight.shape[1] != width:
        raise UsageError(
            f"{files[0]} has weights of {foreign.weight.shape[1]} numbers a class, and "
            f"{checkpoint} of {width}; set model.embedding_dim (and loss.centres) alike"
        )
    names = known_names(open_catalogue(before, manifest, checkpoint), manifest.num_classes)
    source = _sources(foreign, names, files[0])
    found = int((source != NONE).sum())
    print(
        f"{len(foreign.weight):,} classes in the files; {found:,} of {len(names):,} get their "
        "weights",
        file=sys.stderr,
    )
    final = folder / "checkpoints" / checkpoint.name
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir(parents=True)
    try:
        parts, written = [], {}
        for start, stop, name in cut_classes(stored.num_classes, stored.row_bytes):
            ids = np.arange(start, stop)
            tensors = {
                key: _imported_rows(stored, key, ids, source[ids], foreign) for key in stored.layout
            }
            written[name] = write_class_file(temporary / name, {**tensors, **stored.scalars})
            parts.append((start, stop, name))
        written |= write_others(temporary, checkpoint, manifest, None, config)
        contents = replace(
            manifest,
            config_hash=config_hash(config),
            class_files=parts,
            files=written,
            progress=replace(manifest.progress, best_score=None, best_step=None),
        )
        finish_checkpoint(temporary, final, contents)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return final


def _sources(foreign: Foreign, names: list[str], file: str) -> Int[np.ndarray, " C"]:
    """The row of the files for each class; `NONE` for classes that they lack."""
    if foreign.names is not None:
        found = map_classes(foreign.names, names).source
        if (found == NONE).all():
            raise UsageError(f"{file} has no class of the run's catalogue (first: {names[0]!r})")
        return found
    count = len(foreign.weight)
    if all(name.isdecimal() for name in names):
        numbers = np.array([int(name) for name in names], np.int64)
        if (numbers >= count).any():
            raise UsageError(
                f"{file} has {count:,} classes, and the run's catalogue has one called "
                f"{names[int(np.argmax(numbers))]}; give the files that belong to it"
            )
        return numbers
    if count != len(names):
        raise UsageError(
            f"{file} has {count:,} classes without names, and the run has {len(names):,}; they "
            "must be as many"
        )
    return np.arange(count)


def _imported_rows(
    stored: StoredClasses,
    key: str,
    ids: Int[np.ndarray, " n"],
    source: Int[np.ndarray, " n"],
    foreign: Foreign,
) -> Tensor:
    rows = stored.take(key, ids)
    at = torch.from_numpy(np.flatnonzero(source != NONE))
    given = torch.from_numpy(source[source != NONE])
    if key == _WEIGHT:
        rows[at] = foreign.weight[given].view(-1, *rows.shape[1:]).to(rows)
    elif key == _BIAS and foreign.bias is not None:
        rows[at] = foreign.bias[given].to(rows)
    elif "|" in key:
        rows[at] = 0
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument(
        "rest", nargs="+", metavar="FILE|section.key=value", help="weights, and run.name"
    )


def run(arguments: argparse.Namespace) -> int:
    """Import. Returns the exit code."""
    final = import_classes(arguments)
    config = final.parents[1] / "config.yaml"
    print(f"{final}\ngo on with: dist-dml train --config {config} --resume auto")
    return 0
