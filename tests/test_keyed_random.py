"""Keyed random numbers: pinned for ever, the same in Python and on tensors, and random."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_dml.keyed_random import generator, key_of, keyed_normal, keyed_uniform, row_keys

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """The finaliser as published, with the state's increment (Steele, Lea, Flood, 2014)."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def test_keys_and_numbers_are_pinned() -> None:
    # Data sets, initial weights and resumed runs depend on these: they must never change.
    assert key_of(0, "augment") == 17058946039833899898
    assert key_of(1, "augment") == 5359422653748974482
    assert key_of(2**63 - 1, "dropout", 3, 7) == 14389840963485185021
    assert key_of(5, "class weight", -1) == 13178604797249377426
    keys = row_keys(key_of(0, "augment"), torch.arange(3))
    assert keys.tolist() == [1045413339000535196, 3463002698487759733, -6210399665450376673]
    uniform = [[0.03501397371292114, 0.25092005729675293], [0.9382025599479675, 0.671546459197998]]
    assert keyed_uniform(keys[:2], 2).tolist() == uniform
    normal = torch.tensor([0.03579350560903549, 0.99614417552948, 1.2741262912750244])
    # Logarithm and cosine may differ in the last bit between machines.
    torch.testing.assert_close(keyed_normal(keys[:1], 3)[0], normal, rtol=1e-6, atol=1e-6)
    assert row_keys(0, torch.tensor([0])).item() == signed(0xE220A8397B1DCDAF)  # published value
    raw = generator(key_of(0, "augment")).bit_generator.random_raw(2)
    assert raw.tolist() == [5461611145405436419, 18194882389565814347]


def test_python_and_tensors_mix_alike() -> None:
    positions = [0, 1, 2, 255, 10**6, 2**40, 2**62, -1]
    for key in (0, 1, 2**63 - 1, 2**63, MASK, key_of(3, "dropout", 9)):
        expected = [signed(splitmix64((position & MASK) ^ key)) for position in positions]
        assert row_keys(key, torch.tensor(positions)).tolist() == expected
    state = splitmix64(7 ^ zlib.crc32(b"augment"))
    assert key_of(7, "augment") == state
    assert key_of(7, "augment", 5) == splitmix64(state ^ 5)


def test_every_part_of_a_key_matters() -> None:
    parts = itertools.product((0, 1, 2), ("augment", "dropout", ""), (0, 1, 2), (0, 1, 2))
    keys = [key_of(seed, purpose, *numbers) for seed, purpose, *numbers in parts]
    keys += [key_of(0, "augment"), key_of(0, "augment", 0)]
    assert len(set(keys)) == len(keys)
    # The order of the numbers is part of the key: step 1 of class 2 is not step 2 of class 1.
    assert key_of(0, "x", 1, 2) != key_of(0, "x", 2, 1)


@pytest.mark.parametrize("draw", [keyed_uniform, keyed_normal])
def test_a_row_depends_on_its_own_key_alone(
    draw: Callable[[Tensor, int], Tensor],
) -> None:
    keys = row_keys(key_of(0, "rows"), torch.arange(100))
    whole = draw(keys, 17)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(keys[order], 17), whole[order])
    assert torch.equal(torch.cat([draw(keys[:3], 17), draw(keys[3:], 17)]), whole)
    # Fewer numbers a row are the beginning of more.
    assert torch.equal(draw(keys, 5), whole[:, :5])
    assert draw(keys[:0], 5).shape == (0, 5)
    assert draw(keys, 5).dtype == torch.float32


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack((first.flatten(), second.flatten())).double())[0, 1].item()


def test_uniform_numbers_fill_the_interval_evenly() -> None:
    keys = row_keys(key_of(1, "uniform"), torch.arange(1000))
    numbers = keyed_uniform(keys, 1000)
    assert 0 <= numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    # A million draws: five standard deviations of mean, variance and bin counts.
    assert abs(numbers.double().mean() - 1 / 2) < 5 * (1 / 12 / 1e6) ** 0.5
    assert abs(numbers.double().var() - 1 / 12) < 5 * (1 / 180 / 1e6) ** 0.5
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    assert (counts - 1e4).abs().max() < 5 * 1e4**0.5
    # Neighbouring rows, neighbouring columns and other salts have nothing to do with each other.
    for other in (numbers.roll(1, 0), numbers.roll(1, 1), keyed_uniform(keys, 1000, salt=1)):
        assert abs(correlation(numbers, other)) < 5e-3


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    keys = row_keys(key_of(2, "normal"), torch.arange(1000))
    numbers = keyed_normal(keys, 1000).double()
    assert numbers.isfinite().all()
    # Five standard deviations of the first four moments of a million draws.
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((numbers**power).mean() - moment) < 5 * (variance / 1e6) ** 0.5, power
    assert 4.5 < numbers.abs().max() < 6.5
    assert abs(correlation(numbers[1:], numbers[:-1])) < 5e-3


def test_streams_of_different_keys_are_unrelated() -> None:
    first, second = (generator(key_of(seed, "pack")).random(100_000) for seed in (0, 1))
    assert np.array_equal(first, generator(key_of(0, "pack")).random(100_000))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
