"""RecordIO written byte by byte comes back whole; whatever is damaged is named with its byte."""

from __future__ import annotations

import argparse
import pickle
import struct

import numpy as np
import pytest
import simplejpeg
from tiny_images import image_of, png

from dist_dml.data.index import load_index
from dist_dml.data.pack import recordio as recordio_module
from dist_dml.data.pack.recordio import pack_recordio
from dist_dml.data.pack.recordio_images import check_range
from dist_dml.data.pack.recordio_reader import read_idx, read_record, scan_offsets, unpack
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)


def framed(data: bytes) -> bytes:
    """One record: cut wherever the magic number stands at a multiple of 4 bytes of the data."""
    places = [i for i in range(0, len(data) // 4 * 4, 4) if data[i : i + 4] == MAGIC_BYTES]
    pieces, start = [], 0
    for place in places:
        pieces.append(data[start:place])
        start = place + 4
    pieces.append(data[start:])
    written = b""
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        part = 0 if len(pieces) == 1 else (3 if last else (1 if number == 0 else 2))
        word = part << 29 | len(piece)
        written += struct.pack("<II", MAGIC, word) + piece + bytes(-len(piece) % 4)
    return written


def image_record(key: int, labels: list[float], image: bytes, flag: int | None = None) -> bytes:
    """Data of a record: one label goes into the header, several behind it."""
    many = len(labels) > 1 if flag is None else flag > 0
    header = struct.pack("<IfQQ", len(labels) if many else 0, 0.0 if many else labels[0], key, 0)
    return header + (struct.pack(f"<{len(labels)}f", *labels) if many else b"") + image


def jpeg(number: int) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image_of(number)), 95, "RGB", "444")


