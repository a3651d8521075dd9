"""Verify finds every damaged image, says what it is, and `--fix` takes it out of the data set."""

from __future__ import annotations

import argparse
import zlib

import cv2
import numpy as np
import pyarrow.parquet as parquet
import pytest
from tiny_images import image_of, png

from dist_dml.data import verify as verify_command
from dist_dml.data.index import load_index, load_unchecked
from dist_dml.data.index_command import build_index, describe
from dist_dml.data.quarantine import (
    QUARANTINE_FILE,
    QuarantineEntry,
    read_quarantine,
    write_quarantine,
)
from dist_dml.data.shards import write_shard
from dist_dml.data.verify import Verdict, verify
from dist_dml.errors import UsageError

TEXT, CUT, BOMB, FLIPPED, HALF = 3, 7, 11, 13, 16


def bomb():
    """A PNG of a few hundred bytes whose header claims 10,000 x 10,000 pixels."""
    data = bytearray(png(image_of(0)))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture
def folder(tmp_path):
    """20 images in two shards, five of them damaged, each in another way."""
    jpeg = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    images = [{"png": png(image_of(i))} for i in range(20)]
    images[TEXT] = {"jpg": b"<html>404 Not Found</html>"}
    images[CUT] = {"png": png(image_of(CUT))[:600]}
    images[BOMB] = {"png": bomb()}
    images[HALF] = {"jpg": jpeg[:300]}
    for start, name in ((0, "train-000000.tar"), (10, "train-000001.tar")):
        samples = [
            {"__key__": f"k{i}", **images[i], "cls": f"c{i % 4}".encode()}
            for i in range(start, start + 10)
        ]
        write_shard(tmp_path / name, samples)
    index = build_index(tmp_path)
    tar = tmp_path / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[int(index.offset[FLIPPED]) + 50] ^= 4
    tar.write_bytes(data)
    return tmp_path


BAD = {
    TEXT: "not_an_image",
    CUT: "undecodable",
    BOMB: "too_large",
    FLIPPED: "checksum",
    HALF: "undecodable",
}


def command(*words):
    parser = argparse.ArgumentParser()
    verify_command.add_arguments(parser)
    return verify_command.run(parser.parse_args([str(word) for word in words]))


def test_every_kind_of_damage_is_found_and_nothing_else(folder):
    found = verify(load_unchecked(folder))
    assert {verdict.sample_id: verdict.kind for verdict in found} == BAD
    assert [verdict.sample_id for verdict in found] == sorted(BAD)
    assert "100000000" in found[2].reason.replace(",", "") or "10000 x 10000" in found[2].reason


@pytest.mark.slow
def test_processes_find_the_same(folder, monkeypatch):
    monkeypatch.setattr(verify_command, "_LOCAL_SAMPLES", 3)
    index = load_unchecked(folder)
    assert verify(index, processes=2) == verify(index)


def test_the_command_reports_by_kind_and_name_and_fails(folder, capsys):
    assert command(folder, "--processes", "1") == 1
    printed = capsys.readouterr()
    first = printed.out.splitlines()[0]
    assert "20 images, 5 bad: undecodable 2" in first
    assert "train-000001.tar: key k13: checksum:" in printed.out
    assert "--fix" in printed.out
    assert "20 images in" in printed.err
    assert not (folder / QUARANTINE_FILE).exists()


def test_a_sound_data_set_passes(shard_folder, index, capsys):
    assert command(shard_folder, "--processes", "1") == 0
    assert "48 images, 0 bad" in capsys.readouterr().out


def test_fix_takes_the_damaged_out_of_every_split_and_removing_it_puts_them_back(folder, capsys):
    before = load_index(folder)
    assert command(folder, "--processes", "1", "--fix") == 0
    index = load_index(folder)
    sound = [i for i in range(20) if i not in BAD]
    assert index.select("train").tolist() == sound
    assert len(index) == 20
    assert index.key(19) == "k19"
    assert index.class_counts("train", 4).tolist() == [4, 4, 5, 2]
    assert index.fingerprint != before.fingerprint
    assert "in quarantine: 5" in describe(index)
    table = parquet.read_table(folder / QUARANTINE_FILE)
    assert table.column_names == ["shard", "key", "sample_id", "offset", "kind", "reason"]
    assert dict(zip(*(table[n].to_pylist() for n in ("sample_id", "kind")), strict=True)) == BAD
    assert table["offset"].to_pylist() == [int(before.offset[i]) for i in BAD]
    assert command(folder, "--processes", "1") == 0
    assert "all of them are in quarantine.parquet" in capsys.readouterr().out
    (folder / QUARANTINE_FILE).unlink()
    assert load_index(folder).fingerprint == before.fingerprint
    assert len(load_index(folder).select("train")) == 20


