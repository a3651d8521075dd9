"""CUB-200-2011 in its official layout, and what all packers of listed images do."""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
import simplejpeg
from tiny_images import image_of

from dist_dml.data.index import load_index
from dist_dml.data.pack import cub as cub_module
from dist_dml.data.pack.cub import pack_cub
from dist_dml.data.pack.image_files import unique_keys
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import RunError, UsageError

CLASSES = {1: "001.Black_footed_Albatross", 100: "100.Brown_Pelican", 101: "101.White_Pelican"}
PER_CLASS = 3
pack_one = partial(pack_cub, processes=1)


def write_rows(path, rows):
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


@pytest.fixture
def source(tmp_path):
    """Three classes of three images of 20 x 24 pixels, both sides of the border between splits."""
    root = tmp_path / "download" / "CUB_200_2011"
    images, labels, boxes, parts = [], [], [], []
    for class_id, name in CLASSES.items():
        (root / "images" / name).mkdir(parents=True)
        for _ in range(PER_CLASS):
            number = len(images) + 1
            path = f"{name}/{name[4:]}_{number:04d}_{7000 + number}.jpg"
            (root / "images" / path).write_bytes(simplejpeg.encode_jpeg(image_of(number)))
            images.append((number, path))
            labels.append((number, class_id))
            boxes.append((number, 2.0, 4.0, 10.0 + number, 8.0))
            parts.append((number, number % 2))
    write_rows(root / "images.txt", images)
    write_rows(root / "image_class_labels.txt", labels)
    write_rows(root / "classes.txt", CLASSES.items())
    write_rows(root / "bounding_boxes.txt", boxes)
    write_rows(root / "train_test_split.txt", parts)
    return root


def described(index):
    """The `.json` of every sample, by key."""
    found = {}
    for number in range(len(index.shards)):
        with tarfile.open(index.shard_path(number)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member).read()
                    found[member.name.removesuffix(".json")] = json.loads(content)
    return found


def tars(folder):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.tar")
    }


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_first_hundred_classes_train_and_the_others_test(source, tmp_path):
    index = pack_one(source, tmp_path / "out")
    assert index.split_names == ("test", "train")
    names = {
        split: {index.class_names[c] for c in index.class_id[index.select(split)]}
        for split in index.split_names
    }
    assert names == {"train": {CLASSES[1], CLASSES[100]}, "test": {CLASSES[101]}}
    assert index.class_names == tuple(CLASSES.values())
    assert index.metadata["source"]["kind"] == "cub"


def test_the_split_is_that_of_pytorch_metric_learning(source, tmp_path):
    from pytorch_metric_learning.datasets.cub import CUB

    files = {key: row["file"] for key, row in described(pack_one(source, tmp_path / "out")).items()}
    index = load_index(tmp_path / "out")
    for split in ("train", "test"):
        peer = CUB(str(source.parent), split=split)
        ours = {files[index.key(int(i))] for i in index.select(split)}
        assert ours == {"/".join(path.split("/")[-2:]) for path in peer.paths}


def test_bytes_are_copied_and_facts_are_kept(source, tmp_path):
    index = pack_one(source, tmp_path / "out")
    rows = described(index)
    key = f"{CLASSES[100]}/Brown_Pelican_0004_7004"
    assert rows[key] == {
        "label": CLASSES[100],
        "file": f"{key}.jpg",
        "image_id": 4,
        "class_id": 100,
        "box": [2.0, 4.0, 14.0, 8.0],
    }
    keys = [index.key(i) for i in range(len(index))]
    assert sorted(rows) == sorted(keys)
    sample = keys.index(key)
    tar = index.shard_path(int(index.shard[sample])).read_bytes()
    stored = tar[index.offset[sample] : index.offset[sample] + index.size[sample]]
    assert stored == (source / "images" / f"{key}.jpg").read_bytes()


def test_resizing_shrinks_images_and_boxes_alike(source, tmp_path):
    index = pack_one(source, tmp_path / "out", resize=10)
    reader = open_reader(index, 3)
    assert {read_image(index, reader, i).shape for i in range(len(index))} == {(10, 12, 3)}
    row = described(index)[f"{CLASSES[1]}/Black_footed_Albatross_0002_7002"]
    assert row["box"] == [1.0, 2.0, 6.0, 4.0]
    assert set(json.loads((tmp_path / "out" / "pack.json").read_text())["made_with"]) == {
        "opencv",
        "simplejpeg",
    }
    whole = pack_one(source, tmp_path / "whole", resize=20)
    assert whole.size.sum() == sum(p.stat().st_size for p in source.rglob("*.jpg"))


