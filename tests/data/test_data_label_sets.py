"""Files of relative labels: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_dml.data.label_sets import read_label_sets
from dist_dml.errors import UsageError

NONE = -100


def write(folder: Path, text: str) -> str:
    path = folder / "sets.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_class_has_a_set_in_each_labelling_or_none(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'class,kind,hue\ndog,animal,\noak,plant,green\n"moss, old",plant,green\nfox,animal,red\n',
    )
    found = read_label_sets(path, ["fox", "moss, old", "dog"], NONE)
    # Rows of other classes (oak) and the order of the file play no part.
    assert found.sets.tolist() == [[0, 1, 0], [1, 0, NONE]]
    assert found.counts == (2, 2)


def test_a_set_never_has_the_number_that_stands_for_none(tmp_path: Path) -> None:
    path = write(tmp_path, "class,kind\na,x\nb,y\nc,\nd,z\n")
    found = read_label_sets(path, ["a", "b", "c", "d"], 1)
    assert found.sets.tolist() == [[0, 2, 1, 3]]
    assert found.counts == (3,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ("label,kind\na,x\n", "has the header label,kind; expected class,NAME"),
        ("class\na\n", "a name for each column of sets"),
        ("class,kind\na,x\nb\n", "line 3: has 1 columns, the header 2"),
        ("class,kind\na,x\nb,y\na,y\n", "line 4 of loss.label_sets: class 'a' is there twice"),
        ("class,kind\na,x\n", r"no row for class 'b' of the training split"),
        ("class,kind\nc,x\n", r"no row for class 'a' and 1 more"),
        ("class,kind,one\na,x,z\nb,y,z\n", "column 'one' puts the training classes into 1 set"),
        ("class,kind\na,x\nb,\nc,y\n", "column 'kind' puts the training classes into 1 set"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_label_sets(write(tmp_path, text), ["a", "b"], NONE)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_label_sets(str(tmp_path / "nowhere.csv"), ["a"], NONE)
    (tmp_path / "picture.csv").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        read_label_sets(str(tmp_path / "picture.csv"), ["a"], NONE)
