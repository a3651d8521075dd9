"""The quick writer and scanner of plain tars agree with webdataset's and the standard library's."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from webdataset.writer import TarWriter

from dist_dml.data import shards as shards_module
from dist_dml.data.shards import scan_shard, write_shard
from dist_dml.errors import UsageError


def samples_of(count, long_names):
    draw = np.random.default_rng(count)
    samples = []
    for number in range(count):
        image = draw.bytes(int(draw.integers(0, 1600)))
        key = f"c{number:08d}"
        if long_names and number % 3 == 0:
            key = ("ä" if number % 2 else "x") * (60 + number) + key
        samples.append({"__key__": key, "png": image, "cls": b"%d" % number})
    return samples


@pytest.mark.parametrize("long_names", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 9, 40])
def test_shards_have_the_bytes_of_webdatasets_writer(tmp_path, count, long_names):
    samples = samples_of(count, long_names)
    stream = io.BytesIO()
    with TarWriter(
        stream, user="dist_dml", group="dist_dml", mode=0o444, encoder=False, mtime=0
    ) as writer:
        for sample in samples:
            writer.write(dict(sample))
    assert write_shard(tmp_path / "a.tar", samples) == count
    assert (tmp_path / "a.tar").read_bytes() == stream.getvalue()


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_tars_of_all_formats_are_scanned_as_tarfile_reads_them(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for sample in samples_of(30, long_names=False):
            for extension in ("png", "cls"):
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                info.size = len(sample[extension])
                tar.addfile(info, io.BytesIO(sample[extension]))
    with path.open("rb") as stream:
        assert shards_module._plain_members(stream) == by_tarfile(path)


def test_other_tars_are_left_to_tarfile_and_give_the_same_samples(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_shard(path, samples_of(30, long_names=True))
    with path.open("rb") as stream:
        assert shards_module._plain_members(stream) is None
    plain = tmp_path / "b.tar"
    write_shard(plain, samples_of(30, long_names=False))
    quick = scan_shard(plain)
    monkeypatch.setattr(shards_module, "_plain_members", lambda stream: None)
    assert scan_shard(plain) == quick
    assert [(s.image.offset, s.image.size) for s in quick] == [
        row[1:] for row in by_tarfile(plain) if row[0].endswith("png")
    ]


@pytest.mark.parametrize("byte", [0, 100, 130, 150, 156, 257])
def test_a_flipped_bit_in_a_header_is_refused(tmp_path, byte):
    path = tmp_path / "a.tar"
    write_shard(path, [{"__key__": "a", "png": b"1", "cls": b"1"}] * 1)
    damaged = bytearray(path.read_bytes())
    damaged[1024 + byte] ^= 1  # The second member's header.
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"a\.tar"):
        scan_shard(path)
