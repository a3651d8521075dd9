"""Images come back as they were stored, in the wanted channels, or the run stops with a reason."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from dist_dml.data.index import load_index
from dist_dml.data.index_command import build_index
from dist_dml.data.reader import MAX_PIXELS, BadSample, decode, open_reader, read_image
from dist_dml.data.shards import write_shard
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
    from dist_dml.data.reader import _header_size

    assert _header_size(encoded("webp", lossless=lossless)) == RGB.shape[:2]
    assert _header_size(encoded("webp", lossless=lossless, exif=b"Exif\0\0")) == RGB.shape[:2]


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
