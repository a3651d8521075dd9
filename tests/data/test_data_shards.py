"""Shards are written whole and deterministically, and scanned without trusting their content."""

from __future__ import annotations

import tarfile

import pytest

from dist_dml.data.index_command import build_index
from dist_dml.data.scanning import scan_shard
from dist_dml.data.shards import split_name, write_shard
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
    scan = scan_shard(path)
    assert scan.keys.to_pylist() == [s["__key__"] for s in SAMPLES]
    assert scan.labels.to_pylist() == [s["cls"].decode() for s in SAMPLES]
    for kind, member in {"": "jpg", "cls_": "cls"}.items():
        places = zip(scan.columns[f"{kind}offset"], scan.columns[f"{kind}size"], strict=True)
        assert [data[o : o + n] for o, n in places] == [s[member] for s in SAMPLES]
    assert set(scan.columns["json_offset"]) == {-1}
    assert not scan.left_out


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
    assert scan_shard(tmp_path / "a.tar").keys.to_pylist() == [key]


@pytest.mark.parametrize("name", ["a.jpg", "b/c.d/a.seg.PNG", "a", ".hidden.jpg", "x/._a.jpg"])
def test_names_split_as_webdataset_splits_them(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


def refusal(path):
    """The one line that refuses to index a shard."""
    with pytest.raises(UsageError) as caught:
        build_index(path, out=path.parent / "out")
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1024, 1536, 2048, 3000, 6 * 2048 - 512])
def test_a_tar_cut_anywhere_is_refused_by_name(tmp_path, cut):
    path = tmp_path / "cut.tar"
    write_shard(path, SAMPLES)
    path.write_bytes(path.read_bytes()[:cut])
    assert "cut short" in refusal(path)


def test_a_tar_cut_at_the_end_of_its_last_member_is_refused(tmp_path):
    path = tmp_path / "cut.tar"
    write_shard(path, SAMPLES)
    last = int(scan_shard(path).columns["offset"][-1])
    path.write_bytes(path.read_bytes()[: last + 512])
    assert "cut short" in refusal(path)


def test_tars_joined_by_cat_are_refused_and_not_half_read(tmp_path):
    write_shard(tmp_path / "a.tar", SAMPLES)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data + data)
    assert "joined by cat" in refusal(tmp_path / "b.tar")


@pytest.mark.parametrize("content", [b"", b"garbage" * 500, b"\x1f\x8b\x08\x00" + b"x" * 600])
def test_something_else_than_a_tar_is_refused(tmp_path, content):
    (tmp_path / "no.tar").write_bytes(content)
    assert "not an uncompressed tar" in refusal(tmp_path / "no.tar")


def test_a_missing_shard_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        scan_shard(tmp_path / "absent.tar")
    with pytest.raises(UsageError, match="is a folder"):
        scan_shard(tmp_path)


def test_pax_and_old_formats_are_read(tmp_path):
    for name, kind in {"pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}.items():
        path = tmp_path / f"{name}.tar"
        (tmp_path / "ä.jpg").write_bytes(IMAGE)
        (tmp_path / "ä.cls").write_bytes(b"3")
        with tarfile.open(path, "w", format=kind) as tar:
            tar.add(tmp_path / "ä.jpg", "ä.jpg")
            tar.add(tmp_path / "ä.cls", "ä.cls")
        scan = scan_shard(path)
        assert scan.keys.to_pylist() == ["ä"]
        start, size = int(scan.columns["offset"][0]), int(scan.columns["size"][0])
        assert path.read_bytes()[start : start + size] == IMAGE


def test_a_shard_without_samples_is_empty_and_whole(tmp_path):
    assert write_shard(tmp_path / "a.tar", []) == 0
    scan = scan_shard(tmp_path / "a.tar")
    assert len(scan.keys) == 0
    assert not scan.left_out