def write_rec(folder, records: list[tuple[int, bytes]], prop: str = "", idx: bool = True):
    """Records of (key, data) as `train.rec` with its `.idx`, and `property`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, content = [], b""
    for key, data in records:
        lines.append(f"{key}\t{len(content)}\n")
        content += framed(data)
    (folder / "train.rec").write_bytes(content)
    if idx:
        (folder / "train.idx").write_text("".join(lines))
    if prop:
        (folder / "property").write_text(prop)
    return folder


LABELS = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]


def insightface(labels=LABELS, images=jpeg) -> list[tuple[int, bytes]]:
    """Record 0, the images, then a record per identity with the range of its images."""
    count, classes = len(labels), sorted(set(labels))
    head = [float(count + 1), float(count + 1 + len(classes))]
    records = [(0, image_record(0, head, b""))]
    records += [
        (i + 1, image_record(i + 1, [float(c), 1.0], images(i))) for i, c in enumerate(labels)
    ]
    for number, label in enumerate(classes):
        keys = [i + 1 for i, c in enumerate(labels) if c == label]
        span = [float(keys[0]), float(keys[-1] + 1)]
        records.append((count + 1 + number, image_record(0, span, b"")))
    return records


def pack_one(src, out, **options):
    return pack_recordio(src, out, processes=1, **options)


def stored(index) -> dict[int, tuple[str, bytes]]:
    """Class and image bytes by the key of the record."""
    found = {}
    for row in range(len(index)):
        shard = index.shard_path(int(index.shard[row])).read_bytes()
        data = shard[index.offset[row] :][: index.size[row]]
        found[int(index.key(row))] = (index.class_names[index.class_id[row]], data)
    return found


def refusal(src, tmp_path, **options) -> str:
    with pytest.raises(UsageError) as caught:
        pack_one(src, tmp_path / "refused", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_image_of_insightfaces_layout_comes_once_with_its_label(tmp_path):
    src = write_rec(tmp_path / "faces", insightface(), "4,20,24")
    index = pack_one(src, tmp_path / "out", shard_samples=5)
    expected = {i + 1: (str(c), jpeg(i)) for i, c in enumerate(LABELS)}
    assert stored(index) == expected
    assert index.split_names == ("train",)
    assert index.num_classes == 4
    reader = open_reader(index, 3)
    assert read_image(index, reader, 0).shape == (20, 24, 3)
    assert index.metadata["source"]["property"] == [4, 20, 24]


def test_without_idx_the_file_is_scanned_to_the_same_images(tmp_path, capsys):
    records = insightface()
    with_idx = pack_one(write_rec(tmp_path / "a", records), tmp_path / "outa")
    without = pack_one(write_rec(tmp_path / "b", records, idx=False), tmp_path / "outb")
    assert stored(without) == stored(with_idx)
    assert "train.rec is scanned" in capsys.readouterr().err


def test_files_of_im2rec_have_an_image_in_record_0_and_their_label_in_the_header(tmp_path):
    records = [(i, image_record(i, [float(c)], jpeg(i))) for i, c in enumerate(LABELS)]
    index = pack_one(write_rec(tmp_path / "src", records), tmp_path / "out")
    assert stored(index) == {i: (str(c), jpeg(i)) for i, c in enumerate(LABELS)}


def test_shuffled_keys_and_png_images_are_found_by_the_idx(tmp_path):
    records = [(90 - i, image_record(i, [float(i % 2)], png(image_of(i)))) for i in range(6)]
    index = pack_one(write_rec(tmp_path / "src", records), tmp_path / "out")
    assert stored(index) == {90 - i: (str(i % 2), png(image_of(i))) for i in range(6)}


def with_magic(number: int, *places: int) -> bytes:
    """A JPEG's start, then bytes with the magic number at some places of the record's data."""
    data = bytearray(b"\xff\xd8\xff\xe0" + np.random.default_rng(number).bytes(160 + number))
    for place in places:
        start = place - 32  # Header and two labels come first.
        data[start : start + 4] = MAGIC_BYTES
    return bytes(data)


@pytest.mark.parametrize(
    "places", [(40,), (40, 44), (40, 100), (36,), (36, 40, 44, 48, 160), (41,), (43, 60)]
)
def test_records_of_several_parts_are_joined_with_the_magic_between(tmp_path, places):
    """A magic number off the multiples of 4 is no cut."""

    def image(number: int) -> bytes:
        return with_magic(number, *places) if number % 3 == 1 else jpeg(number)

    src = write_rec(tmp_path / "src", insightface(images=image))
    parts = (src / "train.rec").read_bytes().count(MAGIC_BYTES)
    aligned = sum(place % 4 == 0 for place in places)
    several = sum(i % 3 == 1 for i in range(len(LABELS)))
    assert parts == len(insightface()) + several * len(places)
    index = pack_one(src, tmp_path / "out")
    assert stored(index) == {i + 1: (str(c), image(i)) for i, c in enumerate(LABELS)}
    (src / "train.idx").unlink()
    offsets = scan_offsets(src / "train.rec")
    assert len(offsets) == len(insightface())
    assert aligned or parts > 0
    assert stored(pack_one(src, tmp_path / "out2")) == stored(index)


def test_a_cut_inside_the_header_and_labels_is_joined(tmp_path):
    """The id of a record can be the magic number as well."""
    data = struct.pack("<IfQQ", 0, 7.0, MAGIC, MAGIC << 32) + jpeg(0)
    records = [(0, image_record(0, [6.0], jpeg(1))), (1, data)]
    assert framed(data).count(MAGIC_BYTES) == 3
    index = pack_one(write_rec(tmp_path / "src", records), tmp_path / "out")
    assert stored(index) == {0: ("6", jpeg(1)), 1: ("7", jpeg(0))}


def test_classes_can_be_held_out_and_labels_need_not_be_contiguous(tmp_path, capsys):
    labels = [c for c in (3, 17, 40, 100, 5000, 70000) for _ in range(8)]
    src = write_rec(tmp_path / "src", insightface(labels))
    index = pack_one(src, tmp_path / "out", test_fraction=0.5, seen_per_class=2)
    by_split = {
        name: {index.class_names[c] for c in index.class_id[index.select(name)]}
        for name in ("train", "seen", "test")
    }
    assert by_split["train"] == by_split["seen"]
    assert len(by_split["train"]) == len(by_split["test"]) == 3
    assert not by_split["train"] & by_split["test"]
    assert len(index.select("seen")) == 6
    assert "labels are not 0..5; classes are numbered by their order" in capsys.readouterr().err
    assert [int(c) for c in index.class_names[:3]] == sorted(map(int, by_split["train"]))


def test_an_interrupted_pack_goes_on_and_another_seed_is_refused(tmp_path):
    src = write_rec(tmp_path / "src", insightface())
    first = pack_one(src, tmp_path / "out", shard_samples=4)
    tars = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-000001.tar").unlink()
    assert pack_one(src, tmp_path / "out", shard_samples=4).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == tars
    with pytest.raises(UsageError, match=r"seed=0 \(now 1\)"):
        pack_one(src, tmp_path / "out", shard_samples=4, seed=1)


def test_every_cut_of_the_file_is_refused_with_a_byte(tmp_path):
    src = write_rec(tmp_path / "src", insightface())
    whole = (src / "train.rec").read_bytes()
    _, offsets = read_idx(src / "train.idx")
    for size in (len(whole) - 1, len(whole) // 2, 45, 7, 1):
        (src / "train.rec").write_bytes(whole[:size])
        message = refusal(src, tmp_path)
        assert "byte " in message
        place = int(message.partition("byte ")[2].partition(":")[0].replace(",", ""))
        assert place in offsets.tolist()
        with pytest.raises(UsageError, match="byte "):
            scan_offsets(src / "train.rec")
    (src / "train.rec").write_bytes(b"")
    assert "byte 0" in refusal(src, tmp_path)
    (src / "train.idx").unlink()
    assert "holds no record" in refusal(src, tmp_path)
    (src / "train.rec").write_bytes(whole[: int(offsets[4])])
    assert "record 0 promises 12 images, 3 are there" in refusal(src, tmp_path)
    assert not (tmp_path / "refused").exists()


def test_wrong_bytes_are_refused_where_they_stand(tmp_path):
    src = write_rec(tmp_path / "src", insightface())
    whole = (src / "train.rec").read_bytes()
    _, offsets = read_idx(src / "train.idx")
    third = int(offsets[3])
    for place, new, expected in (
        (0, b"\0\0\0\0", "expected a record's ced7230a"),
        (4, struct.pack("<I", (1 << 29) - 1), "is cut short"),
        (4, struct.pack("<I", 20), "is cut short"),
        (4, struct.pack("<I", 3 << 29 | 40), "out of order"),
        (8, struct.pack("<I", 1 << 30), "is cut short"),
        (32, struct.pack("<f", 0.5), "label 0.5 is no integer"),
        (32, struct.pack("<f", -1), "label -1.0 is no integer"),
        (32, struct.pack("<f", float("nan")), "label nan is no integer"),
        (32, struct.pack("<f", 3e7), "is no integer in 0..2^24-1"),
    ):
        changed = bytearray(whole)
        changed[third + place : third + place + len(new)] = new
        (src / "train.rec").write_bytes(changed)
        message = refusal(src, tmp_path)
        assert expected in message
        assert f"byte {third:,}:" in message
    changed = bytearray(whole)
    changed[third + 40 : third + 43] = b"GIF"
    (src / "train.rec").write_bytes(changed)
    with pytest.raises(UsageError, match=rf"byte {third:,}: record 3 holds no JPEG"):
        pack_one(src, tmp_path / "out")


def test_a_promised_image_that_is_missing_is_named(tmp_path):
    records = insightface()
    records[3] = (3, image_record(3, [1.0, 1.0], b""))
    src = write_rec(tmp_path / "src", records)
    assert "record 3 has no image" in refusal(src, tmp_path)
    lone = [(i, image_record(i, [0.0], jpeg(i) if i != 2 else b"")) for i in range(4)]
    assert "a record without image, and no record 0" in refusal(
        write_rec(tmp_path / "lone", lone), tmp_path
    )


def test_the_rounding_of_record_0_neither_refuses_nor_hides_a_loss(tmp_path):
    """17,091,659 is no float32: record 0 of 17,091,658 images says 17,091,660."""
    count = 17_091_658
    limits = np.array([count + 1, count + 10], np.float32)
    assert int(limits[0]) == count + 2
    keys = np.arange(count + 1)
    empty = np.zeros(count + 1, bool)
    empty[0] = True
    check_range(tmp_path, keys, keys, empty, limits)
    empty[1_000_000] = True
    with pytest.raises(UsageError, match="record 1000000 has no image"):
        check_range(tmp_path, keys, keys, empty, limits)
    with pytest.raises(UsageError, match="record 0 promises"):
        check_range(tmp_path, keys[:-3], keys[:-3], empty[:-3] & (keys[:-3] == 0), limits)


def test_a_damaged_idx_is_refused_and_the_scan_recommended(tmp_path):
    src = write_rec(tmp_path / "src", insightface())
    good = (src / "train.idx").read_text()
    for text, expected in (
        ("no index\n", "expected lines of key, tab, byte offset"),
        (good.replace("3\t", "x\t", 1), "expected lines of key, tab, byte offset"),
        (good + good.splitlines()[0] + "\n", "a key or an offset twice"),
        (good.replace("0\t0\n", "0\t-8\n", 1), "or one below 0"),
        (good.replace("0\t0\n", "0\t4\n", 1), "byte 4: found"),
        (good + "99\t9999999\n", "byte 9,999,999: a record should be here"),
    ):
        (src / "train.idx").write_text(text)
        assert expected in refusal(src, tmp_path)


def test_property_and_published_counts_are_compared(tmp_path, capsys):
    src = write_rec(tmp_path / "src", insightface(), "85742,112,112")
    pack_one(src, tmp_path / "out")
    noted = capsys.readouterr().err
    assert "4 classes, published are 85,742" in noted
    assert "(MS1MV2): 12 images, published are 5,822,653" in noted
    assert "--strict-counts" in refusal(src, tmp_path, strict_counts=True)
    (src / "property").write_text("85742;112")
    assert "expected num_classes,height,width" in refusal(src, tmp_path)


def test_pickles_are_never_opened(tmp_path, capsys):
    """The pickle writes a file when it is loaded: it must not appear."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    src = write_rec(tmp_path / "src", insightface())
    (src / "lfw.bin").write_bytes(pickle.dumps(Evil()))
    message = refusal(src / "lfw.bin", tmp_path)
    assert "verification sets (.bin) are pickles" in message
    pack_one(src, tmp_path / "out")
    assert "lfw.bin: left out" in capsys.readouterr().err
    assert not (tmp_path / "opened").exists()


