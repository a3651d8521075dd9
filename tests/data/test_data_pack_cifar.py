"""CIFAR's binary archives become a closed set whose pixels are the archive's bytes."""

from __future__ import annotations

import argparse
import io
import json
import tarfile

import numpy as np
import pytest

from dist_dml.data.pack import cifar as cifar_module
from dist_dml.data.pack.cifar import pack_cifar
from dist_dml.data.pack.cifar_archive import CIFAR10, CIFAR100
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError

NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COARSE = [f"coarse_{number:02d}" for number in range(20)]
FINE = [f"fine_{number:03d}" for number in range(100)]
TRAIN, TEST = 4, 5


def record(labels: tuple[int, ...], number: int) -> bytes:
    """One record, and pixels that differ in every byte from those of another number."""
    pixels = np.random.default_rng(number).integers(0, 256, 3072, dtype=np.uint8)
    return bytes(labels) + pixels.tobytes()


def files_of(layout) -> dict[str, bytes]:
    """A tiny archive in the official layout: a few records in every file."""
    content: dict[str, bytes] = {"readme.html": b"<html>"}
    number = 0
    for split, files in layout.splits.items():
        for name in files:
            content[name] = b""
            for _ in range(TRAIN if split == "train" else TEST):
                fine = number * 7 % layout.num_classes
                labels = (fine,) if layout is CIFAR10 else (fine % 20, fine)
                content[name] += record(labels, number)
                number += 1
    # The official files end with blank lines.
    if layout is CIFAR10:
        content[layout.names] = ("\n".join(NAMES10) + "\n\n").encode()
    else:
        content[layout.names] = ("\n".join(FINE) + "\n").encode()
        content[layout.coarse_names] = ("\n".join(COARSE) + "\n").encode()
    return content


