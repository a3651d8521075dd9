"""Rows of classes in a checkpoint's files, by class id, without holding them all.

Dimensions: n rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_dml.checkpoint import flushed_entry
from dist_dml.checkpoint_manifest import Manifest

# Rows that are read at a time: pieces without a wanted row are passed over.
_PIECE_ROWS = 65_536
# Of a file of classes that is written.
_FILE_BYTES = 2**29


@dataclass(frozen=True)
class StoredClasses:
    """The class files of a verified checkpoint.

    Attributes:
        checkpoint: its folder.
        manifest: of it.
        layout: of every tensor with a row for each class: dtype, and the shape of a row.
        scalars: the other tensors, which are alike in all files.
    """

    checkpoint: Path
    manifest: Manifest
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def open(checkpoint: Path, manifest: Manifest) -> StoredClasses:
        """Read what kinds of rows there are; a loss of pairs has none."""
        layout, scalars = {}, {}
        _, _, name = sorted(manifest.class_files)[0]
        with safe_open(checkpoint / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                rows = file.get_slice(key)
                if rows.get_shape() == []:
                    scalars[key] = file.get_tensor(key)
                else:
                    layout[key] = rows[0:0].dtype, tuple(rows.get_shape()[1:])
        return StoredClasses(checkpoint, manifest, layout, scalars)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.manifest.num_classes

    @property
    def row_bytes(self) -> int:
        """Of everything that belongs to one class."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.layout.values())

    def take(self, key: str, ids: Int[np.ndarray, " n"]) -> Shaped[Tensor, "n *row"]:
        """The rows of some classes, in the order asked for. Holds them and one piece of a file.

        Args:
            key: of `layout`.
            ids: class ids, in any order and more than once if need be.
        """
        dtype, shape = self.layout[key]
        found = torch.zeros(len(ids), *shape, dtype=dtype)
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        for start, stop, name in self.manifest.class_files:
            if np.searchsorted(ordered, start) == np.searchsorted(ordered, stop):
                continue
            with safe_open(self.checkpoint / name, framework="pt") as file:
                rows = file.get_slice(key)
                for low in range(start, stop, _PIECE_ROWS):
                    high = min(low + _PIECE_ROWS, stop)
                    first, last = np.searchsorted(ordered, (low, high))
                    if first == last:
                        continue
                    piece = rows[low - start : high - start]
                    at = torch.from_numpy(ordered[first:last] - low)
                    found[torch.from_numpy(order[first:last])] = piece[at]
        return found


def cut_classes(num_classes: int, row_bytes: int) -> Iterator[tuple[int, int, str]]:
    """Start, stop and name of files of at most half a gibibyte each (or of one class)."""
    rows = max(1, _FILE_BYTES // max(1, row_bytes))
    starts = range(0, num_classes, rows)
    for number, start in enumerate(starts):
        name = f"classes-{number:05d}-of-{len(starts):05d}.safetensors"
        yield start, min(start + rows, num_classes), name


def write_class_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Write one file of classes. Returns its entry for the manifest."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return flushed_entry(path)
