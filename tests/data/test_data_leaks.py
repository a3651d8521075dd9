"""Leaks between splits: planted copies are found and told apart, other pictures are not named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from drawn_photos import brightened, cropped, halved, jpeg, pack, photo, png

from dist_dml.cli import run_command
from dist_dml.data import leaks
from dist_dml.data.decode import decode
from dist_dml.data.index import Index, load_index
from dist_dml.data.leak_report import web_page
from dist_dml.data.leak_summary import LeakSummary, exclude_leaks
from dist_dml.data.leaks import LEAKS_FILE, PICTURE_FILE, report_leaks
from dist_dml.data.quarantine import (
    QUARANTINE_FILE,
    QuarantineEntry,
    read_quarantine,
    write_quarantine,
)
from dist_dml.errors import UsageError

PLANTED = {
    ("t0", "same"): "bytes",
    ("t1", "lossless"): "pixels",
    ("t2", "encoded"): "near",
    ("t3", "half"): "near",
    ("t4", "bright"): "near",
    ("t5", "crop"): "near",
    ("t0", "seen-same"): "bytes",
}


def planted(folder: Path) -> Index:
    """Twelve training images, copies of some of them in test and seen, and other pictures."""
    train = [(f"t{i}", f"class {i % 4}", jpeg(photo(i))) for i in range(12)]
    # The same picture under two labels, and again under one.
    train += [("twin", "class 3", jpeg(photo(8), 60)), ("again", "class 1", jpeg(photo(9), 60))]
    test = [
        ("same", "new", jpeg(photo(0))),
        ("lossless", "new", png(decode(jpeg(photo(1)), 3))),
        ("encoded", "new", jpeg(photo(2), 50)),
        ("half", "new", jpeg(halved(photo(3)))),
        ("bright", "new", jpeg(brightened(photo(4)))),
        ("crop", "new", jpeg(cropped(photo(5), 0.02))),
        *((f"other{i}", "new", jpeg(photo(100 + i))) for i in range(14)),
    ]
    seen = [("seen-same", "class 0", jpeg(photo(0))), ("seen-other", "class 1", jpeg(photo(200)))]
    return pack(folder, {"train": train, "test": test, "seen": seen})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> LeakSummary:
    return report_leaks(planted(tmp_path_factory.mktemp("planted")), processes=1)


def named(summary: LeakSummary, conflict: bool) -> dict[tuple[str, str], str]:
    pairs, key = summary.pairs, summary.index.key
    kinds = ("bytes", "pixels", "near")
    return {
        (key(int(pairs.id_a[i])), key(int(pairs.id_b[i]))): kinds[pairs.kind[i]]
        for i in range(len(pairs))
        if pairs.conflict[i] == conflict
    }


def test_copies_are_told_apart_and_other_pictures_left_alone(found: LeakSummary) -> None:
    assert named(found, conflict=False) == PLANTED


def test_images_affected_are_counted_for_each_split(found: LeakSummary) -> None:
    counts = {
        (p.split_a, p.split_b): (p.kinds, p.other_class, p.affected, p.total) for p in found.splits
    }
    assert counts == {
        ("train", "seen"): ((1, 0, 0), 0, 1, 2),
        ("train", "test"): ((1, 1, 4), 6, 6, 20),
    }
    assert found.share == 0.5
    assert (
        "train - test           1            1     4            6  6 of 20 in test" in found.text()
    )


def test_one_picture_under_two_labels_is_a_conflict(found: LeakSummary) -> None:
    assert named(found, conflict=True) == {("t8", "twin"): "near"}
    within = {part.split_a: (part.kinds, part.affected) for part in found.conflicts}
    assert within == {"seen": ((0, 0, 0), 0), "test": ((0, 0, 0), 0), "train": ((0, 0, 1), 2)}


def test_the_table_of_pairs_names_both_sides(found: LeakSummary) -> None:
    rows = pyarrow.parquet.read_table(found.index.folder / LEAKS_FILE).to_pylist()
    row = next(row for row in rows if row["key_b"] == "lossless")
    wanted = {
        "key_a": "t1",
        "split_a": "train",
        "class_a": "class 1",
        "split_b": "test",
        "class_b": "new",
        "kind": "pixels",
        "distance": 0,
        "correlation": 1.0,
        "conflict": False,
    }
    assert row.items() >= wanted.items()
    assert len(rows) == len(PLANTED) + 1


def test_uniform_images_match_by_equal_pixels_only(tmp_path: Path) -> None:
    def flat(level: int) -> bytes:
        return png(np.full((64, 64, 3), level, np.uint8))

    index = pack(
        tmp_path,
        {
            "train": [("white", "a", flat(255)), ("black", "a", flat(0))],
            "test": [
                ("grey", "b", flat(128)),
                ("nearly", "b", flat(254)),
                ("same", "b", flat(255)),
            ],
        },
    )
    summary = report_leaks(index, processes=1)
    assert named(summary, conflict=False) == {("white", "same"): "bytes"}
    assert summary.num_flat == 5


def test_an_unreadable_image_is_counted_and_the_others_are_compared(tmp_path: Path) -> None:
    planted(tmp_path)
    index = load_index(tmp_path)
    broken = next(i for i in range(len(index)) if index.key(i) == "other3")
    tar = tmp_path / "test-000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(index.offset[broken]) + 300] ^= 255
    tar.write_bytes(data)
    summary = report_leaks(index, processes=1)
    assert [image.sample_id for image in summary.unreadable] == [broken]
    assert "1 unreadable" in summary.text()
    assert "key other3" in summary.text()
    assert named(summary, conflict=False) == PLANTED


def test_a_picture_of_the_pairs_is_drawn_and_an_old_one_removed(tmp_path: Path) -> None:
    planted(tmp_path)
    index = load_index(tmp_path)
    report_leaks(index, processes=1)
    picture = decode((tmp_path / PICTURE_FILE).read_bytes(), 3)
    assert picture.shape[1] > 1000
    assert picture.std() > 20
    report_leaks(index, processes=1, between=[], within=["test"])
    assert not (tmp_path / PICTURE_FILE).exists()


def test_names_cannot_break_the_web_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    index = pack(
        tmp_path,
        {
            "train": [("a", evil, jpeg(photo(0)))],
            "test": [("b", "$x^2$ \u4f60", jpeg(photo(0)))],
        },
    )
    page = web_page(report_leaks(index, processes=1))
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "http" not in page


def test_the_worst_pairs_come_first_and_no_image_twice(found: LeakSummary) -> None:
    order = found.pairs.worst_first(100)
    assert len(set(found.pairs.id_b[order].tolist())) == len(order)
    kinds = [found.pairs.kind[i] for i in order if not found.pairs.conflict[i]]
    assert kinds == sorted(kinds)
    assert found.pairs.conflict[order[-1]]


def test_excluded_images_are_in_no_split_any_more(tmp_path: Path) -> None:
    planted(tmp_path)
    index = load_index(tmp_path)
    known = QuarantineEntry.of(index, len(index) - 1, "undecodable", "it was damaged")
    write_quarantine(tmp_path / QUARANTINE_FILE, [known], index.metadata["fingerprint"])
    summary = report_leaks(load_index(tmp_path), processes=1)
    assert exclude_leaks(summary, "train") == 6
    entries = read_quarantine(tmp_path / QUARANTINE_FILE)
    assert [entry.kind for entry in entries].count("leak") == 6
    assert known in entries
    after = report_leaks(load_index(tmp_path), processes=1)
    assert named(after, conflict=False) == {}
    assert named(after, conflict=True) == {("t8", "twin"): "near"}
    with pytest.raises(UsageError, match=r"--exclude-from=val: no other split"):
        exclude_leaks(after, "val")


def command(*arguments: str) -> int:
    return run_command("dist-dml leaks", leaks, list(arguments))


def test_the_exit_code_states_whether_too_much_leaks(
    found: LeakSummary, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(found.index.folder)
    page = tmp_path / "page.html"
    assert command(folder, "--processes", "1", "--html", str(page)) == 0
    assert page.stat().st_size > 10_000
    assert command(folder, "--between", "train:test", "--fail-above", "0.30") == 0
    assert command(folder, "--between", "train:test", "--fail-above", "0.29") == 1
    assert "6 of 20 in test (30.00%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--between", "train"], "expected two splits as A:B"),
        (["--between", "train:train"], "expected two splits as A:B"),
        (["--between", "train:val"], "no samples of split 'val'"),
        (["--distance", "40"], "--distance=40"),
        (["--correlation", "0"], "--correlation=0"),
        (["--fail-above", "2"], "--fail-above=2"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    found: LeakSummary,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert command(str(found.index.folder), *arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