def test_a_second_run_writes_nothing_and_an_interrupted_one_goes_on(source, tmp_path, capsys):
    first = pack_one(source, tmp_path / "out", shard_samples=2)
    written = tars(tmp_path / "out")
    assert len(written) == 5
    assert pack_one(source, tmp_path / "out", shard_samples=2).fingerprint == first.fingerprint
    assert tars(tmp_path / "out") == written
    assert "5 of 5 shards are there already" in capsys.readouterr().out
    (tmp_path / "out" / "train-000001.tar").unlink()
    pack_one(source, tmp_path / "out", shard_samples=2)
    again = tars(tmp_path / "out")
    assert {name: data for name, (data, _) in again.items()} == {
        name: data for name, (data, _) in written.items()
    }
    assert sum(again[name] != written[name] for name in written) == 1


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(source, tmp_path):
    pack_one(source, tmp_path / "one", shard_samples=2, resize=10)
    pack_cub(source, tmp_path / "two", shard_samples=2, resize=10, processes=2)
    one, two = tars(tmp_path / "one"), tars(tmp_path / "two")
    assert {n: d for n, (d, _) in one.items()} == {n: d for n, (d, _) in two.items()}


def test_changed_labels_are_another_data_set(source, tmp_path):
    pack_one(source, tmp_path / "out")
    replace(source / "bounding_boxes.txt", "1 2.0 4.0", "1 3.0 4.0")
    with pytest.raises(UsageError, match="other parameters"):
        pack_one(source, tmp_path / "out")


def test_the_folder_above_and_a_zip_give_the_same_data_set(source, tmp_path):
    first = pack_one(source, tmp_path / "a")
    assert pack_one(source.parent, tmp_path / "b").fingerprint == first.fingerprint
    archive = shutil.make_archive(str(tmp_path / "cub"), "zip", source.parent)
    before = sorted(tmp_path.rglob("*"))
    zipped = pack_one(archive, tmp_path / "c")
    assert zipped.fingerprint == first.fingerprint
    created = set(tmp_path.rglob("*")) - set(before)
    assert {path for path in created if tmp_path / "c" not in (path, *path.parents)} == set()


def test_a_compressed_tar_says_how_to_extract_it(source, tmp_path):
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as tar:
        tar.add(source, "CUB_200_2011")
    with pytest.raises(UsageError, match=r"extract it \(`tar xf CUB_200_2011\.tgz`\)"):
        pack_one(tmp_path / "CUB_200_2011.tgz", tmp_path / "out")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(UsageError, match="neither a folder nor a readable zip"):
        pack_one(tmp_path / "text", tmp_path / "out")


