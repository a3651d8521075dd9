"""Damage is refused by name, or left out, counted and listed; never passed over."""

from __future__ import annotations

import argparse
import json
import pickle

import pyarrow.parquet as parquet
import pytest
from tiny_images import image_of, png

from dist_dml.data import index_command
from dist_dml.data.image_header import image_size
from dist_dml.data.index import load_index
from dist_dml.data.index_command import ScanOptions, build_index, describe
from dist_dml.data.scanning import PICKLE_EXTENSIONS, scan_shard
from dist_dml.data.shards import write_shard
from dist_dml.errors import UsageError

SKIP = ScanOptions(damaged="skip")
GOOD = [("g.jpg", b"1"), ("g.cls", b"7")]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


DAMAGES = {
    "no label": ([("a.jpg", b"1")], "a", "no_label", "key a has no label"),
    "no image": ([("a.cls", b"1")], "a", "no_image", "key a has no image"),
    "two images": (
        [("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"1")],
        "a",
        "two_images",
        r"key a has two images \(\.jpg and \.png\)",
    ),
    "duplicate key": (
        [("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"1"), ("b.cls", b"1"), ("a.jpg", b"2")],
        "a",
        "duplicate_key",
        r"key a has two \.jpg",
    ),
    "duplicate label": (
        [("a.jpg", b"1"), ("a.cls", b"1"), ("a.cls", b"2")],
        "a",
        "duplicate_key",
        r"key a has two \.cls",
    ),
    "label of other bytes": (
        [("a.jpg", b"1"), ("a.cls", b"\xff\xfe")],
        "a",
        "label_not_text",
        r"key a: \.cls is not UTF-8",
    ),
    "empty label": ([("a.jpg", b"1"), ("a.cls", b" ")], "a", "bad_label", "empty label"),
    "broken json": ([("a.jpg", b"1"), ("a.json", b"{")], "a", "bad_label", "not valid JSON"),
    "deep json": ([("a.jpg", b"1"), ("a.json", b"[" * 10**5)], "a", "bad_label", "not valid JSON"),
    "json without label": (
        [("a.jpg", b"1"), ("a.json", b'{"x": 1}')],
        "a",
        "no_label",
        "it has: x.*--label-key",
    ),
    "label of another type": (
        [("a.jpg", b"1"), ("a.json", b'{"label": [1]}')],
        "a",
        "bad_label",
        "neither an integer nor a name",
    ),
    "half a character": (
        [("a.jpg", b"1"), ("a.json", b'{"label": "\\ud800"}')],
        "a",
        "label_not_text",
        "not text",
    ),
    "name of other bytes": (
        [("\udcff.jpg", b"1"), ("\udcff.cls", b"1")],
        r"\udcff",
        "bad_name",
        "is not UTF-8",
    ),
    **{
        f"pickle .{extension}": (
            [("a.jpg", b"1"), ("a.cls", b"1"), (f"a.{extension}", pickle.dumps(Bomb()))],
            "a",
            "pickle",
            rf"key a has a \.{extension} member",
        )
        for extension in (*sorted(PICKLE_EXTENSIONS), "meta.pkl", "PKL".lower())
    },
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_refused_in_one_line_or_left_out_and_listed(tmp_path, make_tar, name):
    members, key, reason, message = DAMAGES[name]
    tar = make_tar(tmp_path / "s.tar", [*GOOD, *members])
    with pytest.raises(UsageError, match=message) as caught:
        build_index(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    assert "s.tar" in line
    assert "--damaged skip" in line
    index = build_index(tmp_path, options=SKIP)
    sound = {"g"} | ({"b"} if name == "duplicate key" else set())
    assert {index.key(i) for i in range(len(index))} == sound
    assert index.metadata["left_out"] == {reason: 1}
    (row,) = parquet.read_table(tmp_path / "left_out.parquet").to_pylist()
    assert (row["shard"], row["key"], row["reason"]) == ("s.tar", key, reason)
    first = dict(members)[members[0][0]] if name != "duplicate key" else b"1"
    assert tar.read_bytes()[row["offset"] :].startswith(first)
    assert f"left out: {reason} 1" in describe(index)
    assert load_index(tmp_path).metadata["left_out"] == {reason: 1}


def test_pickles_are_never_opened(tmp_path, make_tar, monkeypatch):
    bomb = pickle.dumps(Bomb())
    members = [("a.jpg", b"1"), ("a.pyd", bomb), ("a.cls", b"7"), ("b.pt", bomb), ("README", b"x")]
    make_tar(tmp_path / "s.tar", [*members, *GOOD])
    index = build_index(tmp_path, options=SKIP)
    assert [index.key(i) for i in range(len(index))] == ["g"]
    assert index.metadata["left_out"] == {"pickle": 2}


def test_other_members_are_ignored(tmp_path, make_tar):
    other = [("g.txt", b"a caption"), ("g.npy", b"\x93NUMPY"), ("x.mp4", bytes(9000)), ("R", b"x")]
    scan = scan_shard(make_tar(tmp_path / "s.tar", [*other, *GOOD]))
    assert scan.keys.to_pylist() == ["g"]
    assert not scan.left_out


@pytest.mark.parametrize("order", [("jpg", "cls"), ("cls", "jpg"), ("json", "jpg", "cls")])
def test_no_cut_makes_a_sample_of_what_is_left(tmp_path, make_tar, order):
    """Cut at every block: only samples that are followed by another are known to be whole."""
    contents = {"jpg": b"1" * 700, "cls": b"7", "json": json.dumps({"label": "wrong"}).encode()}
    members = [(f"{key}.{name}", contents[name]) for key in "abc" for name in order]
    tar = make_tar(tmp_path / "s.tar", members)
    whole = tar.read_bytes()
    starts = {key: whole.index(f"{key}.{order[0]}".encode()) for key in "abc"}
    end = whole.rindex(b"c." + order[-1].encode()) + 512
    end += -(-len(contents[order[-1]]) // 512) * 512
    for cut in range(0, end + 1, 256):
        tar.write_bytes(whole[:cut])
        scan = scan_shard(tar)
        sound = [k for k, after in (("a", "b"), ("b", "c")) if cut >= starts[after] + 512]
        # The first member of the next key tells that the one before is complete.
        found = scan.keys.to_pylist()
        assert found in (sound, sound[:-1])
        assert set(scan.labels.to_pylist()) <= {"7"}
        assert scan.left_out[0].key == ""
        assert scan.left_out[0].reason in ("cut_short", "not_a_tar")


def test_a_truncated_tar_is_refused_or_loses_its_end_which_is_counted(tmp_path):
    samples = [{"__key__": f"k{i}", "png": png(image_of(i)), "cls": b"c"} for i in range(10)]
    write_shard(tmp_path / "train-000000.tar", samples)
    whole = (tmp_path / "train-000000.tar").read_bytes()
    write_shard(tmp_path / "train-000001.tar", samples)
    (tmp_path / "train-000001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"train-000001\.tar: cut short at byte \d+"):
        build_index(tmp_path)
    index = build_index(tmp_path, options=SKIP)
    assert 10 < len(index) < 20
    assert sum(index.metadata["left_out"].values()) == 2  # The shard's end, and the last sample.
    rows = parquet.read_table(tmp_path / "left_out.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["", f"k{len(index) - 10}"]


def test_a_flipped_bit_in_a_header_loses_what_follows_and_says_so(tmp_path):
    samples = [{"__key__": f"k{i}", "jpg": b"1", "cls": b"c"} for i in range(5)]
    write_shard(tmp_path / "a.tar", samples)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[3 * 2048 + 3] ^= 1  # The name of the fourth sample's first member.
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UsageError, match="damaged at byte 6144"):
        build_index(tmp_path)
    index = build_index(tmp_path, options=SKIP)
    assert [index.key(i) for i in range(len(index))] == ["k0", "k1"]
    assert index.metadata["left_out"] == {"cut_short": 1, "damaged_header": 1}


def test_what_was_left_out_is_forgotten_when_it_is_repaired(tmp_path, make_tar):
    make_tar(tmp_path / "s.tar", [*GOOD, ("a.jpg", b"1")])
    build_index(tmp_path, options=SKIP)
    assert (tmp_path / "left_out.parquet").exists()
    make_tar(tmp_path / "s.tar", [*GOOD, ("a.jpg", b"1"), ("a.cls", b"1")])
    index = build_index(tmp_path, options=SKIP)
    assert len(index) == 2
    assert "left_out" not in index.metadata
    assert not (tmp_path / "left_out.parquet").exists()


def test_a_kept_scan_with_damage_is_refused_as_a_fresh_one(tmp_path, make_tar):
    make_tar(tmp_path / "s.tar", [*GOOD, ("a.jpg", b"1")])
    lines = []
    for options in (None, SKIP, None):
        try:
            build_index(tmp_path, options=options)
        except UsageError as error:
            lines.append(str(error))
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_a_data_set_of_damage_alone_is_refused_with_its_reasons(tmp_path, make_tar):
    make_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("b.cls", b"1")])
    with pytest.raises(UsageError, match=r"no samples \(left out: no_image 1, no_label 1\)"):
        build_index(tmp_path, options=SKIP)


def test_the_command_counts_what_is_left_out_and_notes_what_is_no_image(tmp_path, make_tar, capsys):
    make_tar(tmp_path / "s.tar", [*GOOD, ("a.jpg", b"1")])
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    assert index_command.run(parser.parse_args([str(tmp_path), "--damaged", "skip"])) == 0
    printed = capsys.readouterr().out
    assert "left out: no_label 1" in printed
    assert "left_out.parquet" in printed
    assert "1 images have no header" in printed


def encoded(kind):
    import io

    from PIL import Image

    stream = io.BytesIO()
    options = {"WEBP lossless": ("WEBP", {"lossless": True}), "progressive": ("JPEG", {})}
    name, extra = options.get(kind, (kind, {}))
    extra = {**extra, "progressive": True} if kind == "progressive" else extra
    if kind == "JPEG with thumbnail":
        name = "JPEG"
        inner = io.BytesIO()
        Image.fromarray(image_of(1)).resize((8, 6)).save(inner, "JPEG")
        extra = {"exif": b"Exif\0\0" + inner.getvalue()}
    if kind == "WEBP with alpha":
        name = "WEBP"
        Image.fromarray(image_of(0)).convert("RGBA").resize((24, 20)).save(stream, name, exif=b"x")
    else:
        Image.fromarray(image_of(0)).save(stream, name, **extra)
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        "PNG",
        "JPEG",
        "progressive",
        "JPEG with thumbnail",
        "WEBP",
        "WEBP lossless",
        "WEBP with alpha",
    ],
)
def test_headers_state_the_size_and_no_prefix_of_one_fails(kind):
    data = encoded(kind)
    assert image_size(data) == (20, 24)
    for cut in range(min(len(data), 700)):
        assert image_size(data[:cut]) in ((0, 0), (20, 24))


def test_what_is_no_image_has_no_size():
    for data in (b"", b"hello", b"\xff\xd8\xff", b"RIFF1234WEBPVP9 " + bytes(30), b"GIF89a" * 9):
        assert image_size(data) == (0, 0)
