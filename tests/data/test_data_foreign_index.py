"""Other tools' indexes are read, checked against the tar, and DALI's is written to the letter."""

from __future__ import annotations

import argparse
import struct
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from webdataset.writer import TarWriter

from dist_dml.data import index_command
from dist_dml.data.dali_export import export_dali
from dist_dml.data.index_command import ScanOptions, build_index
from dist_dml.errors import UsageError

NAMES = ("jpg", "json", "txt")


def write_tar(path, count=6, label=True):
    """As img2dataset writes one, with webdataset's writer: every member has an extended header."""
    with TarWriter(str(path)) as writer:
        for i in range(count):
            sample = {"__key__": f"{i:09d}", "jpg": b"%d" % i * 700, "txt": f"caption {i}"}
            sample["json"] = {"label": f"c{i % 3}"} if label else {"width": 1}
            writer.write(sample)
    return path


def members_of(path):
    with tarfile.open(path) as tar:
        return [m for m in tar if m.isreg()]


def write_dali(path, version="v1.2"):
    """What `wds2idx` writes, from the description of its format."""
    lines, last = [], None
    for member in members_of(path):
        key, _, extension = member.name.partition(".")
        if key != last:
            lines.append([])
        last = key
        name = [member.name] if version == "v1.2" else []
        lines[-1] += [extension, str(member.offset_data), str(member.size), *name]
    text = "".join(" ".join(line) + "\n" for line in lines)
    path.with_suffix(".idx").write_text(f"{version} {len(lines)}\n{text}")


def write_energon(path):
    """An unsigned number of 64 bits for the first header of each sample, and the end."""
    starts, last = [], None
    for member in members_of(path):
        key = member.name.partition(".")[0]
        if key != last:
            starts.append(member.offset)
        last = key
    with tarfile.open(path) as tar:
        list(tar)
        starts.append(tar.offset)
    path.with_suffix(".tar.idx").write_bytes(struct.pack(f"<{len(starts)}Q", *starts))


def write_img2dataset(path, count=6, **changes):
    failed = {"key": "000000099", "status": "failed_to_download", "width": None, "category": None}
    rows = [
        {"key": f"{i:09d}", "status": "success", "width": 3, "category": f"k{i % 2}"}
        for i in range(count)
    ]
    columns = {name: [row[name] for row in [*rows, failed]] for name in failed}
    columns.update(changes)
    parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))


WRITERS = {"dali": write_dali, "energon": write_energon}


@pytest.mark.parametrize("kind", ["dali", "energon"])
def test_an_index_that_agrees_gives_the_scan_without_it(tmp_path, kind):
    tar = write_tar(tmp_path / "a.tar")
    plain = build_index(tar, out=tmp_path / "plain")
    WRITERS[kind](tar)
    index = build_index(tar, out=tmp_path / "out", options=ScanOptions(start=kind))
    assert index.fingerprint == plain.fingerprint
    assert np.array_equal(index.offset, plain.offset)


def test_dalis_version_without_names_and_its_odd_files_are_read(tmp_path):
    tar = tmp_path / "a.tar"
    write_tar(tar)
    write_dali(tar, "v1.1")
    assert len(build_index(tmp_path, options=ScanOptions(start="dali"))) == 6
    write_dali(tar)
    text = tar.with_suffix(".idx").read_text().replace("v1.2 6", "v1.2 7")
    tar.with_suffix(".idx").write_text(text + "README 99999 3 README\n")
    assert len(build_index(tmp_path, options=ScanOptions(start="dali"))) == 6


@pytest.mark.parametrize("kind", ["dali", "energon"])
@pytest.mark.parametrize("count", [5, 7])
def test_an_index_of_an_older_tar_is_refused_in_one_line(tmp_path, kind, count):
    WRITERS[kind](write_tar(tmp_path / "a.tar", count))
    write_tar(tmp_path / "a.tar")
    with pytest.raises(
        UsageError, match=r"a\.(tar\.)?idx: disagrees with shard .*a\.tar"
    ) as caught:
        build_index(tmp_path, options=ScanOptions(start=kind))
    assert "\n" not in str(caught.value)
    assert "leave out --from" in str(caught.value)


