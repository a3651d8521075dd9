"""Transforms equal slow twins in float64, and depend on nothing but their key."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from dist_dml.data.augment import (
    _NUM_DRAWS,
    evaluation_transform,
    evaluation_view,
    train_transform,
    training_view,
)
from dist_dml.data.decode import decode
from dist_dml.data.faults import BadSample
from dist_dml.data_config import AugmentConfig, ImageConfig
from dist_dml.keyed_random import generator, key_of

RANDOM = np.random.default_rng(0)


def config(size=32, resize=0, channels=1) -> ImageConfig:
    return ImageConfig(
        size=size, resize=resize, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels
    )


def smooth(height: int, width: int, channels: int = 1) -> np.ndarray:
    noise = RANDOM.integers(0, 256, (height, width, channels)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2).reshape(height, width, channels)


def test_halving_is_the_mean_of_2_by_2_pixels():
    image = RANDOM.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    wanted = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    view = evaluation_transform(image, config(channels=3))
    assert np.abs(view - wanted).max() <= 0.5 + 1e-6


def test_the_centre_crop_takes_its_share_of_the_short_side():
    image = np.zeros((80, 120, 1), np.uint8)
    image[10:70, 30:90] = 200  # 60 of the 80 rows, centred: size / resize = 3 / 4.
    assert (evaluation_transform(image, config(size=30, resize=40)) == 200).all()
    assert (evaluation_transform(image, config(size=40, resize=40))[:4] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (32, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_shape_gives_contiguous_uint8_of_the_wanted_size(shape, channels):
    image = RANDOM.integers(0, 256, (*shape, channels)).astype(np.uint8)
    everything = AugmentConfig(
        crop_scale=(0.3, 1.0), horizontal_flip=0.5, rotation_degrees=20, zoom=(0.8, 1.2),
        shift=0.1, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, noise=3,
    )  # fmt: skip
    for size in (config(8, 0, channels), config(8, 10, channels)):
        assert evaluation_transform(image, size).shape == (8, 8, channels)
        for augment in (everything, AugmentConfig(), AugmentConfig(crop_scale=(0.3, 1.0))):
            for key in range(4):
                view = train_transform(image, size, augment, key)
                assert (view.shape, view.dtype) == ((8, 8, channels), np.uint8)


def test_without_augmentation_training_sees_the_evaluation_view():
    image = smooth(50, 70, 3)
    for size in (config(32, 0, 3), config(32, 40, 3)):
        view = train_transform(image, size, AugmentConfig(), key=3)
        assert np.array_equal(view, evaluation_transform(image, size))


def twin(image: np.ndarray, augment: AugmentConfig, key: int, size: int) -> np.ndarray:
    """Rotation, zoom, shift and mirror by sampling every output pixel in float64."""
    height, width = image.shape[:2]
    draws = generator(key).random(_NUM_DRAWS)
    zoom = augment.zoom[0] + (augment.zoom[1] - augment.zoom[0]) * draws[1]
    angle = math.radians(augment.rotation_degrees * (2 * draws[2] - 1))
    shift = augment.shift * size * (2 * draws[3:5] - 1)
    result = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            x, y = np.array([column, row]) + 0.5 - size / 2 - shift
            x, y = (
                (math.cos(angle) * x + math.sin(angle) * y) / zoom,
                (-math.sin(angle) * x + math.cos(angle) * y) / zoom,
            )
            if draws[0] < augment.horizontal_flip:
                x = -x
            x, y = x * width / size + width / 2 - 0.5, y * height / size + height / 2 - 0.5
            left, top = math.floor(x), math.floor(y)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = (1 - abs(y - top - i)) * (1 - abs(x - left - j))
                at = min(max(top + i, 0), height - 1), min(max(left + j, 0), width - 1)
                result[row, column] += weight * image[(*at, 0)]
    return result


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(rotation_degrees=80),
        AugmentConfig(shift=0.3),
        AugmentConfig(zoom=(0.9, 1.6)),
        AugmentConfig(zoom=(1.0, 1.5), horizontal_flip=1),
        AugmentConfig(zoom=(0.9, 1.3), shift=0.2, rotation_degrees=30, horizontal_flip=0.5),
    ],
)
@pytest.mark.parametrize("key", [1, 2])
def test_the_warp_equals_sampling_pixel_by_pixel(augment, key):
    for image in (smooth(32, 32), smooth(24, 36)):
        view = train_transform(image, config(), augment, key_of(key, "augment"))
        wanted = twin(image, augment, key_of(key, "augment"), 32)
        assert np.abs(view[..., 0] - wanted).max() < 5  # OpenCV interpolates in 1/32 pixel.
        assert np.abs(view[..., 0] - wanted).mean() < 0.8


@pytest.mark.parametrize("side", [64, 200])
def test_a_warp_that_shrinks_does_not_alias(side):
    """A fine checkerboard is grey from afar: sampling it without averaging gives 0 and 255."""
    image = (np.indices((side, side)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    view = train_transform(image, config(), AugmentConfig(rotation_degrees=15), key=1)
    assert np.abs(view.astype(int) - 127).max() < 70
    assert view.std() < 20


@pytest.mark.parametrize("side", [32, 48, 64, 100, 256])
def test_a_warp_that_changes_nothing_keeps_the_picture_in_place(side):
    image = smooth(side, side)
    augment = AugmentConfig(zoom=(1.0, 1.0000001))
    moved = train_transform(image, config(), augment, key=1).astype(int)
    still = evaluation_transform(image, config()).astype(int)
    assert np.abs(moved - still).mean() < 2.5


def test_mirroring_turns_left_and_right():
    image = smooth(32, 32, 3)
    size = config(channels=3)
    view = train_transform(image, size, AugmentConfig(horizontal_flip=1), key=5)
    assert np.array_equal(view, image[:, ::-1])
    turned = sum(
        np.array_equal(train_transform(image, size, AugmentConfig(horizontal_flip=0.5), key), view)
        for key in range(200)
    )
    assert 70 < turned < 130


def test_crops_cover_the_asked_area_and_ratio():
    columns, rows = np.meshgrid(np.arange(200), np.arange(200))
    image = np.stack([columns, rows, rows], axis=2).astype(np.uint8)
    augment = AugmentConfig(crop_scale=(0.1, 0.5), crop_ratio=(0.5, 2.0))
    areas, ratios, lefts = [], [], []
    for key in range(300):
        view = train_transform(image, config(64, 0, 3), augment, key).astype(float)
        width, height = np.ptp(view[..., 0]) * 64 / 63, np.ptp(view[..., 1]) * 64 / 63
        areas.append(width * height / 200**2)
        ratios.append(width / height)
        lefts.append(view[0, 0, 0])
    assert min(areas) > 0.08
    assert max(areas) < 0.54
    assert 0.26 < np.mean(areas) < 0.34
    assert min(ratios) > 0.45
    assert max(ratios) < 2.2
    assert abs(np.mean(np.log(ratios))) < 0.1
    assert max(lefts) - min(lefts) > 100


def test_a_view_depends_on_its_key_alone():
    image, augment = smooth(40, 40), AugmentConfig(rotation_degrees=20, noise=4, contrast=0.3)
    views = [train_transform(image, config(), augment, key) for key in range(20)]
    again = [train_transform(image, config(), augment, key) for key in reversed(range(20))]
    assert all(np.array_equal(a, b) for a, b in zip(views, again[::-1], strict=True))
    assert len({view.tobytes() for view in views}) == 20


def test_switching_one_change_on_leaves_the_others_as_they_were():
    image = smooth(40, 40)
    turned = train_transform(image, config(), AugmentConfig(rotation_degrees=20), key=9)
    both = AugmentConfig(rotation_degrees=20, noise=1)
    assert np.abs(train_transform(image, config(), both, key=9).astype(int) - turned).max() <= 6


def test_noise_has_the_asked_deviation():
    image = np.full((64, 64, 1), 128, np.uint8)
    view = train_transform(image, config(64), AugmentConfig(noise=9), key=2)
    assert abs(view.std() - 9) < 0.5
    assert abs(view.mean() - 128) < 0.6


def test_brightness_contrast_saturation_and_hue_do_what_they_say():
    image = np.full((8, 8, 3), 100, np.uint8)
    image[:4] = (60, 90, 120)
    size = config(8, 0, 3)

    def views(**changes):
        return [train_transform(image, size, AugmentConfig(**changes), key) for key in range(60)]

    for view in views(brightness=0.5):
        factor = view[7, 7, 0] / 100
        assert 0.49 <= factor <= 1.51
        assert np.abs(view[0, 0] - factor * image[0, 0].astype(float)).max() <= 1.5
    grey = float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean())
    for view in views(contrast=0.5):
        factor = (float(view[0, 0, 2]) - grey) / (120 - grey)
        assert 0.45 <= factor <= 1.55
        wanted = grey + factor * (image[0, 0].astype(float) - grey)
        assert np.abs(view[0, 0] - wanted).max() <= 2
    for view in views(saturation=0.5):
        assert np.abs(view[7, 7].astype(int) - 100).max() <= 1
        share = np.ptp(view[0, 0].astype(float)) / 60
        assert 0.47 <= share <= 1.53
    spans = [tuple(view[0, 0].tolist()) for view in views(hue=0.5)]
    assert all(abs(max(s) - 120) <= 2 and abs(min(s) - 60) <= 4 for s in spans)
    assert {np.argmax(s) for s in spans} == {0, 1, 2}


def photograph(height: int, width: int) -> np.ndarray:
    """Waves whose amplitude falls with their length, as in photographs."""
    image = np.full((height, width, 3), 128.0, np.float32)
    for length, level in ((64, 40), (16, 10), (4, 2.5)):
        waves = RANDOM.standard_normal((height // length, width // length, 3)) * level
        image += cv2.resize(
            waves.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
    return np.clip(image, 0, 255).astype(np.uint8)


EVERYTHING = AugmentConfig(
    crop_scale=(0.3, 1.0), horizontal_flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2,
    hue=0.1, noise=3,
)  # fmt: skip
WARPED = EVERYTHING.model_copy(update={"rotation_degrees": 20.0, "zoom": (0.8, 1.2)})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [AugmentConfig(), EVERYTHING, WARPED])
@pytest.mark.parametrize("kind", ["small jpeg", "jpeg near the view", "png"])
def test_a_view_of_the_bytes_is_the_view_of_the_decoded_image(kind, augment, channels):
    side = 100 if kind == "small jpeg" else 200
    stored = photograph(side, side + 30)
    data = cv2.imencode(".png" if kind == "png" else ".jpg", stored)[1].tobytes()
    size = config(120 if kind == "jpeg near the view" else 16, 0, channels)
    if kind == "jpeg near the view" and augment is WARPED:
        augment = WARPED.model_copy(update={"zoom": (0.9, 1.2)})
    image = decode(data, channels)
    assert np.array_equal(evaluation_view(data, size), evaluation_transform(image, size))
    flags = set()
    for key in range(12):
        view, mirrored = training_view(data, size, augment, key)
        shown = view[:, ::-1] if mirrored else view
        assert np.array_equal(shown, train_transform(image, size, augment, key))
        flags.add(mirrored)
    assert flags == ({False, True} if augment is EVERYTHING else {False})


@pytest.mark.parametrize("augment", [AugmentConfig(), EVERYTHING, WARPED])
@pytest.mark.parametrize(("size", "resize"), [(64, 0), (64, 73), (32, 40), (150, 0)])
def test_a_view_of_a_large_jpeg_is_near_the_view_of_the_whole_image(size, resize, augment):
    data = cv2.imencode(".jpg", photograph(480, 640), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    settings, image = config(size, resize, 3), decode(data, 3)
    quiet = augment.model_copy(update={"noise": 0.0})
    whole = evaluation_transform(image, settings).astype(int)
    assert np.abs(evaluation_view(data, settings) - whole).mean() < 4
    differences = []
    for key in range(24):
        view, mirrored = training_view(data, settings, quiet, key)
        assert view.shape == (size, size, 3)
        shown = view[:, ::-1] if mirrored else view
        whole = train_transform(image, settings, quiet, key).astype(int)
        differences.append(np.abs(shown - whole).mean())
        assert np.array_equal(view, training_view(data, settings, quiet, key)[0])
    assert np.mean(differences) < 4.5
    # Edges move by up to half a pixel of the view; unrelated crops are 40 apart.
    assert max(differences) < 9
    assert max(differences) > 0  # Else nothing was reduced, and the test is about nothing.


def test_views_of_damaged_bytes_are_bad_samples():
    data = cv2.imencode(".jpg", photograph(480, 640))[1].tobytes()
    for damaged in (b"", b"text", data[:20], data[: len(data) // 2]):
        with pytest.raises(BadSample):
            training_view(damaged, config(32, 0, 3), EVERYTHING, 1)
        with pytest.raises(BadSample):
            evaluation_view(damaged, config(32, 0, 3))