def archive_of(path, layout, content: dict[str, bytes], prefix: str = ""):
    """The files as a `.tar.gz` with the official folder inside."""
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(layout.folder)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in content.items():
            info = tarfile.TarInfo(f"{prefix}{layout.folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def folder_of(path, content: dict[str, bytes]):
    path.mkdir(parents=True)
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def pack_one(archive, out, **options):
    return pack_cifar(archive, out, processes=1, **options)


def assert_equal_to_the_bytes(index, layout, content):
    """Every record is there once, in its split, with its class and its very pixels."""
    length = layout.label_bytes + 3072
    names = NAMES10 if layout is CIFAR10 else FINE
    reader = open_reader(index, 3)
    rows = {index.key(row): row for row in range(len(index))}
    expected = 0
    for split, files in layout.splits.items():
        members = set(index.select(split).tolist())
        for name in files:
            for number in range(len(content[name]) // length):
                bytes_of = content[name][number * length :][:length]
                row = rows[f"{name.removesuffix('.bin')}/{number:05d}"]
                label = names[bytes_of[layout.label_bytes - 1]]
                assert row in members
                assert index.class_names[index.class_id[row]] == label
                image = read_image(index, reader, row)
                for y, x, channel in ((0, 0, 0), (0, 1, 0), (5, 31, 1), (31, 0, 2)):
                    place = layout.label_bytes + channel * 1024 + y * 32 + x
                    assert image[y, x, channel] == bytes_of[place]
                planes = np.concatenate([image[:, :, c].ravel() for c in range(3)])
                assert planes.tobytes() == bytes_of[layout.label_bytes :]
                expected += 1
    assert len(index) == expected == sum(len(v) // length for v in content.values())


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=lambda layout: layout.kind)
def test_packed_pixels_and_classes_are_those_of_the_archive(layout, tmp_path):
    content = files_of(layout)
    archive = archive_of(tmp_path / layout.archive, layout, content)
    index = pack_one(archive, tmp_path / "out")
    assert_equal_to_the_bytes(index, layout, content)
    counts = {"cifar10": {"train": 20, "seen": 5}, "cifar100": {"train": 4, "seen": 5}}
    assert index.metadata["samples_per_split"] == counts[layout.kind]
    assert index.metadata["source"]["kind"] == layout.kind


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=lambda layout: layout.kind)
def test_the_extracted_folder_is_the_same_data_set(layout, tmp_path):
    content = files_of(layout)
    archive = archive_of(tmp_path / "archive.tar.gz", layout, content, prefix="./")
    first = pack_one(archive, tmp_path / "a").fingerprint
    folder = folder_of(tmp_path / "extracted" / layout.folder, content)
    assert pack_one(folder, tmp_path / "b").fingerprint == first
    assert pack_one(folder.parent, tmp_path / "c").fingerprint == first
    assert pack_one(archive, tmp_path / "d", seed=1).fingerprint != first


def test_the_superclass_of_cifar100_is_kept_beside_the_class(tmp_path):
    folder = folder_of(tmp_path / "in", files_of(CIFAR100))
    pack_one(folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        texts = [tar.extractfile(m).read() for m in tar if m.name.endswith("train/00001.json")]
    described = json.loads(texts[0])
    assert described == {
        "label": "fine_007",
        "file": "train.bin",
        "record": 1,
        "coarse": "coarse_07",
    }


def test_no_member_is_written_by_its_name(tmp_path):
    """A name that climbs out of the folder is only a label of bytes."""
    content = files_of(CIFAR10)
    archive = archive_of(tmp_path / "x.tar.gz", CIFAR10, content, prefix="../../evil/")
    index = pack_one(archive, tmp_path / "deep" / "out")
    assert_equal_to_the_bytes(index, CIFAR10, content)
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar.gz", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}


def test_links_in_an_archive_are_not_followed(tmp_path):
    content = files_of(CIFAR10)
    secret = content.pop("test_batch.bin")
    (tmp_path / "secret").write_bytes(secret)
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(UsageError, match=r"cifar10 without test_batch\.bin"):
        pack_one(archive, tmp_path / "out")


def refusal(source, tmp_path) -> str:
    """The one line, before anything is written."""
    with pytest.raises(UsageError) as caught:
        pack_one(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=lambda layout: layout.kind)
def test_a_missing_member_is_named(layout, tmp_path):
    for name in layout.members:
        content = files_of(layout)
        del content[name]
        message = refusal(folder_of(tmp_path / f"without {name}", content), tmp_path)
        assert f"{layout.kind} without {name} (1 of" in message
        assert layout.archive in message


def test_a_file_cut_inside_a_record_is_refused(tmp_path):
    content = files_of(CIFAR100)
    content["test.bin"] = content["test.bin"][:-1]
    message = refusal(folder_of(tmp_path / "in", content), tmp_path)
    assert "test.bin has 15,369 bytes, expected a multiple of its records' 3,074" in message
    content["test.bin"] = b""
    assert "test.bin has 0 bytes" in refusal(folder_of(tmp_path / "empty", content), tmp_path)


def test_a_label_outside_the_names_is_refused(tmp_path):
    content = files_of(CIFAR10)
    content["data_batch_3.bin"] = record((9,), 0) + record((10,), 1)
    message = refusal(folder_of(tmp_path / "ten", content), tmp_path)
    assert "data_batch_3.bin: record 1 has label 10, expected 0..9" in message
    content = files_of(CIFAR100)
    content["train.bin"] += record((20, 5), 0)
    message = refusal(folder_of(tmp_path / "coarse", content), tmp_path)
    assert "train.bin: record 4 has label 20, expected 0..19" in message


def test_the_python_and_matlab_versions_are_refused_and_the_binary_one_is_named(tmp_path):
    versions = {
        "python10": ("cifar-10-batches-py", ["data_batch_1", "test_batch", "batches.meta"]),
        "python100": ("cifar-100-python", ["train", "test", "meta", "file.txt~"]),
        "matlab": ("cifar-10-batches-mat", ["data_batch_1.mat", "batches.meta.mat"]),
    }
    for kind, (folder, names) in versions.items():
        files = dict.fromkeys(names, b"\x80\x02")
        extracted = folder_of(tmp_path / kind / folder, files)
        archive = tmp_path / f"{kind}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(extracted, arcname=folder)
        wanted = "Matlab version" if kind == "matlab" else "python version"
        for source in (archive, extracted):
            message = refusal(source, tmp_path)
            assert wanted in message
            assert "cifar-10-binary.tar.gz" in message


def test_what_is_no_archive_of_one_data_set_is_refused(tmp_path):
    assert "no such file; get cifar-10-binary" in refusal(tmp_path / "absent", tmp_path)
    (tmp_path / "page.tar.gz").write_bytes(b"<html>404</html>")
    assert "no readable tar" in refusal(tmp_path / "page.tar.gz", tmp_path)
    whole = archive_of(tmp_path / "whole.tar.gz", CIFAR10, files_of(CIFAR10)).read_bytes()
    for size in (len(whole) // 2, len(whole) - 9):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:size])
        assert "no readable tar" in refusal(tmp_path / "cut.tar.gz", tmp_path)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # In gzip's checksum: what it covers is read before it.
    (tmp_path / "flipped.tar.gz").write_bytes(flipped)
    assert "CRC check failed" in refusal(tmp_path / "flipped.tar.gz", tmp_path)
    (tmp_path / "nothing").mkdir()
    assert "holds no file of CIFAR's binary version" in refusal(tmp_path / "nothing", tmp_path)
    for layout in (CIFAR10, CIFAR100):
        folder_of(tmp_path / "both" / layout.folder, files_of(layout))
    assert "holds CIFAR-10 and CIFAR-100" in refusal(tmp_path / "both", tmp_path)
    twice = folder_of(tmp_path / "twice", files_of(CIFAR10))
    folder_of(twice / CIFAR10.folder, files_of(CIFAR10))
    assert "holds two files batches.meta.txt" in refusal(twice, tmp_path)


def test_a_name_twice_would_merge_two_classes_and_is_refused(tmp_path):
    content = files_of(CIFAR10)
    content["batches.meta.txt"] = "\n".join([*NAMES10[:-1], "cat"]).encode()
    message = refusal(folder_of(tmp_path / "in", content), tmp_path)
    assert "batches.meta.txt has an empty line or a name twice" in message


def test_unofficial_counts_are_noted_and_packed_by_the_command(tmp_path, capsys):
    archive = archive_of(tmp_path / "x.tar.gz", CIFAR100, files_of(CIFAR100))
    parser = argparse.ArgumentParser()
    cifar_module.add_arguments(parser)
    arguments = parser.parse_args([str(archive), str(tmp_path / "out"), "--processes", "1"])
    assert cifar_module.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "note: train.bin holds 4 images, the official one 50,000" in printed
    assert "9 samples (seen 5, train 4)" in printed
    assert "names" not in printed


def test_two_processes_and_other_contents_keep_the_rules_of_a_pack(tmp_path):
    content = files_of(CIFAR10)
    folder = folder_of(tmp_path / "in", content)
    first = pack_one(folder, tmp_path / "a", shard_samples=7)
    second = pack_cifar(folder, tmp_path / "b", shard_samples=7, processes=2)
    assert second.fingerprint == first.fingerprint
    for tar in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / tar.name).read_bytes() == tar.read_bytes()
    (folder / "test_batch.bin").write_bytes(content["test_batch.bin"][3073:])
    with pytest.raises(UsageError, match="other parameters"):
        pack_one(folder, tmp_path / "a", shard_samples=7)
