"""Relative labels: a file that says in which sets the images of each class are.

A class of the index is then the finest thing that is told apart; it may have a single image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_dml.data.csv_rows import csv_rows
from dist_dml.errors import UsageError
from dist_dml.losses.pair_objectives import LabelSets

_CLASS = "class"


def read_label_sets(path: str, class_names: Sequence[str], ignored: int) -> LabelSets:
    """The set of each class in each column, as numbers from 0 in the order of their names.

    The file is CSV with a header: `class`, then a name for each column of sets. An empty cell puts
    a class into no set of its column. Rows of classes that are not asked for are passed over.

    Args:
        path: of the file.
        class_names: of the training classes, by class id.
        ignored: what stands for no set.

    Raises:
        UsageError: the file cannot be read or has no columns, a class is missing or is there twice,
            or a column has fewer than two sets.
    """
    names, of_class = _read(path)
    missing = [name for name in class_names if name not in of_class]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(
            f"loss.label_sets={path} has no row for class {missing[0]!r}{more} of the training "
            "split; give each class a row (empty cells put it into no set)"
        )
    columns, counts = [], []
    for place, column in enumerate(names):
        texts = [of_class[name][place] for name in class_names]
        # A number that stands for no set is passed over.
        free = (number for number in itertools.count() if number != ignored)
        numbers = dict(zip(sorted(set(texts) - {""}), free, strict=False))
        if len(numbers) < 2:
            raise UsageError(
                f"loss.label_sets={path}: column {column!r} puts the training classes into "
                f"{len(numbers)} set(s), and nothing can be told apart by it; remove the column"
            )
        columns.append([numbers.get(text, ignored) for text in texts])
        counts.append(len(numbers))
    return LabelSets(torch.tensor(columns, dtype=torch.int64), tuple(counts))


def _read(path: str) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The columns after `class`, and the sets of each class in them."""
    columns: tuple[str, ...] = ()
    found: dict[str, list[str]] = {}
    for where, row in csv_rows(Path(path)):
        head, *rest = row
        if head != _CLASS or not rest:
            raise UsageError(
                f"loss.label_sets={path} has the header {','.join(row)}; expected "
                f"{_CLASS},NAME,... with a name for each column of sets"
            )
        if row[_CLASS] in found:
            raise UsageError(
                f"{where} of loss.label_sets: class {row[_CLASS]!r} is there twice; keep one"
            )
        columns = tuple(rest)
        found[row[_CLASS]] = [row[name].strip() for name in rest]
    if not found:
        raise UsageError(
            f"loss.label_sets={path} has no rows; give each class one, below the header "
            f"{_CLASS},NAME,..."
        )
    return columns, found
