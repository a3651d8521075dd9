"""Google Landmarks v2 becomes train, gallery and query; its two numberings never meet."""

from __future__ import annotations

import argparse
import json
import tarfile

import numpy as np
import pytest
import simplejpeg
from tiny_images import image_of

from dist_dml.data.pack import landmarks as landmarks_module
from dist_dml.data.pack.landmark_lists import image_ids
from dist_dml.data.pack.landmarks import pack_landmarks
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError


def image_id(part: int, number: int) -> str:
    """An id whose first three digits differ from image to image, as the official ones."""
    return f"{(number * 0x9E3779B97F4A7C15 + part) % 2**64:016x}"


def save(root, folder: str, name: str, number: int) -> None:
    path = root / folder / name[0] / name[1] / name[2] / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.ascontiguousarray(image_of(number))
    path.write_bytes(simplejpeg.encode_jpeg(image, 95, "RGB", "444"))


TRAIN = {image_id(1, n): n % 5 for n in range(30)}
CLEAN = {name: label for name, label in TRAIN.items() if label != 4}
INDEX = {image_id(2, n): n % 4 for n in range(20)}
TEST = [image_id(3, n) for n in range(5)]
OF_LANDMARK = {c: [name for name, label in INDEX.items() if label == c] for c in range(4)}
RELEVANT = {
    TEST[0]: OF_LANDMARK[0],
    TEST[1]: OF_LANDMARK[1][:3],
    TEST[2]: [*OF_LANDMARK[2], OF_LANDMARK[3][0]],
}


@pytest.fixture
def official(tmp_path):
    root = tmp_path / "src"
    for folder, names in (("train", TRAIN), ("index", INDEX), ("test", TEST)):
        for number, name in enumerate(names):
            save(root, folder, name, number)
    rows = [f'{name},"http://x.org/{name},1.jpg",{label}' for name, label in TRAIN.items()]
    (root / "train.csv").write_text("id,url,landmark_id\n" + "\n".join(rows) + "\n")
    lists = [f"{c},{' '.join(n for n, label in CLEAN.items() if label == c)}" for c in range(4)]
    (root / "train_clean.csv").write_text("landmark_id,images\n" + "\n".join(lists) + "\n")
    (root / "index.csv").write_text("id\n" + "\n".join(INDEX) + "\n")
    pairs = [f"{name},{label}" for name, label in INDEX.items()]
    (root / "metadata").mkdir()
    (root / "metadata" / "index_image_to_landmark.csv").write_text(
        "id,landmark_id\n" + "\n".join(pairs) + "\n"
    )
    solution = [
        f"{name},{' '.join(RELEVANT[name])},{'Public' if n else 'Private'}"
        for n, name in enumerate(RELEVANT)
    ]
    solution += [f"{TEST[3]},None,Ignored", f"{TEST[4]},None,Public"]
    (root / "retrieval_solution_v2.1.csv").write_text(
        "id,images,Usage\n" + "\n".join(solution) + "\n"
    )
    return root


def pack_one(src, out, **options):
    return pack_landmarks(src, out, processes=1, **options)


def labels_of(index, split):
    return {
        index.key(row): index.class_names[index.class_id[row]]
        for row in index.select(split).tolist()
    }


def test_train_is_the_clean_set_and_every_image_is_its_own(official, tmp_path):
    index = pack_one(official, tmp_path / "out")
    assert labels_of(index, "train") == {n: f"train_{c:06d}" for n, c in CLEAN.items()}
    assert labels_of(index, "gallery") == {n: f"index_{c:06d}" for n, c in INDEX.items()}
    assert index.num_classes == 4
    reader = open_reader(index, 3)
    for folder, split in (("train", "train"), ("index", "gallery"), ("test", "query")):
        for row in index.select(split).tolist():
            name = index.key(row)
            stored = official / folder / name[0] / name[1] / name[2] / f"{name}.jpg"
            shard = index.shard_path(int(index.shard[row])).read_bytes()
            assert shard[index.offset[row] :][: index.size[row]] == stored.read_bytes()
    assert read_image(index, reader, 0).shape == (20, 24, 3)


def test_queries_are_the_scored_test_images_with_their_ground_truth(official, tmp_path, capsys):
    index = pack_one(official, tmp_path / "out")
    assert labels_of(index, "query") == {TEST[n]: f"index_{n:06d}" for n in range(3)}
    with tarfile.open(tmp_path / "out" / "query-000000.tar") as tar:
        member = tar.extractfile(f"{TEST[2]}.json")
        assert member is not None
        described = json.loads(member.read())
    assert described["relevant"] == RELEVANT[TEST[2]]
    assert (described["usage"], described["landmark_id"]) == ("Public", 2)
    noted = capsys.readouterr().err
    assert "1 of 3 queries should find several landmarks and 2 not all images" in noted


