"""Synthetic classes: each image depends on seed, class and number alone, in any number of parts."""

from __future__ import annotations

import argparse
import math
import shutil

import numpy as np
import pytest
import torch

from dist_dml.data.pack import synthetic as synthetic_module
from dist_dml.data.pack.synthetic import class_codes, draw_images, pack_synthetic
from dist_dml.data.pack.synthetic_splits import SyntheticCounts, divide
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of, keyed_uniform, row_keys

SMALL = SyntheticCounts(
    classes=60,
    train_per_class=2,
    frequent_classes=3,
    frequent_per_class=9,
    seen_classes=10,
    seen_per_class=3,
    test_classes=20,
    test_per_class=4,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "out"
    return pack_synthetic(folder, SMALL, seed=5, shard_samples=50, processes=1)


def drawn(class_ids, numbers, split="train", size=16, channels=1, seed=5):
    rows = np.asarray(class_ids, np.int64), np.asarray(numbers, np.int64)
    return draw_images(*rows, split, size, channels, seed)


def key_parts(key):
    """Class, split and number of a key such as c00000012-train0001."""
    class_id, rest = key[1:].split("-")
    return int(class_id), rest[:-4], int(rest[-4:])


def test_an_image_equals_its_waves_summed_pixel_by_pixel():
    class_id, number, size, channels, seed = 7, 3, 11, 3, 5
    image = drawn([class_id], [number], "test", size, channels, seed)[0]
    code = class_codes(np.array([class_id]), channels, seed)[0].astype(np.float64)
    position = np.array([class_id * 2**24 + number])
    keys = row_keys(key_of(seed, "synthetic test"), torch.from_numpy(position))
    draws = 2 * keyed_uniform(keys, 6)[0].double().numpy() - 1
    noise = 2 * keyed_uniform(keys, size * size * channels, salt=1)[0].double().numpy() - 1
    angle, zoom = math.radians(10) * draws[2], math.exp(0.1 * draws[3])
    waves = [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2)]
    waves += [(2, 1), (2, -1), (1, 2), (1, -2), (2, 2), (2, -2)]
    for row, column, channel in [(0, 0, 0), (4, 9, 1), (10, 2, 2), (5, 5, 0)]:
        x, y = (column + 0.5) / size - 0.5, (row + 0.5) / size - 0.5
        # The pattern's own coordinates of this pixel.
        u = (math.cos(angle) * x - math.sin(angle) * y) / zoom + 0.125 * draws[0]
        v = (math.sin(angle) * x + math.cos(angle) * y) / zoom + 0.125 * draws[1]
        value = 0.0
        for wave, (across, down) in enumerate(waves):
            phase = 2 * math.pi * (across * u + down * v)
            value += code[channel, 0, wave] * math.cos(phase)
            value += code[channel, 1, wave] * math.sin(phase)
        level = (54 + 36 * (draws[4] + 1) / 2) * value + 127.5 + 25 * draws[5]
        level += 20 * noise[(row * size + column) * channels + channel]
        assert abs(int(image[row, column, channel]) - min(max(level, 0), 255)) < 0.51


def test_an_image_does_not_depend_on_what_is_drawn_beside_it():
    ids, numbers = np.arange(40) % 7, np.arange(40) // 7
    together = drawn(ids, numbers)
    apart = np.concatenate([drawn(ids[i : i + 1], numbers[i : i + 1]) for i in range(40)])
    assert np.array_equal(together, apart)


def test_seed_class_number_and_split_all_change_the_image():
    first = drawn([3], [0])
    for other in (
        drawn([4], [0]),
        drawn([3], [1]),
        drawn([3], [0], "seen"),
        drawn([3], [0], seed=6),
    ):
        assert (first != other).mean() > 0.5


def test_classes_look_like_themselves_but_pixels_alone_do_not_find_all():
    ids = np.repeat(np.arange(400), 4)
    images = drawn(ids, np.tile(np.arange(4), 400), "test").reshape(len(ids), -1).astype(float)
    images -= images.mean(axis=1, keepdims=True)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    cosines = images @ images.T
    np.fill_diagonal(cosines, -1)
    recall = (ids[cosines.argmax(axis=1)] == ids).mean()
    assert 0.4 < recall < 0.95  # 400 classes; measured 0.69. By chance it were 0.002.


def test_codes_have_unit_length_and_spread_over_all_directions():
    codes = class_codes(np.arange(4000), 2, 0)
    assert np.allclose(np.square(codes).sum(axis=(2, 3)), 1, atol=1e-5)
    flat = codes[:, 0].reshape(4000, -1).astype(np.float64)
    spread = np.linalg.eigvalsh(flat.T @ flat / len(flat))
    assert spread.min() > 0.8 / 24
    assert spread.max() < 1.2 / 24


