"""Which class of one catalogue is which of another, and where its rows lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dist_dml.checkpoint_manifest import Manifest, Progress
from dist_dml.class_mapping import NONE, map_classes, read_renames
from dist_dml.class_store import StoredClasses, cut_classes
from dist_dml.errors import UsageError

OLD = ("ant", "bee", "cat", "dog", "eel")
NEW = ("ape", "bee", "cat", "eel", "fly", "fox")


def test_classes_of_equal_name_are_the_same() -> None:
    found = map_classes(OLD, NEW)
    assert found.source.tolist() == [NONE, 1, 2, 4, NONE, NONE]
    assert found.new.tolist() == [0, 4, 5]
    assert found.dropped.tolist() == [0, 3]
    assert found.first_new().tolist() == [NONE, 1, 2, NONE, 3]
    assert "5 classes -> 6: 3 carried over (0 of them merged from several), 3 new, 2 dropped" in (
        found.describe()
    )


def test_renames_merge_split_and_drop() -> None:
    told = [("dog", "fox"), ("ant", "bee"), ("cat", ""), ("eel", "eel"), ("eel", "ape")]
    found = map_classes(OLD, NEW, told)
    # ape and eel both from eel; bee from itself and ant; fox from dog; cat is dropped.
    assert found.source.tolist() == [4, 1, NONE, 4, NONE, 3]
    assert (found.merged_new.tolist(), found.merged_old.tolist()) == ([1], [0])
    assert found.dropped.tolist() == [2]
    assert found.first_new().tolist() == [1, 1, NONE, 5, 0]


@pytest.mark.parametrize(
    ("pair", "said"),
    [(("cow", "fox"), "checkpoint's catalogue has no class 'cow'"), (("cat", "cow"), "new catal")],
)
def test_names_that_nobody_has_are_refused(pair: tuple[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        map_classes(OLD, NEW, [pair])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\nx,y\n", "the header is a,b; expected old,new"),
        ("old,new\nx\n", "line 2: has 1 columns, the header 2"),
        (None, "No such file"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(
    tmp_path: Path, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_renames(str(tmp_path / "m.csv"))


def test_rows_are_found_across_files_in_any_order(tmp_path: Path) -> None:
    rows = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    cut = [(0, 4, "a"), (4, 5, "b"), (5, 11, "c")]
    manifest = Manifest(Progress(), {}, 11, "", cut, {})
    for start, stop, name in manifest.class_files:
        save_file({"weight": rows[start:stop].clone()}, tmp_path / name)
    stored = StoredClasses.open(tmp_path, manifest)
    ids = np.array([10, 0, 4, 4, 3, 7])
    assert torch.equal(stored.take("weight", ids), rows[torch.from_numpy(ids)])
    assert stored.row_bytes == 12


def test_files_of_classes_are_cut_by_their_size() -> None:
    assert list(cut_classes(5, 2**28)) == [
        (0, 2, "classes-00000-of-00003.safetensors"),
        (2, 4, "classes-00001-of-00003.safetensors"),
        (4, 5, "classes-00002-of-00003.safetensors"),
    ]
    assert next(iter(cut_classes(2, 2**40)))[:2] == (0, 1)
