"""Relative labels: a file that says in which sets the images of each class are.

A class of the index is then the finest thing that is told apart; it may have a single image.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

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
    found = _read(path)
    missing = [name for name in class_names if name not in found.sets]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(
            f"loss.label_sets={path} has no row for class {missing[0]!r}{more} of the training "
            "split; give each class a row (empty cells put it into no set)"
        )
    columns, counts = [], []
    for place, column in enumerate(found.columns):
        texts = [found.sets[name][place] for name in class_names]
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


class _File:
    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self.sets: dict[str, list[str]] = {}


def _read(path: str) -> _File:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"loss.label_sets={path} cannot be read ({reason}); give the path of a CSV file with "
            f"the header {_CLASS},NAME,..."
        ) from None
    rows = list(csv.reader(text.splitlines()))
    head = rows[0] if rows else []
    if head[:1] != [_CLASS] or len(head) < 2:
        raise UsageError(
            f"loss.label_sets={path} begins with {','.join(head)!r}; expected the header "
            f"{_CLASS},NAME,... with a name for each column of sets"
        )
    file = _File(head[1:])
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(head):
            raise UsageError(
                f"loss.label_sets={path}, line {number} has {len(row)} cells, and the header has "
                f"{len(head)}; mend it there"
            )
        if row[0] in file.sets:
            raise UsageError(
                f"loss.label_sets={path}, line {number}: class {row[0]!r} is there twice; keep one"
            )
        file.sets[row[0]] = [cell.strip() for cell in row[1:]]
    return file