def test_every_split_has_its_classes_and_counts(packed):
    counts = {}
    for row in range(len(packed)):
        class_id, split, number = key_parts(packed.key(row))
        assert packed.class_names[packed.class_id[row]] == str(class_id)
        assert packed.class_id[row] == class_id  # Test classes follow the training classes.
        counts.setdefault((split, class_id), []).append(number)
        assert packed.split_names[packed.split[row]] == split
    by_split = {s: {c: n for (t, c), n in counts.items() if t == s} for s in packed.split_names}
    train = {class_id: len(numbers) for class_id, numbers in by_split["train"].items()}
    assert sorted(train) == list(range(60))
    assert sorted(train.values()) == [2] * 57 + [9] * 3
    assert [len(n) for n in by_split["seen"].values()] == [3] * 10
    assert set(by_split["seen"]) < set(range(60))
    assert sorted(by_split["test"]) == list(range(60, 80))
    for numbers in counts.values():
        assert sorted(numbers) == list(range(len(numbers)))


def test_stored_pixels_are_the_drawn_ones(packed):
    reader = open_reader(packed, 1)
    for row in range(0, len(packed), 7):
        class_id, split, number = key_parts(packed.key(row))
        wanted = drawn([class_id], [number], split)[0]
        assert np.array_equal(read_image(packed, reader, row), wanted)


def test_colours_are_stored_in_their_order_and_jpeg_is_near(tmp_path):
    index = pack_synthetic(tmp_path / "png", SMALL, seed=5, channels=3, processes=1)
    class_id, split, number = key_parts(index.key(0))
    wanted = drawn([class_id], [number], split, channels=3)[0]
    assert np.array_equal(read_image(index, open_reader(index, 3), 0), wanted)
    index = pack_synthetic(tmp_path / "jpg", SMALL, seed=5, image_format="jpg", processes=1)
    class_id, split, number = key_parts(index.key(0))
    wanted = drawn([class_id], [number], split)[0]
    found = read_image(index, open_reader(index, 1), 0)
    assert np.abs(found.astype(int) - wanted).mean() < 6


def test_samples_are_shuffled_within_their_split(packed):
    ids = packed.class_id[packed.select("train")]
    assert (np.diff(ids) < 0).mean() > 0.3


@pytest.mark.slow
def test_two_processes_and_an_interruption_give_the_same_bytes(packed, tmp_path):
    again = pack_synthetic(tmp_path / "out", SMALL, seed=5, shard_samples=50, processes=2)
    assert again.fingerprint == packed.fingerprint
    names = [packed.shards[i] for i in range(len(packed.shards))]
    assert len(names) == 6
    (tmp_path / "out" / names[1]).unlink()
    pack_synthetic(tmp_path / "out", SMALL, seed=5, shard_samples=50, processes=1)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (packed.folder / name).read_bytes()


def test_a_million_samples_are_planned_without_an_object_each():
    samples = divide(SyntheticCounts(classes=500_000), 0)["train"]
    assert samples.shape == (1_000_000, 2)
    assert samples.nbytes == 16_000_000
    assert (np.bincount(samples[:, 0]) == 2).all()


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"classes": 1}, "--classes=1"),
        ({"train_per_class": 0}, "--train-per-class=0"),
        ({"seen_classes": 61}, "--seen-classes=61"),
        ({"frequent_classes": -1}, "--frequent-classes=-1"),
        ({"test_per_class": 10_001}, "--test-per-class=10001"),
    ],
)
def test_impossible_counts_are_refused_by_option(change, option):
    with pytest.raises(UsageError, match=option):
        SyntheticCounts(**({"classes": 60} | change))


@pytest.mark.parametrize(
    "change",
    [{"size": 7}, {"channels": 2}, {"image_format": "webp"}, {"shard_samples": 0}, {"seed": -1}],
)
def test_other_parameters_are_refused_before_anything_is_written(change, tmp_path):
    with pytest.raises(UsageError, match="expected"):
        pack_synthetic(tmp_path / "out", SMALL, **change)
    assert not (tmp_path / "out").exists()


def test_a_small_disk_is_refused_with_what_is_needed(tmp_path, monkeypatch):
    counts = SyntheticCounts(classes=500_000)
    space = shutil.disk_usage(tmp_path)._replace(free=100 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space)
    with pytest.raises(UsageError, match=r"needs about 2,001 MiB and the disk has 100 MiB free"):
        pack_synthetic(tmp_path / "out", counts)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_command_packs_and_reports(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    synthetic_module.add_arguments(parser)
    words = "--classes 50 --frequent-classes 0 --seen-classes 5 --test-classes 10 --size 8"
    arguments = parser.parse_args([str(tmp_path / "out"), *words.split(), "--processes", "1"])
    assert synthetic_module.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "160 samples (seen 20, test 40, train 100), 50 training classes of 60" in shown