def test_fix_again_gives_the_same_fingerprint_and_takes_repaired_ones_back(folder):
    command(folder, "--processes", "1", "--fix")
    first = load_index(folder).fingerprint
    command(folder, "--processes", "1", "--fix")
    assert load_index(folder).fingerprint == first
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[int(load_index(folder).offset[FLIPPED]) + 50] ^= 4
    tar.write_bytes(data)
    command(folder, "--processes", "1", "--fix")
    assert load_index(folder).quarantined.tolist() == [TEXT, CUT, BOMB, HALF]
    assert load_index(folder).fingerprint != first


def test_a_damaged_first_sample_can_be_put_in_quarantine(folder):
    """The check of a changed shard looks at its first sample, and must not lock the door."""
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[int(load_unchecked(folder).offset[10]) + 50] ^= 4
    tar.write_bytes(data)
    with pytest.raises(UsageError, match=r"train-000001\.tar was changed.*dist-dml verify"):
        load_index(folder)
    assert command(folder, "--processes", "1", "--fix") == 0
    assert 10 in load_index(folder).quarantined


@pytest.mark.parametrize("left", [0, 7000])
def test_a_shard_that_is_gone_or_short_is_reported_and_only_damage_is_put_away(folder, left):
    tar = folder / "train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:left])
    if not left:
        tar.unlink()
    found = [verdict for verdict in verify(load_unchecked(folder)) if verdict.sample_id >= 10]
    assert len(found) >= 5
    assert {verdict.kind for verdict in found[-5:]} == {"cut_short" if left else "storage"}
    assert command(folder, "--processes", "1", "--fix") == (0 if left else 1)
    rows = [entry.sample_id for entry in read_quarantine(folder / QUARANTINE_FILE)]
    assert [row for row in rows if row < 10] == [TEXT, CUT]
    assert bool([row for row in rows if row >= 10]) == bool(left)


def test_the_quarantine_of_another_index_is_refused_and_dropped_by_indexing(folder, capsys):
    command(folder, "--processes", "1", "--fix")
    fixed = load_index(folder).fingerprint
    build_index(folder, source={"seed": 1})
    assert not (folder / QUARANTINE_FILE).exists()
    assert "quarantine.parquet was of the index before" in capsys.readouterr().out
    write_quarantine(folder / QUARANTINE_FILE, [], "0" * 64)
    with pytest.raises(UsageError, match=r"of another index \(fingerprint 000000000000\).*--fix"):
        load_index(folder)
    assert command(folder, "--processes", "1", "--fix") == 0
    assert load_index(folder).fingerprint != fixed


@pytest.mark.parametrize("content", [b"", b"PAR1 no"])
def test_a_damaged_quarantine_is_refused_in_one_line(folder, content):
    (folder / QUARANTINE_FILE).write_bytes(content)
    for read in (load_index, lambda root: read_quarantine(root / QUARANTINE_FILE)):
        with pytest.raises(UsageError, match=r"quarantine\.parquet: is damaged") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_list_survives_writing_and_reading(folder, tmp_path):
    index = load_index(folder)
    entries = [QuarantineEntry.of(index, i, "checksum", f"reason {i}") for i in (12, 3)]
    assert entries[0].shard == "train-000001.tar"
    assert entries[0].key == "k12"
    write_quarantine(tmp_path / "list.parquet", entries)
    assert read_quarantine(tmp_path / "list.parquet") == entries[::-1]
    write_quarantine(tmp_path / "list.parquet", [])
    assert read_quarantine(tmp_path / "list.parquet") == []


def test_a_verdict_of_the_storage_is_not_one_of_the_sample(folder):
    (folder / "train-000000.tar").unlink()
    found = verify(load_unchecked(folder))
    assert found[0] == Verdict(0, "storage", found[0].reason)
    assert "No such file" in found[0].reason
