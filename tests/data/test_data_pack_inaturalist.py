"""iNaturalist 2018 is packed by the field's split files, by halves, or as officially divided."""

from __future__ import annotations

import argparse
import json
import tarfile

import numpy as np
import pytest
import simplejpeg
from tiny_images import image_of

from dist_dml.data.pack import inaturalist as inaturalist_module
from dist_dml.data.pack.inaturalist import pack_inaturalist
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import RunError, UsageError

CATEGORIES = [3, 5, 20, 100, 7477, 8000]
SPLIT_FOLDER = "Inat_dataset_splits"


def jpeg(number: int) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image_of(number)), 95, "RGB", "444")


def file_name(image_id: int, category: int) -> str:
    kingdom = "Plantae" if category < 50 else "Aves"
    return f"train_val2018/{kingdom}/{category}/{image_id:032x}.jpg"


def annotation_file(ids: range) -> dict:
    """Images of every category in turn, in COCO's form; the order of annotations is another."""
    images = [
        {"id": i, "file_name": file_name(i, CATEGORIES[i % 6]), "width": 24, "height": 20}
        for i in ids
    ]
    labels = [{"id": i, "image_id": i, "category_id": CATEGORIES[i % 6]} for i in reversed(ids)]
    names = [{"id": c, "name": str(c), "supercategory": f"super{c % 2}"} for c in CATEGORIES]
    return {"info": {}, "images": images, "annotations": labels, "categories": names}


@pytest.fixture
def official(tmp_path):
    """30 images of 6 categories for train, 12 for val; the field's split by category."""
    root = tmp_path / "src"
    parts = {
        "train2018.json": annotation_file(range(30)),
        "val2018.json": annotation_file(range(100, 112)),
    }
    splits = {"train": [], "test": []}
    for name, content in parts.items():
        root.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
        for image in content["images"]:
            path = root / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(image["id"]))
            category = CATEGORIES[image["id"] % 6]
            splits["test" if category in (5, 100) else "train"].append(image["file_name"])
    (root / SPLIT_FOLDER).mkdir()
    for side, lines in splits.items():
        text = "\n".join(lines) + "\n"
        (root / SPLIT_FOLDER / f"Inaturalist_{side}_set1.txt").write_text(text)
    return root


def pack_one(src, out, **options):
    return pack_inaturalist(src, out, processes=1, **options)


def classes_of(index):
    return {
        split: sorted({int(index.class_names[c]) for c in index.class_id[index.select(split)]})
        for split in index.split_names
    }


def sample_json(folder, shard, key):
    with tarfile.open(folder / shard) as tar:
        member = tar.extractfile(f"{key}.json")
        assert member is not None
        return json.loads(member.read())