def test_the_two_numberings_never_share_a_class(official, tmp_path):
    index = pack_one(official, tmp_path / "out", subset="full")
    training = set(labels_of(index, "train").values())
    assert len(training) == 5
    assert not training & set(labels_of(index, "gallery").values())
    assert index.metadata["samples_per_split"] == {"gallery": 20, "query": 3, "train": 30}


def test_train_only_needs_neither_index_nor_test(official, tmp_path):
    (official / "index.csv").unlink()
    with pytest.raises(UsageError, match=r"index\.csv: no such file; expected train/, index/"):
        pack_one(official, tmp_path / "out")
    index = pack_one(official, tmp_path / "out", train_only=True)
    assert index.split_names == ("train",)


def test_index_images_without_landmark_are_classes_of_their_own(official, tmp_path, capsys):
    path = official / "metadata" / "index_image_to_landmark.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n")
    index = pack_one(official, tmp_path / "out")
    alone = [v for v in labels_of(index, "gallery").values() if v.startswith("alone_")]
    assert len(set(alone)) == 2
    assert "2 index images have no landmark" in capsys.readouterr().err


def test_landmarks_that_train_and_index_share_are_counted(official, tmp_path, capsys):
    for name, shared in (("train", range(5)), ("index", range(3, 7))):
        rows = "\n".join(f"{c},http://commons/Category:{c}" for c in shared)
        path = official / "metadata" / f"{name}_label_to_category.csv"
        path.write_text(f"landmark_id,category\n{rows}\n")
    pack_one(official, tmp_path / "out")
    assert "2 of 4 index landmarks are also in train.csv" in capsys.readouterr().err


def test_counts_and_missing_images_are_noted_or_refused(official, tmp_path, capsys):
    name = next(iter(CLEAN))
    (official / "train" / name[0] / name[1] / name[2] / f"{name}.jpg").unlink()
    with pytest.raises(UsageError, match="missing or empty, as 1 of the 47 listed images"):
        pack_one(official, tmp_path / "out")
    index = pack_one(official, tmp_path / "out", skip_missing=True)
    assert index.metadata["samples_per_split"]["train"] == 23
    assert "23 train images, published are 1,580,470" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"published are 1,580,470.*--strict-counts"):
        pack_one(official, tmp_path / "x", skip_missing=True, strict_counts=True)


def test_an_interrupted_pack_goes_on(official, tmp_path):
    first = pack_one(official, tmp_path / "out", shard_samples=8)
    tars = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "gallery-000001.tar").unlink()
    assert pack_one(official, tmp_path / "out", shard_samples=8).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == tars


@pytest.mark.parametrize(
    ("name", "edit", "expected"),
    [
        ("train_clean.csv", lambda t: t.replace("images", "imgs"), "columns landmark_id,images"),
        ("train_clean.csv", lambda t: t.replace("\n0,", "\nzero,"), "columns landmark_id,images"),
        ("train_clean.csv", lambda t: t.replace("\n0,", "\n-1,"), "empty or negative"),
        ("train_clean.csv", lambda t: t.replace("\n0,", "\n0,../../../etc "), "has not 16 digits"),
        ("train_clean.csv", lambda t: t + f"9,{next(iter(CLEAN))}\n", "lists 00000000"),
        ("index.csv", lambda t: "id\n", "lists no image"),
        ("index.csv", lambda t: t.replace(OF_LANDMARK[0][1] + "\n", ""), "does not list"),
        ("retrieval_solution_v2.1.csv", lambda t: t.split("\n")[0] + "\n", "scores no query"),
    ],
)
def test_damaged_lists_are_refused(official, tmp_path, name, edit, expected):
    path = official / name
    path.write_text(edit(path.read_text()))
    with pytest.raises(UsageError, match=expected) as caught:
        pack_one(official, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_id_is_its_number_and_anything_else_is_refused():
    texts = ["0123456789abcdef", "ffffffffffffffff", "0000000000000000"]
    assert image_ids(texts, "x").tolist() == [0x0123456789ABCDEF, 2**64 - 1, 0]
    for wrong in ("0123456789abcde", "0123456789ABCDEF", "../../../../../..", "0123456789abcdé"):
        with pytest.raises(UsageError, match="has not 16 digits"):
            image_ids(["0" * 16, wrong], "x")


def test_the_command_packs_and_reports(official, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    landmarks_module.add_arguments(parser)
    arguments = [str(official), str(tmp_path / "out"), "--subset=full", "--processes=1"]
    assert landmarks_module.run(parser.parse_args([*arguments, "--resize=10"])) == 0
    assert "53 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(official, tmp_path):
    first = pack_landmarks(official, tmp_path / "a", shard_samples=10, processes=1)
    second = pack_landmarks(official, tmp_path / "b", shard_samples=10, processes=2)
    assert second.fingerprint == first.fingerprint
    for tar in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / tar.name).read_bytes() == tar.read_bytes()