def test_a_wrong_layout_names_what_was_expected(source, tmp_path):
    with pytest.raises(UsageError, match=r"absent: no such folder or zip; expected CUB_200_2011/"):
        pack_one(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds no images\.txt.*expected CUB_200_2011/ with") as e:
        pack_one(source / "images", tmp_path / "out")
    assert "\n" not in str(e.value)
    (source / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"CUB_200_2011/classes\.txt: no such file; expected"):
        pack_one(source.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_or_empty_image_is_refused_or_left_out_on_request(source, tmp_path, capsys):
    images = sorted((source / "images").rglob("*.jpg"))
    images[0].unlink()
    images[1].write_bytes(b"")
    with pytest.raises(UsageError, match=r"0001_7001\.jpg: missing or empty, as 2 of the 9 listed"):
        pack_one(source, tmp_path / "out")
    index = pack_one(source, tmp_path / "out", skip_missing=True)
    assert len(index) == 7
    assert "2 images missing or empty" in capsys.readouterr().err
    shutil.rmtree(source / "images" / CLASSES[101])
    with pytest.raises(UsageError, match="as 5 of the 9 listed images, all of test; extract"):
        pack_one(source, tmp_path / "other", skip_missing=True)


def test_other_counts_are_noted_and_strictly_refused(source, tmp_path, capsys):
    pack_one(source, tmp_path / "out")
    noted = capsys.readouterr().err
    assert "train has 6 images of 2 classes (published 5,864 of 100)" in noted
    assert "test has 3 images of 1 classes (published 5,924 of 100)" in noted
    with pytest.raises(UsageError, match=r"is not the whole CUB-200-2011: train has 6 images"):
        pack_one(source, tmp_path / "strict", strict_counts=True)
    assert not (tmp_path / "strict").exists()


def test_lists_that_do_not_belong_together_are_refused(source, tmp_path):
    # With shifted labels, test classes would be trained on without a word.
    replace(source / "image_class_labels.txt", "7 101\n", "7 100\n")
    with pytest.raises(
        UsageError, match=r"images\.txt line 7: .*not in the folder of its class 100"
    ):
        pack_one(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("image_class_labels.txt", "9 101\n", "", r"images.txt line 9: image 9 has no class in"),
        ("image_class_labels.txt", "9 101\n", "9 300\n", r"line 9: class 300 has no name in"),
        ("image_class_labels.txt", "9 101\n", "8 101\n", r"line 9: image_id 8 comes twice"),
        ("image_class_labels.txt", "9 101\n", "9\n", r"line 9: has 1 columns, expected 'image_id"),
        ("images.txt", "1 001.", "one 001.", r"line 1: 'one' is no whole number in 1"),
        ("images.txt", "_7002.jpg", "_7002.gif", r"7002\.gif', expected one of \.jpg"),
        ("images.txt", "Albatross/B", "Albatross/../../../B", r"leads out of the data set"),
        ("images.txt", "0002_7002", "0001_7001", r"0001_7001\.jpg: is listed twice"),
        ("bounding_boxes.txt", "1 2.0", "1 nan", r"line 1: 'nan 4.0 11.0 8.0' is no box"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(source, tmp_path, file, old, new, message):
    replace(source / file, old, new)
    with pytest.raises(UsageError, match=message) as caught:
        pack_one(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_boxes_are_not_needed(source, tmp_path, capsys):
    (source / "bounding_boxes.txt").unlink()
    rows = described(pack_one(source, tmp_path / "out"))
    assert not any("box" in row for row in rows.values())
    assert "bounding_boxes.txt: no such file" in capsys.readouterr().err


def test_a_damaged_image_stops_a_resizing_pack_and_is_named(source, tmp_path):
    broken = sorted((source / "images").rglob("*.jpg"))[4]
    broken.write_bytes(b"a text file called .jpg")
    with pytest.raises(RunError, match=rf"{broken.name}: it is not a JPEG"):
        pack_one(source, tmp_path / "out", resize=10)


def test_a_damaged_zip_is_named(source, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "cub"), "zip", source.parent)
    with zipfile.ZipFile(archive) as opened:
        member = next(info for info in opened.infolist() if info.filename.endswith("7003.jpg"))
    with open(archive, "r+b") as stream:
        stream.seek(member.header_offset + 150)
        stream.write(bytes(64))
    with pytest.raises(RunError, match=r"7003\.jpg: cannot be read \("):
        pack_one(archive, tmp_path / "out")


def test_keys_are_unique_and_end_at_no_dot():
    paths = ["a.b/x.y.jpg", "a.b/x_y.jpg", "a.b/x_y.png", "c/x.y.jpg", "x_y-2.jpg", ".jpg"]
    keys = unique_keys(paths)
    assert keys == ["a.b/x_y", "a.b/x_y-2", "a.b/x_y-3", "c/x_y", "x_y-2", "_"]
    assert unique_keys(iter(paths[:3])) == keys[:3]


def test_the_order_follows_the_seed(source, tmp_path):
    orders = []
    for seed in (0, 0, 1):
        index = pack_one(source, tmp_path / f"out{len(orders)}", seed=seed)
        orders.append([index.key(i) for i in range(len(index))])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert not np.array_equal(orders[0], sorted(orders[0]))


def test_the_command_packs_and_reports(source, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cub_module.add_arguments(parser)
    arguments = [str(source), str(tmp_path / "out"), "--processes", "1", "--resize", "12"]
    assert cub_module.run(parser.parse_args(arguments)) == 0
    assert "9 samples (test 3, train 6), 2 training classes of 3" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--shard-samples=0"):
        cub_module.run(parser.parse_args([*arguments, "--shard-samples", "0"]))