def refusal(call) -> str:
    with pytest.raises((UsageError, RunError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_split_files_of_the_field_decide(official, tmp_path):
    index = pack_one(official, tmp_path / "out")
    assert classes_of(index) == {"train": [3, 20, 7477, 8000], "test": [5, 100]}
    assert index.metadata["samples_per_split"] == {"test": 14, "train": 28}
    assert index.num_classes == 4
    reader = open_reader(index, 3)
    for row in range(len(index)):
        number = int(index.key(row).rpartition("/")[2], 16)
        assert CATEGORIES[number % 6] == int(index.class_names[index.class_id[row]])
        stored = (official / file_name(number, CATEGORIES[number % 6])).read_bytes()
        shard = index.shard_path(int(index.shard[row])).read_bytes()
        assert shard[index.offset[row] :][: index.size[row]] == stored
    assert read_image(index, reader, 0).shape == (20, 24, 3)


def test_metadata_comes_from_the_annotations(official, tmp_path):
    pack_one(official, tmp_path / "out")
    key = file_name(4, 7477).removesuffix(".jpg")
    assert sample_json(tmp_path / "out", "train-000000.tar", key) == {
        "label": "7477",
        "file": file_name(4, 7477),
        "image_id": 4,
        "name": "7477",
        "supercategory": "super1",
        "part": "train2018",
    }


def test_halves_divide_the_sorted_categories_and_need_no_split_files(official, tmp_path):
    (official / SPLIT_FOLDER / "Inaturalist_test_set1.txt").unlink()
    index = pack_one(official, tmp_path / "out", split_rule="half")
    assert classes_of(index) == {"train": [3, 5, 20], "test": [100, 7477, 8000]}
    assert len(index) == 42


def test_the_official_split_is_a_closed_set(official, tmp_path):
    index = pack_one(official, tmp_path / "out", split_rule="official")
    assert classes_of(index) == {"train": CATEGORIES, "seen": CATEGORIES}
    assert index.metadata["samples_per_split"] == {"seen": 12, "train": 30}


def test_a_zip_and_split_files_beside_the_json_give_the_same_data_set(official, tmp_path):
    first = pack_one(official, tmp_path / "a").fingerprint
    for path in (official / SPLIT_FOLDER).iterdir():
        path.rename(official / path.name)
    import shutil

    archive = shutil.make_archive(str(tmp_path / "inat"), "zip", official.parent, "src")
    assert pack_one(archive, tmp_path / "b").fingerprint == first


def test_an_interrupted_pack_goes_on_with_the_missing_shards(official, tmp_path):
    first = pack_one(official, tmp_path / "out", shard_samples=10)
    tars = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-000001.tar").unlink()
    kept = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    assert pack_one(official, tmp_path / "out", shard_samples=10).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == tars
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == kept
    message = refusal(lambda: pack_one(official, tmp_path / "out", split_rule="half"))
    assert "split_rule=smooth-ap (now half)" in message


def test_other_counts_than_published_are_noted_or_refused(official, tmp_path, capsys):
    pack_one(official, tmp_path / "out")
    assert "28 train images, published are 325,846" in capsys.readouterr().err
    message = refusal(lambda: pack_one(official, tmp_path / "x", strict_counts=True))
    assert "published are 325,846" in message
    assert not (tmp_path / "x").exists()


def test_a_missing_image_is_named_or_left_out(official, tmp_path, capsys):
    (official / file_name(4, 7477)).unlink()
    (official / file_name(5, 8000)).write_bytes(b"")
    message = refusal(lambda: pack_one(official, tmp_path / "out"))
    assert "missing or empty, as 2 of the 42 listed images" in message
    assert f"{4:032x}.jpg" in message
    assert not (tmp_path / "out").exists()
    index = pack_one(official, tmp_path / "out", skip_missing=True)
    assert len(index) == 40
    assert "left out, as 2 images" in capsys.readouterr().err


def test_a_missing_file_is_named_with_the_expected_layout(official, tmp_path):
    (official / SPLIT_FOLDER / "Inaturalist_test_set1.txt").unlink()
    message = refusal(lambda: pack_one(official, tmp_path / "out"))
    assert "Inaturalist_test_set1.txt: no such file" in message
    assert "--split-rule half" in message
    (official / "val2018.json").unlink()
    message = refusal(lambda: pack_one(official, tmp_path / "out"))
    assert "val2018.json: no such file; expected train2018.json and val2018.json" in message
    message = refusal(lambda: pack_one(tmp_path / "absent", tmp_path / "out"))
    assert "no such folder" in message


def change(root, name, edit):
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.pop("annotations"), "is not the official file"),
        (lambda c: c["annotations"].pop(), "image 100 has no annotation with a known category"),
        (lambda c: c["categories"].pop(0), "has no annotation with a known category"),
        (lambda c: c["images"][0].update(file_name="../../secret.jpg"), "file_name"),
        (lambda c: c["images"][0].update(file_name="/etc/x.jpg"), "file_name"),
        (lambda c: c["images"][0].update(file_name="a/b.png"), "file_name"),
        (lambda c: c["images"].append(c["images"][0]), "is listed twice"),
    ],
)
def test_damaged_annotations_are_refused(official, tmp_path, edit, expected):
    change(official, "val2018.json", edit)
    assert expected in refusal(lambda: pack_one(official, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_cut_json_and_unknown_or_shared_lines_are_refused(official, tmp_path):
    test_file = official / SPLIT_FOLDER / "Inaturalist_test_set1.txt"
    text = test_file.read_text()
    test_file.write_text(text + "train_val2018/Aves/1/absent.jpg\n")
    message = refusal(lambda: pack_one(official, tmp_path / "out"))
    assert "line 15: 'train_val2018/Aves/1/absent.jpg' is in neither json" in message
    test_file.write_text(text + file_name(3, 100) + "\n")
    assert "lists an image twice" in refusal(lambda: pack_one(official, tmp_path / "out"))
    test_file.write_text(text + file_name(4, 7477) + "\n")
    message = refusal(lambda: pack_one(official, tmp_path / "out"))
    assert "class '7477' is in train and in test (1 such classes of its 3)" in message
    (official / "train2018.json").write_text('{"images": [')
    assert "train2018.json: is not the official file" in refusal(
        lambda: pack_one(official, tmp_path / "out")
    )


def test_the_command_resizes_and_reports(official, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    inaturalist_module.add_arguments(parser)
    out = tmp_path / "out"
    arguments = parser.parse_args([str(official), str(out), "--resize=10", "--processes=1"])
    assert inaturalist_module.run(arguments) == 0
    assert "42 samples" in capsys.readouterr().out
    from dist_dml.data.index import load_index

    index = load_index(out)
    reader = open_reader(index, 3)
    assert {read_image(index, reader, i).shape for i in range(len(index))} == {(10, 12, 3)}


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(official, tmp_path):
    first = pack_inaturalist(official, tmp_path / "a", shard_samples=10, processes=1)
    second = pack_inaturalist(official, tmp_path / "b", shard_samples=10, processes=2)
    assert second.fingerprint == first.fingerprint
    for tar in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / tar.name).read_bytes() == tar.read_bytes()
