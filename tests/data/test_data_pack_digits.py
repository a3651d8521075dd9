"""scikit-learn's digits are packed whole, stratified, and the same for the same seed."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dist_dml.data.pack import digits as digits_module
from dist_dml.data.pack.digits import grey_levels, pack_digits
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_digits(tmp_path_factory.mktemp("digits") / "out")


def test_every_digit_is_there_with_its_pixels_and_class(packed):
    values, targets = load_digits(return_X_y=True)
    reader = open_reader(packed, 1)
    assert len(packed) == len(targets) == 1797
    numbers = set()
    for row in range(len(packed)):
        number = int(packed.key(row).removeprefix("digit-"))
        numbers.add(number)
        image = read_image(packed, reader, row)
        assert image.shape == (8, 8, 1)
        # The nearest grey level of value * 255 / 16.
        assert np.abs(image.ravel() - values[number] * 255 / 16).max() <= 0.5
        assert packed.class_id[row] == targets[number]
    assert numbers == set(range(1797))
    assert packed.class_names == tuple("0123456789")


def test_grey_levels_span_black_to_white():
    values = np.zeros((1, 8, 8))
    values[0, 0] = [0, 1, 2, 3, 8, 14, 15, 16]
    assert grey_levels(values)[0, 0].tolist() == [0, 16, 32, 48, 128, 223, 239, 255]


def test_half_of_each_class_is_held_out(packed):
    for label in range(10):
        counts = [
            int((packed.class_id[packed.select(s)] == label).sum()) for s in ("train", "seen")
        ]
        assert abs(counts[0] - counts[1]) <= 1


def test_another_share_is_held_out_of_each_class(tmp_path):
    index = pack_digits(tmp_path / "a", seen_fraction=0.25)
    totals = np.bincount(index.class_id)
    seen = np.bincount(index.class_id[index.select("seen")])
    assert (np.abs(seen - totals / 4) <= 0.5).all()
    few = pack_digits(tmp_path / "b", seen_fraction=1e-4)
    assert np.bincount(few.class_id[few.select("seen")]).tolist() == [1] * 10


def test_the_division_follows_the_seed(packed, tmp_path):
    again = pack_digits(tmp_path / "a")
    assert again.fingerprint == packed.fingerprint
    other = pack_digits(tmp_path / "b", seed=1)
    held_out = [{i.key(row) for row in i.select("seen").tolist()} for i in (packed, other)]
    share = len(held_out[0] & held_out[1]) / len(held_out[0])
    assert 0.4 < share < 0.6  # An independent draw of one half.


def test_seeds_are_not_mixed_and_impossible_shares_are_refused(tmp_path):
    pack_digits(tmp_path / "out")
    with pytest.raises(UsageError, match=r"other parameters \(seed=0 \(now 1\)\)"):
        pack_digits(tmp_path / "out", seed=1)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="expected a share above 0 and below 1"):
            pack_digits(tmp_path / "none", seen_fraction=share)
    assert not (tmp_path / "none").exists()


def test_the_command_packs_and_reports(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    digits_module.add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path / "out"), "--seen-fraction", "0.2"])
    assert digits_module.run(arguments) == 0
    assert "1,797 samples (seen 359, train 1,438), 10 training classes" in capsys.readouterr().out
