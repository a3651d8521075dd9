"""Hashes of images: copies agree, other pictures do not, and each image is read once."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_photos import brightened, cropped, halved, jpeg, pack, photo, png

from dist_dml.data.decode import decode
from dist_dml.data.image_comparison import aligned_correlation, thumbnail
from dist_dml.data.image_hashes import (
    HASHES_FILE,
    ImageHashes,
    hash_images,
    perceptual_hash,
    pixel_digest,
)
from dist_dml.data.index import Index, load_index
from dist_dml.data.leaks import CORRELATION, DISTANCE

COPIES = {
    "re-encoded": lambda image: decode(jpeg(image, 40), 3),
    "resized to half": halved,
    "enlarged": lambda image: cv2.resize(image, None, fx=1.7, fy=1.7),
    "brighter": brightened,
    "cropped by 2%": lambda image: cropped(image, 0.02),
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None],
}


def bits_between(one: np.ndarray, other: np.ndarray) -> int:
    return (perceptual_hash(one)[0] ^ perceptual_hash(other)[0]).bit_count()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_near_by_its_hash_and_by_its_pixels(copy: str) -> None:
    for number in range(12):
        image = photo(number)
        changed = COPIES[copy](image)
        assert bits_between(image, changed) <= DISTANCE
        assert aligned_correlation(thumbnail(image), thumbnail(changed), 1.0) >= CORRELATION


def test_other_pictures_are_far_by_their_hash_and_by_their_pixels() -> None:
    images = [photo(number) for number in range(40)]
    for i, one in enumerate(images):
        for other in images[:i]:
            assert bits_between(one, other) > DISTANCE
    for one, other in pairwise(images):
        assert aligned_correlation(thumbnail(one), thumbnail(other), 1.0) < CORRELATION


def test_a_picture_in_other_colours_is_no_copy() -> None:
    image = photo(3)
    swapped = np.ascontiguousarray(image[:, :, ::-1])
    assert aligned_correlation(thumbnail(image), thumbnail(swapped), 1.0) < CORRELATION


def test_a_turned_picture_is_no_copy_although_it_could_be_aligned() -> None:
    image = photo(4)
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 6, 1.0)
    turned = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
    assert aligned_correlation(thumbnail(image), thumbnail(turned), 1.0) < CORRELATION


def test_nearly_uniform_and_tiny_images_have_no_telling_hash(tmp_path: Path) -> None:
    flat = np.full((64, 64, 3), 200, np.uint8)
    grain = np.random.default_rng(0).integers(-2, 3, flat.shape)
    images = [flat, (flat + grain).astype(np.uint8), photo(0, 12), photo(1)]
    index = pack(tmp_path, {"train": [(f"k{i}", "c", png(im)) for i, im in enumerate(images)]})
    hashes = hash_images(index, 1)
    assert hashes.readable.all()
    assert hashes.telling.tolist() == [False, False, False, True]


def test_the_digest_is_that_of_the_pixels_and_not_of_the_file() -> None:
    image = photo(5)
    lossless = cv2.imencode(".webp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [64, 101])[1]
    assert pixel_digest(decode(png(image), 3)) == pixel_digest(decode(lossless.tobytes(), 3))
    changed = image.copy()
    changed[3, 4, 1] ^= 1
    assert pixel_digest(changed) != pixel_digest(image)
    assert pixel_digest(image.transpose(1, 0, 2)) != pixel_digest(image)
    assert pixel_digest(image.reshape(image.shape[1], image.shape[0], 3)) != pixel_digest(image)


def photos(folder: Path, count: int = 6) -> Index:
    return pack(folder, {"train": [(f"k{i}", "c", jpeg(photo(i))) for i in range(count)]})


def columns(hashes: ImageHashes) -> list[list[float]]:
    return [c.tolist() for c in (hashes.hashes, hashes.pixels, hashes.contrast)]


def test_a_second_call_reads_no_image(tmp_path: Path) -> None:
    index = photos(tmp_path)
    first = hash_images(index, 1)
    os.rename(tmp_path / "train-000000.tar", tmp_path / "moved")
    assert columns(hash_images(index, 1)) == columns(first)
    assert first.hashes.tolist() == [
        perceptual_hash(decode(jpeg(photo(i)), 3))[0] for i in range(6)
    ]


@pytest.mark.parametrize("spoil", ["other data", "damaged", "older version"])
def test_hashes_that_do_not_belong_to_the_data_are_made_anew(tmp_path: Path, spoil: str) -> None:
    index = photos(tmp_path / "a")
    hash_images(index, 1)
    path = tmp_path / "a" / HASHES_FILE
    if spoil == "other data":
        hash_images(
            pack(tmp_path / "b", {"train": [(f"k{i}", "c", jpeg(photo(9))) for i in range(6)]}), 1
        )
        path.write_bytes((tmp_path / "b" / HASHES_FILE).read_bytes())
    elif spoil == "damaged":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(path.read_bytes().replace(b"version\x18\x011", b"version\x18\x010"))
    assert len(set(hash_images(index, 1).hashes.tolist())) == 6


def test_an_unreadable_image_is_listed_and_tried_again(tmp_path: Path) -> None:
    index = photos(tmp_path)
    tar = tmp_path / "train-000000.tar"
    whole = tar.read_bytes()
    place = int(index.offset[2]) + 200
    tar.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    hashes = hash_images(index, 1)
    assert [(image.sample_id, image.kind) for image in hashes.bad] == [(2, "checksum")]
    assert hashes.readable.tolist() == [i != 2 for i in range(6)]
    tar.write_bytes(whole)
    repaired = hash_images(index, 1)
    assert repaired.bad == ()
    assert repaired.readable.all()


def test_images_in_quarantine_are_not_read(tmp_path: Path) -> None:
    index = replace(photos(tmp_path), quarantined=np.array([1, 4]))
    hashes = hash_images(index, 1)
    assert hashes.readable.tolist() == [i not in (1, 4) for i in range(6)]
    assert hashes.bad == ()


@pytest.mark.slow
def test_hashes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    encoded = [jpeg(photo(number, 24)) for number in range(50)]
    index = pack(tmp_path, {"train": [(f"k{i}", "c", encoded[i % 50]) for i in range(5000)]})
    one = hash_images(index, 1)
    (tmp_path / HASHES_FILE).unlink()
    assert columns(hash_images(load_index(tmp_path), 2)) == columns(one)