def test_a_missing_file_is_named_with_the_expected_layout(tmp_path):
    (tmp_path / "src").mkdir()
    message = refusal(tmp_path / "src", tmp_path)
    assert "train.rec: no such .rec file; expected a folder with train.rec, train.idx" in message
    assert "no such .rec file" in refusal(tmp_path / "absent.rec", tmp_path)


def test_a_record_is_read_by_its_offset_alone(tmp_path):
    src = write_rec(tmp_path / "src", insightface())
    _, offsets = read_idx(src / "train.idx")
    with (src / "train.rec").open("rb") as stream:
        data, end = read_record(stream.fileno(), int(offsets[5]), src / "train.rec")
    assert end == offsets[6]
    assert unpack(data, src, 0) == ((1.0, 1.0), jpeg(4))
    with pytest.raises(UsageError, match="shorter than its header says"):
        unpack(data[:30], src, 0)


def test_the_command_packs_resizes_and_reports(tmp_path, capsys):
    src = write_rec(tmp_path / "src", insightface(), "4,20,24")
    parser = argparse.ArgumentParser()
    recordio_module.add_arguments(parser)
    arguments = parser.parse_args(
        [str(src / "train.rec"), str(tmp_path / "out"), "--resize=10", "--processes=1"]
    )
    assert arguments.shard_samples == 10_000
    assert recordio_module.run(arguments) == 0
    assert "12 samples (train 12), 4 training classes" in capsys.readouterr().out
    index = load_index(tmp_path / "out")
    assert read_image(index, open_reader(index, 3), 0).shape == (10, 12, 3)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    src = write_rec(tmp_path / "src", insightface())
    first = pack_recordio(src, tmp_path / "a", shard_samples=4, processes=1)
    second = pack_recordio(src, tmp_path / "b", shard_samples=4, processes=2)
    assert second.fingerprint == first.fingerprint
    for tar in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / tar.name).read_bytes() == tar.read_bytes()