def test_every_number_of_an_index_is_checked(tmp_path):
    tar = write_tar(tmp_path / "a.tar")
    write_dali(tar)
    text = tar.with_suffix(".idx").read_text()
    first = text.split()[2:6]
    for field, other in ((1, str(int(first[1]) + 512)), (2, "3"), (3, "b.jpg")):
        changed = [*first[:field], other, *first[field + 1 :]]
        tar.with_suffix(".idx").write_text(text.replace(" ".join(first), " ".join(changed), 1))
        with pytest.raises(UsageError, match="disagrees"):
            build_index(tmp_path, options=ScanOptions(start="dali"))
    write_energon(tar)
    path = tar.with_suffix(".tar.idx")
    data = path.read_bytes()
    for i in range(0, len(data), 8):
        changed = bytearray(data)
        changed[i + 1] ^= 2
        path.write_bytes(changed)
        with pytest.raises(UsageError, match="disagrees"):
            build_index(tmp_path, options=ScanOptions(start="energon"))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("dali", b""),
        ("dali", b"v1.2 6\njpg 512 4\n"),
        ("dali", b"v9 1\njpg 512 4 a.jpg\n"),
        ("dali", b"v1.2 2\njpg 512 4 a.jpg\n"),
        ("dali", b"v1.2 1\njpg x 4 a.jpg\n"),
        ("dali", b"\xff\xfe"),
        ("energon", b""),
        ("energon", b"1234567"),
        ("img2dataset", b"PAR1 not"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(tmp_path, kind, content):
    write_tar(tmp_path / "a.tar")
    suffix = {"dali": "idx", "energon": "tar.idx", "img2dataset": "parquet"}[kind]
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.{suffix}.*leave out --from") as caught:
        build_index(tmp_path, options=ScanOptions("category", start=kind))
    assert "\n" not in str(caught.value)


def test_a_missing_index_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar")
    for kind in ("dali", "energon", "img2dataset"):
        with pytest.raises(UsageError, match=rf"is missing; leave out --from {kind}"):
            build_index(tmp_path, options=ScanOptions(start=kind))


def test_img2dataset_gives_the_labels_of_tars_that_have_none(tmp_path):
    write_img2dataset(write_tar(tmp_path / "00000.tar", label=False))
    index = build_index(tmp_path, options=ScanOptions("category", "img2dataset"))
    assert index.class_names == ("k0", "k1")
    assert index.class_id.tolist() == [0, 1, 0, 1, 0, 1]


def test_img2dataset_is_read_again_when_its_table_changes(tmp_path):
    tar = write_tar(tmp_path / "00000.tar", label=False)
    write_img2dataset(tar)
    build_index(tmp_path, options=ScanOptions("category", "img2dataset"))
    write_img2dataset(tar, category=[f"other{i % 3}" for i in range(7)])
    index = build_index(tmp_path, options=ScanOptions("category", "img2dataset"))
    assert index.class_names == ("other0", "other1", "other2")


def test_img2dataset_without_a_label_leaves_the_sample_out_or_refuses(tmp_path):
    tar = write_tar(tmp_path / "00000.tar", label=False)
    write_img2dataset(tar, category=["a", None, "b", "", "c", "d", None])
    options = ScanOptions("category", "img2dataset")
    with pytest.raises(UsageError, match="key 000000001 has no label"):
        build_index(tmp_path, options=options)
    index = build_index(tmp_path, options=ScanOptions("category", "img2dataset", damaged="skip"))
    assert index.metadata["left_out"] == {"no_label": 2}
    assert [index.key(i)[-1] for i in range(4)] == ["0", "2", "4", "5"]


@pytest.mark.parametrize(
    ("count", "changes", "reason"),
    [
        (5, {}, "no key 000000005 of status success"),
        (7, {}, "lists key 000000006"),
        (6, {"category": [0.5] * 7}, "neither an integer nor a name"),
        (6, {"key": ["000000001"] * 7}, "key 000000001 twice"),
    ],
)
def test_img2dataset_that_disagrees_is_refused(tmp_path, count, changes, reason):
    tar = write_tar(tmp_path / "00000.tar")
    write_img2dataset(tar, count, **changes)
    with pytest.raises(UsageError, match=reason) as caught:
        build_index(tmp_path, options=ScanOptions("category", "img2dataset"))
    assert "\n" not in str(caught.value)


def test_img2dataset_without_the_column_names_those_it_has(tmp_path):
    write_img2dataset(write_tar(tmp_path / "00000.tar"))
    with pytest.raises(UsageError, match=r"no column 'label' \(it has: key, status.*--label-key"):
        build_index(tmp_path, options=ScanOptions(start="img2dataset"))


def parsed(path):
    """DALI's index, read by the letter: words between blanks, four a member."""
    lines = path.read_text().split("\n")
    version, count = lines[0].split(" ")
    assert version == "v1.2"
    assert lines[-1] == ""
    assert len(lines) == int(count) + 2
    samples = [line.split(" ") for line in lines[1:-1]]
    return [[tuple(s[i : i + 4]) for i in range(0, len(s), 4)] for s in samples]


def test_the_export_is_what_wds2idx_writes_and_reads_back(tmp_path, capsys):
    tar = write_tar(tmp_path / "train-000000.tar")
    index = build_index(tmp_path)
    (written,) = export_dali(index)
    assert written == tmp_path / "train-000000.idx"
    samples = parsed(written)
    assert len(samples) == 6
    found = {m.name: (str(m.offset_data), str(m.size)) for m in members_of(tar)}
    for number, sample in enumerate(samples):
        assert sorted(name for name, *_ in sample) == sorted(NAMES)
        for extension, offset, size, name in sample:
            assert name == f"{number:09d}.{extension}"
            assert (offset, size) == found[name]
            assert int(offset) % 512 == 0
    exported = written.read_text()
    write_dali(tar)
    assert written.read_text() == exported
    again = build_index(tmp_path, options=ScanOptions(start="dali"))
    assert again.fingerprint == index.fingerprint


def test_the_export_leaves_out_what_the_index_leaves_out(tmp_path, make_tar):
    members = [("a.jpg", b"1"), ("b.jpg", b"1"), ("b.cls", b"1"), ("README", b"x")]
    make_tar(tmp_path / "s.tar", members)
    (written,) = export_dali(build_index(tmp_path, options=ScanOptions(damaged="skip")))
    ((*_, (extension, _, size, name)),) = parsed(written)
    assert (extension, size, name) == ("cls", "1", "b.cls")


def test_names_that_the_format_cannot_hold_are_refused(tmp_path, make_tar):
    make_tar(tmp_path / "s.tar", [("a b.jpg", b"1"), ("a b.cls", b"1")])
    with pytest.raises(UsageError, match="blank in a name"):
        export_dali(build_index(tmp_path))
    assert not (tmp_path / "s.idx").exists()


def test_the_command_imports_and_exports(tmp_path, capsys):
    tar = write_tar(tmp_path / "train-000000.tar")
    write_dali(tar)
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    assert index_command.run(parser.parse_args([str(tmp_path), "--from", "dali"])) == 0
    tar.with_suffix(".idx").unlink()
    assert index_command.run(parser.parse_args([str(tmp_path), "--export", "dali"])) == 0
    assert "train-000000.idx" in capsys.readouterr().out
    assert len(parsed(tar.with_suffix(".idx"))) == 6
