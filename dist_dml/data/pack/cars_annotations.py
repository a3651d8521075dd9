"""Cars196's annotations in the three layouts that the data set is passed on in.

* classic: `cars_annos.mat` (images, classes and names in one) and `car_ims/000001.jpg`;
* devkit: `cars_train/`, `cars_test/`, and `devkit/` with `cars_train_annos.mat`, `cars_meta.mat`
  (names) and `cars_test_annos_withlabels.mat`, which is also found beside `devkit/`;
* by class: `names.csv`, `anno_train.csv`, `anno_test.csv` without headers, and
  `car_data/car_data/{train,test}/CLASS NAME/00001.jpg`.

The `.mat` files are read by `matlab_files`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_dml.data.pack.image_files import Tree, open_tree
from dist_dml.data.pack.matlab_files import Value, read_structs, read_texts
from dist_dml.data.pack.official_lists import four_numbers, read_lines, whole_number
from dist_dml.errors import UsageError

LAYOUT = (
    "cars_annos.mat and car_ims/; or cars_train/, cars_test/ and devkit/ with "
    "cars_test_annos_withlabels.mat; or names.csv, anno_train.csv, anno_test.csv and car_data/"
)
_CLASSIC, _TRAIN, _TEST = "cars_annos.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat"
_META = "cars_meta.mat"
_DEVKITS = ("devkit/", "", "car_devkit/devkit/")
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
_Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class CarRow:
    """One annotation: the image's path, its class 1..196, its part, left, top, right, bottom."""

    path: str
    class_id: int
    part: str
    corners: _Corners


@dataclass(frozen=True)
class Cars:
    """The data set as it was found: where the paths start, all rows, the name of class i + 1."""

    tree: Tree
    rows: Sequence[CarRow]
    names: Sequence[str]


def find_cars(src: Path) -> Cars:
    """Read the annotations in `src`, or in a folder directly below it, whichever layout they have.

    Where several are complete, the first in the order of this module's text is taken.

    Raises:
        UsageError: there is none, a file is missing, or an annotation is damaged.
    """
    top = open_tree(src, LAYOUT)
    trees = [top, *(top.below(folder) for folder in top.folders())]
    for tree in trees:
        if tree.size(_CLASSIC) > 0 and "car_ims" in tree.folders():
            return _classic(tree)
    for tree in trees:
        for devkit in _DEVKITS:
            if tree.size(devkit + _TRAIN) > 0:
                return _devkit(tree, devkit)
    for tree in trees:
        if tree.size("anno_train.csv") > 0:
            return _by_class(tree)
    for tree in trees:
        if tree.size(_CLASSIC) > 0:
            raise UsageError(f"{tree.where('car_ims')}: no such folder; expected {LAYOUT}")
        if "car_ims" in tree.folders():
            raise UsageError(f"{tree.where(_CLASSIC)}: no such file; expected {LAYOUT}")
    raise UsageError(f"{src}: holds no annotations of Cars196; expected {LAYOUT}")


def _classic(tree: Tree) -> Cars:
    names = read_texts(_matlab_file(tree, _CLASSIC), "class_names", tree.where(_CLASSIC))
    rows = []
    for where, row in _annotations(tree, _CLASSIC, ("relative_im_path", "class", "test")):
        path = _text(row, "relative_im_path", where)
        part = "test" if _number(row, "test", where) else "train"
        rows.append(CarRow(path, _class_id(row, where, len(names)), part, _corners(row, where)))
    return Cars(tree, rows, names)


def _devkit(tree: Tree, devkit: str) -> Cars:
    test = next((d + _TEST for d in (devkit, *_DEVKITS) if tree.size(d + _TEST) > 0), "")
    if not test:
        without = tree.size(devkit + "cars_test_annos.mat") > 0
        hint = " (cars_test_annos.mat has no classes)" if without else ""
        raise UsageError(f"{tree.where(devkit + _TEST)}: no such file{hint}; expected {LAYOUT}")
    meta = devkit + _META
    names = read_texts(_matlab_file(tree, meta), "class_names", tree.where(meta))
    rows = []
    for part, file in (("train", devkit + _TRAIN), ("test", test)):
        # Archives that were packed a second time have a folder of the same name inside.
        folder = f"cars_{part}"
        inner = f"{folder}/" if folder in tree.below(folder).folders() else ""
        for where, row in _annotations(tree, file, ("fname", "class")):
            path = f"{folder}/{inner}{_text(row, 'fname', where)}"
            rows.append(CarRow(path, _class_id(row, where, len(names)), part, _corners(row, where)))
    return Cars(tree, rows, names)


def _by_class(tree: Tree) -> Cars:
    names = read_lines(tree, "names.csv")
    inner = "car_data/car_data" if tree.below("car_data/car_data").folders() else "car_data"
    rows = []
    for part in ("train", "test"):
        file = f"anno_{part}.csv"
        lines = csv.reader(io.StringIO("\n".join(read_lines(tree, file))))
        for number, fields in enumerate(lines, 1):
            where = f"{tree.where(file)} line {number}"
            if len(fields) != 6:
                raise UsageError(
                    f"{where}: has {len(fields)} columns, expected fname,x1,y1,x2,y2,class; get "
                    "the file again"
                )
            class_id = whole_number(fields[5].strip(), where, highest=len(names))
            folder = names[class_id - 1].replace("/", "-")
            path = f"{inner}/{part}/{folder}/{fields[0]}"
            rows.append(CarRow(path, class_id, part, four_numbers(fields[1:5], where)))
    return Cars(tree, rows, names)


def _matlab_file(tree: Tree, name: str) -> bytes:
    if tree.size(name) < 0:
        raise UsageError(f"{tree.where(name)}: no such file; expected {LAYOUT}")
    return tree.read(name)


def _annotations(
    tree: Tree, name: str, fields: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Value]]]:
    """The rows of `annotations`, and how messages call them (Matlab counts from 1)."""
    where = tree.where(name)
    rows = read_structs(_matlab_file(tree, name), "annotations", (*fields, *_CORNERS), where)
    return ((f"{where} annotation {number}", row) for number, row in enumerate(rows, 1))


def _text(row: Mapping[str, Value], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UsageError(f"{where}: {field} is {value}, expected a text; get the official file")
    return value


def _number(row: Mapping[str, Value], field: str, where: str) -> float:
    value = row[field]
    if isinstance(value, str) or not math.isfinite(value):
        raise UsageError(f"{where}: {field} is {value}, expected a number; get the official file")
    return float(value)


def _class_id(row: Mapping[str, Value], where: str, num_classes: int) -> int:
    return whole_number(f"{_number(row, 'class', where):g}", where, highest=num_classes)


def _corners(row: Mapping[str, Value], where: str) -> _Corners:
    left, top, right, bottom = (_number(row, name, where) for name in _CORNERS)
    return left, top, right, bottom
