"""Shards are written whole and deterministically, and scanned without trusting their content."""

from __future__ import annotations

import pickle
import tarfile

import pytest

from dist_dml.data.shards import scan_shard, split_name, write_shard
from dist_dml.errors import UsageError

IMAGE = b"\xff\xd8\xff pixels"
SAMPLES = [
    {"__key__": f"folder.x/{i:03d}", "jpg": IMAGE + bytes([i]), "cls": str(i).encode()}
    for i in range(6)
]


def test_a_shard_has_the_same_bytes_every_time(tmp_path):
    write_shard(tmp_path / "a.tar", SAMPLES)
    write_shard(tmp_path / "b.tar", iter(SAMPLES))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_scanned_offsets_point_at_the_bytes(tmp_path):
    path = tmp_path / "a.tar"
    assert write_shard(path, SAMPLES) == 6
    data = path.read_bytes()
    scanned = scan_shard(path)
    assert [s.key for s in scanned] == [s["__key__"] for s in SAMPLES]
    for sample, wanted in zip(scanned, SAMPLES, strict=True):
        image, label = sample.image, sample.labels["cls"]
        assert data[image.offset : image.offset + image.size] == wanted["jpg"]
        assert data[label.offset : label.offset + label.size] == wanted["cls"]


def test_an_interrupted_shard_never_has_its_final_name(tmp_path):
    def broken():
        yield SAMPLES[0]
        assert not (tmp_path / "a.tar").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", broken())
    assert list(tmp_path.iterdir()) == []


def test_names_of_more_than_100_bytes_survive(tmp_path):
    key = "class " + "x" * 300 + "/image"
    write_shard(tmp_path / "a.tar", [{"__key__": key, "jpg": IMAGE, "cls": b"1"}])
    assert scan_shard(tmp_path / "a.tar")[0].key == key


@pytest.mark.parametrize("name", ["a.jpg", "b/c.d/a.seg.PNG", "a", ".hidden.jpg", "x/._a.jpg"])
def test_names_split_as_webdataset_splits_them(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1024, 1536, 2048, 3000, 6 * 2048 - 512])
def test_a_tar_cut_anywhere_is_refused_by_name(tmp_path, cut):
    path = tmp_path / "cut.tar"
    write_shard(path, SAMPLES)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"cut\.tar") as caught:
        scan_shard(path)
    assert "\n" not in str(caught.value)


def test_a_tar_cut_at_the_end_of_its_last_member_is_refused(tmp_path):
    path = tmp_path / "cut.tar"
    write_shard(path, SAMPLES)
    last = scan_shard(path)[-1].image
    path.write_bytes(path.read_bytes()[: last.offset + 512])
    with pytest.raises(UsageError, match="cut short"):
        scan_shard(path)


def test_tars_joined_by_cat_are_refused_and_not_half_read(tmp_path):
    write_shard(tmp_path / "a.tar", SAMPLES)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data + data)
    with pytest.raises(UsageError, match="joined by cat"):
        scan_shard(tmp_path / "b.tar")


@pytest.mark.parametrize("content", [b"", b"garbage" * 500, b"\x1f\x8b\x08\x00" + b"x" * 600])
def test_something_else_than_a_tar_is_refused(tmp_path, content):
    (tmp_path / "no.tar").write_bytes(content)
    with pytest.raises(UsageError, match=r"no\.tar.*not an uncompressed tar"):
        scan_shard(tmp_path / "no.tar")


def test_a_missing_shard_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        scan_shard(tmp_path / "absent.tar")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", b"1")], "key a has no label"),
        ([("a.cls", b"1")], "key a has no image"),
        ([("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"1")], "key a has two images"),
        ([("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2")], r"key a has two \.jpg"),
    ],
)
def test_incomplete_or_repeated_keys_are_refused(tmp_path, make_tar, members, reason):
    path = make_tar(tmp_path / "s.tar", members)
    with pytest.raises(UsageError, match=reason) as caught:
        scan_shard(path)
    assert "s.tar" in str(caught.value)


def test_other_members_are_ignored_and_pickles_never_opened(tmp_path, make_tar):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    bomb = pickle.dumps(Bomb())
    members = [("a.jpg", b"1"), ("a.pyd", bomb), ("a.pkl", bomb), ("a.cls", b"7"), ("README", b"x")]
    scanned = scan_shard(make_tar(tmp_path / "s.tar", members))
    assert [(s.key, list(s.labels)) for s in scanned] == [("a", ["cls"])]


def test_pax_and_old_formats_are_read(tmp_path):
    for name, kind in {"pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}.items():
        path = tmp_path / f"{name}.tar"
        (tmp_path / "ä.jpg").write_bytes(IMAGE)
        (tmp_path / "ä.cls").write_bytes(b"3")
        with tarfile.open(path, "w", format=kind) as tar:
            tar.add(tmp_path / "ä.jpg", "ä.jpg")
            tar.add(tmp_path / "ä.cls", "ä.cls")
        (sample,) = scan_shard(path)
        start = sample.image.offset
        assert path.read_bytes()[start : start + sample.image.size] == IMAGE
