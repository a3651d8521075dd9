"""Stanford Online Products in its official layout."""

from __future__ import annotations

import argparse
import shutil
from functools import partial

import pytest
import simplejpeg
from test_data_pack_cub import described, replace, tars
from tiny_images import image_of

from dist_dml.data.pack import online_products as products_module
from dist_dml.data.pack.online_products import pack_online_products
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError

HEADER = "image_id class_id super_class_id path"
CLASSES = {"train": (1, 2, 11318), "test": (11319, 22634)}
KINDS = ("bicycle", "coffee_maker")
pack_one = partial(pack_online_products, processes=1)


@pytest.fixture
def source(tmp_path):
    """Five articles of two images each, with endings in capitals as the official files have."""
    root = tmp_path / "download" / "Stanford_Online_Products"
    number = 0
    for split, classes in CLASSES.items():
        lines = [HEADER]
        for class_id in classes:
            for view in range(2):
                number += 1
                kind = class_id % 2
                path = f"{KINDS[kind]}_final/{111000000000 + class_id}_{view}.JPG"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(simplejpeg.encode_jpeg(image_of(number)))
                lines.append(f"{number} {class_id} {kind + 1} {path}")
        (root / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    (root / "Ebay_info.txt").write_text("not read")
    return root


def test_the_official_split_is_taken_and_classes_keep_their_numeric_order(source, tmp_path):
    index = pack_one(source, tmp_path / "out")
    names = {
        split: [index.class_names[c] for c in sorted(set(index.class_id[index.select(split)]))]
        for split in ("train", "test")
    }
    assert names == {split: [str(c) for c in classes] for split, classes in CLASSES.items()}
    assert index.num_classes == 3


def test_super_classes_and_numbers_are_kept(source, tmp_path):
    rows = described(pack_one(source, tmp_path / "out"))
    assert rows["coffee_maker_final/111000011319_1"] == {
        "label": "11319",
        "file": "coffee_maker_final/111000011319_1.JPG",
        "image_id": 8,
        "class_id": 11319,
        "super_class_id": 2,
        "super_class": "coffee_maker",
    }
    assert len(rows) == 10


def test_the_split_is_that_of_pytorch_metric_learning(source, tmp_path):
    from pytorch_metric_learning.datasets.sop import StanfordOnlineProducts

    index = pack_one(source, tmp_path / "out")
    files = {key: row["file"] for key, row in described(index).items()}
    for split in ("train", "test"):
        peer = StanfordOnlineProducts(str(source.parent), split=split)
        ours = {
            (files[index.key(int(i))], index.class_names[index.class_id[i]])
            for i in index.select(split)
        }
        paths = ("/".join(path.split("/")[-2:]) for path in peer.paths)
        assert ours == {(path, str(label)) for path, label in zip(paths, peer.labels, strict=True)}


def test_the_official_zip_is_read_without_being_extracted(source, tmp_path):
    first = pack_one(source, tmp_path / "a")
    archive = shutil.make_archive(
        str(tmp_path / "Stanford_Online_Products"), "zip", source.parent, source.name
    )
    assert pack_one(archive, tmp_path / "b").fingerprint == first.fingerprint
    assert tars(tmp_path / "b").keys() == tars(tmp_path / "a").keys()


def test_a_second_run_writes_nothing(source, tmp_path):
    first = pack_one(source, tmp_path / "out", shard_samples=3)
    written = tars(tmp_path / "out")
    assert (
        pack_one(source.parent, tmp_path / "out", shard_samples=3).fingerprint == first.fingerprint
    )
    assert tars(tmp_path / "out") == written


def test_resizing_shortens_the_short_side_and_names_the_ending_after_the_bytes(source, tmp_path):
    index = pack_one(source, tmp_path / "out", resize=10)
    reader = open_reader(index, 3)
    assert {read_image(index, reader, i).shape for i in range(len(index))} == {(10, 12, 3)}


def test_a_class_in_both_lists_is_refused(source, tmp_path):
    replace(source / "Ebay_test.txt", " 11319 ", " 2 ")
    with pytest.raises(
        UsageError, match=r"class '2' is in train \(.*\) and in test \(.*\), 1 such"
    ):
        pack_one(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_list_without_its_header_is_refused_for_its_first_sample_would_be_lost(source, tmp_path):
    replace(source / "Ebay_test.txt", HEADER + "\n", "")
    with pytest.raises(
        UsageError, match=r"Ebay_test\.txt line 1: is '7 11319 2 .* expected the header"
    ):
        pack_one(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1 1 2 ", "1 one 2 ", r"Ebay_train\.txt line 2: 'one' is no whole number"),
        ("1 1 2 ", "1 2 ", r"line 2: has 3 columns, expected 'image_id class_id super"),
        ("1 1 2 ", "1 1 2 /", r"which leads out of the data set"),
    ],
)
def test_a_damaged_row_is_refused_with_its_line(source, tmp_path, old, new, message):
    replace(source / "Ebay_train.txt", "\n" + old, "\n" + new)
    with pytest.raises(UsageError, match=message):
        pack_one(source, tmp_path / "out")


def test_a_wrong_layout_and_missing_files_are_named(source, tmp_path):
    with pytest.raises(
        UsageError, match=r"holds no Ebay_train\.txt.*expected Stanford_Online_Prod"
    ):
        pack_one(source / "bicycle_final", tmp_path / "out")
    lost = next((source / "bicycle_final").iterdir())
    lost.unlink()
    with pytest.raises(UsageError, match=rf"{lost.name}: missing or empty, as 1 of the 10"):
        pack_one(source, tmp_path / "out")
    (source / "Ebay_test.txt").unlink()
    with pytest.raises(UsageError, match=r"Stanford_Online_Products/Ebay_test\.txt: no such file"):
        pack_one(source, tmp_path / "out")


def test_counts_are_noted_and_strictly_refused(source, tmp_path, capsys):
    pack_one(source, tmp_path / "out")
    assert "train has 6 images of 3 classes (published 59,551 of 11,318)" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"test has 4 images of 2 classes \(published 60,502"):
        pack_one(source, tmp_path / "strict", strict_counts=True)


def test_the_command_packs_and_reports(source, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    products_module.add_arguments(parser)
    arguments = parser.parse_args([str(source), str(tmp_path / "out"), "--processes", "1"])
    assert products_module.run(arguments) == 0
    assert "10 samples (test 4, train 6), 3 training classes of 5" in capsys.readouterr().out
