"""The quick writer and scanner of plain tars agree with webdataset's and the standard library's."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from webdataset.writer import TarWriter

from dist_dml.data.shards import write_shard
from dist_dml.data.tar_members import ForwardReader, TarDamage, walk_members


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
        return [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isreg()]


def walked(path):
    with path.open("rb") as stream:
        return [tuple(member) for member in walk_members(ForwardReader(stream, seeks=True))]


KINDS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("long_names", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tars_of_all_formats_are_walked_as_tarfile_reads_them(tmp_path, kind, long_names):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for number, sample in enumerate(samples_of(30, long_names)):
            for extension in ("png", "cls"):
                name = f"{sample['__key__']}.{extension}"
                if kind == tarfile.USTAR_FORMAT and long_names:
                    name = f"{'folder/' * 20}{number}.{extension}"  # Goes into the prefix.
                info = tarfile.TarInfo(name)
                info.size = len(sample[extension])
                info.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(sample[extension]))
    assert walked(path) == by_tarfile(path)
    assert len(walked(path)) == 60


def test_folders_links_global_headers_and_large_numbers_are_walked_as_tarfile_reads_them(tmp_path):
    path = tmp_path / "a.tar"
    options = {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "ä" * 600}}
    with tarfile.open(path, "w", **options) as tar:
        for name, kind in {
            "x": tarfile.DIRTYPE,
            "a.png": tarfile.REGTYPE,
            "l": tarfile.SYMTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png" * 40
            info.size = 700 if kind == tarfile.REGTYPE else 0
            info.uid = 8**8  # Does not fit its field.
            tar.addfile(info, io.BytesIO(bytes(700)))
        old = tarfile.TarInfo("old.cls")
        old.type, old.size = tarfile.AREGTYPE, 3
        tar.addfile(old, io.BytesIO(b"abc"))
    assert walked(path) == by_tarfile(path)
    assert [member[0] for member in walked(path)] == ["a.png", "old.cls"]


def test_a_size_in_base_256_is_read(tmp_path):
    """GNU tar writes sizes from 8 GiB on as binary numbers."""
    path = tmp_path / "a.tar"
    write_shard(path, [{"__key__": "a", "png": b"1" * 600, "cls": b"1"}])
    wanted = walked(path)
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\x80" + (600).to_bytes(11, "big")
    head = bytes(data[1024:1536])
    total = sum(head) - sum(head[148:156]) + 8 * 32
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    assert walked(path) == wanted == by_tarfile(path)


@pytest.mark.parametrize("byte", [0, 100, 130, 150, 156, 257, 300, 400, 511])
def test_a_flipped_bit_in_a_header_is_refused(tmp_path, byte):
    path = tmp_path / "a.tar"
    write_shard(path, [{"__key__": "a", "png": b"1", "cls": b"1"}] * 1)
    damaged = bytearray(path.read_bytes())
    damaged[1024 + byte] ^= 1  # The second member's header.
    path.write_bytes(damaged)
    with pytest.raises(TarDamage, match="byte 1024") as caught:
        walked(path)
    assert caught.value.kind == "damaged_header"


def test_a_sparse_file_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(TarDamage, match="without -S"):
        walked(path)


def test_a_stream_that_returns_little_at_a_time_gives_the_same_members(tmp_path):
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 300))

    path = tmp_path / "a.tar"
    write_shard(path, samples_of(9, long_names=True))
    stream = Trickle(path.read_bytes())
    members = walk_members(ForwardReader(stream, seeks=False))
    assert [tuple(member) for member in members] == by_tarfile(path)
