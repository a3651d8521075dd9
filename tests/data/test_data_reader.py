"""Images come back as they were stored, in the wanted channels, or the run stops with a reason."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import threading
import time
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from shard_server import within

from dist_dml.data.decode import MAX_PIXELS, decode
from dist_dml.data.faults import BadSample, StorageFault
from dist_dml.data.index import Index, load_index
from dist_dml.data.index_command import build_index
from dist_dml.data.reader import Reader, open_reader, read_image
from dist_dml.data.shards import write_shard
from dist_dml.data_config import StorageConfig
from dist_dml.errors import RunError

RGB = np.kron(np.random.default_rng(0).integers(0, 256, (5, 6, 3)), np.ones((8, 8, 1))).astype("u1")


def encoded(kind: str, image: np.ndarray = RGB, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def test_stored_pixels_come_back(index):
    reader = open_reader(index, channels=3)
    for i in (3, 40, 17, len(index) - 1):
        stored = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        assert np.array_equal(read_image(index, reader, i), stored)


def test_a_pickled_reader_reads_the_same(index):
    reader = open_reader(index, channels=1)
    first = read_image(index, reader, 5)
    assert np.array_equal(read_image(index, pickle.loads(pickle.dumps(reader)), 5), first)
    assert first.shape == (20, 24, 1)


def test_more_shards_than_open_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_dml.data.reader._OPEN_SHARDS", 2)
    for number in range(5):
        sample = {"__key__": str(number), "png": encoded("png", RGB + number), "cls": b"0"}
        write_shard(tmp_path / f"train-{number:06d}.tar", [sample])
    index = build_index(tmp_path)
    reader = open_reader(index, channels=3)
    for number in (0, 1, 2, 0, 4, 3, 1, 0):
        assert np.array_equal(read_image(index, reader, number), RGB + number)


@pytest.mark.parametrize(
    ("kind", "options", "mean_error"),
    [
        ("png", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("webp", {"quality": 95}, 14),
        ("jpeg", {"quality": 98, "subsampling": 0}, 2),
        ("jpeg", {"quality": 98, "subsampling": 0, "progressive": True}, 2),
    ],
)
def test_every_format_decodes_to_rgb_in_this_order(kind, options, mean_error):
    image = decode(encoded(kind, **options), channels=3)
    assert image.shape == RGB.shape
    assert np.abs(image.astype(int) - RGB).mean() <= mean_error


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_colour_becomes_grey_and_grey_becomes_colour(kind):
    options = {"lossless": True} if kind == "webp" else {}
    grey = decode(encoded(kind, **options), channels=1)
    wanted = RGB @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (*RGB.shape[:2], 1)
    assert np.abs(grey[..., 0] - wanted).mean() < 4
    stored = RGB[..., 0]
    colour = decode(encoded(kind, stored, **options), channels=3)
    assert colour.shape == RGB.shape
    assert np.abs(colour.astype(int) - stored[..., None]).mean() < 4


def test_palette_alpha_cmyk_and_16_bit_images_are_read():
    stream = io.BytesIO()
    Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE).save(stream, "png")
    assert decode(stream.getvalue(), 3).shape == RGB.shape
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    assert np.array_equal(decode(encoded("png", opaque), 3), RGB)
    stream = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(stream, "jpeg", quality=98)
    assert np.abs(decode(stream.getvalue(), 3).astype(int) - RGB).mean() < 8
    deep = cv2.imencode(".png", RGB[..., 0].astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(decode(deep, 1)[..., 0], RGB[..., 0])


def test_the_exif_orientation_is_not_applied_by_any_decoder():
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpeg", "png", "webp"):
        assert decode(encoded(kind, exif=exif.tobytes()), 3).shape == RGB.shape


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_an_image_cut_short_is_refused(kind, share):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(kind, noise)
    with pytest.raises(BadSample):
        decode(data[: int(len(data) * share)], channels=3)


@pytest.mark.parametrize("data", [b"", b"no image", b"GIF89a" + bytes(40), b"\xff\xd8\xff"])
def test_other_content_is_refused(data):
    with pytest.raises(BadSample):
        decode(data, channels=3)


def bomb_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + checksum


def bomb_webp(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


@pytest.mark.parametrize("bomb", [bomb_png, bomb_webp])
def test_a_decompression_bomb_is_refused_by_its_header(bomb):
    with pytest.raises(BadSample, match="pixels exceed the limit"):
        decode(bomb(10_000, MAX_PIXELS // 10_000 + 1), channels=3)


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_headers_state_the_size(lossless):
    from dist_dml.data.image_header import image_size

    assert image_size(encoded("webp", lossless=lossless)) == RGB.shape[:2]
    assert image_size(encoded("webp", lossless=lossless, exif=b"Exif\0\0")) == RGB.shape[:2]


def test_a_changed_or_corrupt_sample_names_shard_key_and_reason(tmp_path, shard_folder, index):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    copy = load_index(folder)
    tar = folder / "train-000000.tar"
    sample = int(copy.select("train")[2])
    data = bytearray(tar.read_bytes())
    data[copy.offset[sample] + 60] ^= 255
    tar.write_bytes(data)
    reader = open_reader(copy, channels=3)
    with pytest.raises(RunError, match=r"train-000000\.tar: key train-000000/\d{4} .*changed"):
        read_image(copy, reader, sample)
    corrupt = build_index(folder)
    reader = open_reader(corrupt, channels=3)
    with pytest.raises(RunError, match="cannot be decoded") as caught:
        read_image(corrupt, reader, sample)
    assert "\n" not in str(caught.value)


@pytest.fixture
def storage() -> StorageConfig:
    return StorageConfig(retries=3, retry_seconds=0.005)


def place(index: Index, sample: int) -> tuple[int, int, int, int]:
    columns = (index.shard, index.offset, index.size, index.checksum)
    first, second, third, fourth = (int(column[sample]) for column in columns)
    return first, second, third, fourth


def test_a_local_shard_that_is_deleted_in_mid_run_ends_it(tmp_path, shard_folder, storage, capsys):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    copy = build_index(folder)
    reader = open_reader(copy, 3, storage)
    sample = int(copy.select("train")[0])
    (folder / "train-000000.tar").unlink()
    with pytest.raises(RunError, match=r"train-000000\.tar: key train.*failed 4 times.*No such"):
        within(10, lambda: read_image(copy, reader, sample))
    assert "trying again" in capsys.readouterr().err


def test_a_local_shard_whose_name_comes_back_is_read(tmp_path, shard_folder, storage):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    copy = build_index(folder)
    reader = open_reader(copy, 3, storage.model_copy(update={"retries": 20}))
    tar = folder / "seen-000000.tar"
    tar.rename(folder / "away")
    timer = threading.Timer(0.1, (folder / "away").rename, [tar])
    timer.start()
    assert within(10, lambda: read_image(copy, reader, 0)).shape == (20, 24, 3)
    timer.join()


def test_a_local_shard_that_became_shorter_is_a_bad_sample(tmp_path, shard_folder, storage):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    copy = build_index(folder)
    reader = open_reader(copy, 3, storage)
    sample = int(copy.select("seen")[-1])
    read_image(copy, reader, sample)
    os.truncate(folder / "seen-000000.tar", int(copy.offset[sample]) + 5)
    with pytest.raises(BadSample, match=r"ends after 5 of its") as caught:
        reader.image(*place(copy, sample))
    assert caught.value.kind == "cut_short"


def test_a_shard_that_may_not_be_read_is_not_tried_again(index, storage):
    reader = Reader(["/"], 3, open_reader(index, 3, storage).cache)
    started = time.monotonic()
    with pytest.raises(StorageFault, match="Is a directory"):
        reader.read(0, 0, 10)
    assert time.monotonic() - started < 1
