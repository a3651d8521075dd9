"""Near pairs of hashes: the same as comparing all with all, at a bounded cost."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.data import leak_pairs
from dist_dml.data.leak_pairs import near_pairs

ALL = 10**6


def family(seed: int, count: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Random hashes, and copies of them with up to `distance + 2` bits flipped; some repeated."""
    random = np.random.default_rng(seed)
    right = random.integers(0, 2**64, count, dtype=np.uint64)
    left = right[random.integers(0, count, count)].copy()
    for row in range(count):
        for bit in random.permutation(64)[: random.integers(0, distance + 3)]:
            left[row] ^= np.uint64(1) << np.uint64(bit)
    return np.concatenate([left, left[: count // 4]]), np.concatenate([right, right[: count // 3]])


def all_pairs(left: np.ndarray, right: np.ndarray, distance: int) -> list[tuple[int, int, int]]:
    bits = np.bitwise_count(left[:, None] ^ right[None, :])
    rows, columns = np.nonzero(bits <= distance)
    return sorted(zip(rows.tolist(), columns.tolist(), bits[rows, columns].tolist(), strict=True))


def listed(pairs: leak_pairs.HashPairs) -> list[tuple[int, int, int]]:
    columns = (pairs.left.tolist(), pairs.right.tolist(), pairs.distance.tolist())
    return sorted(zip(*columns, strict=True))


@pytest.fixture(params=["bands", "brute force"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of searching, whatever the number of hashes would choose."""
    cost = 1e9 if request.param == "bands" else 0.0
    monkeypatch.setattr(leak_pairs, "_BRUTE_NANOSECONDS", cost)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 5, 7, 8, 10])
def test_every_pair_within_the_distance_is_found_once(distance: int) -> None:
    for seed in range(3):
        left, right = family(seed, 60, distance)
        found = near_pairs(left, right, distance, ALL)
        assert listed(found) == all_pairs(left, right, distance)
        assert len(found.left) > 20
        assert not len(found.crowded)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=0, max_size=12),
    st.lists(st.integers(0, 15), min_size=0, max_size=12),
    st.integers(0, 4),
    st.integers(1, 3),
)
def test_the_nearest_partners_are_those_of_all_pairs(
    left: list[int], right: list[int], distance: int, most: int
) -> None:
    # Four bits far apart: many ties and repeats.
    spread = np.array([sum(1 << (16 * bit) for bit in range(4) if v >> bit & 1) for v in range(16)])
    hashes = spread.astype(np.uint64)
    ours, theirs = hashes[np.array(left, int)], hashes[np.array(right, int)]
    found = near_pairs(ours, theirs, distance, most)
    wanted = all_pairs(ours, theirs, distance)
    assert set(listed(found)) <= set(wanted)
    assert len(set(listed(found))) == len(found.left)
    for row in range(len(ours)):
        nearest = sorted(bits for i, _, bits in wanted if i == row)
        assert found.distance[found.left == row].tolist() == nearest[:most]
        assert (row in found.crowded) == (len(nearest) > most)


@pytest.mark.usefixtures("way")
def test_pairs_of_the_same_group_are_left_out() -> None:
    left, right = family(5, 80, 6)
    random = np.random.default_rng(1)
    groups = random.integers(0, 3, len(left)), random.integers(0, 3, len(right))
    found = near_pairs(left, right, 6, ALL, groups)
    wanted = [p for p in all_pairs(left, right, 6) if groups[0][p[0]] != groups[1][p[1]]]
    assert listed(found) == wanted
    assert 0 < len(wanted) < len(all_pairs(left, right, 6))


def test_a_hash_that_very_many_images_share_costs_a_few_pairs_each() -> None:
    left, right = np.full(50_000, 7, np.uint64), np.full(40_000, 7, np.uint64)
    found = near_pairs(left, right, 8, 8)
    assert np.bincount(found.left).tolist() == [8] * 50_000
    assert len(found.crowded) == 50_000
    # All copies are met, not the same eight each time.
    assert len(np.unique(found.right)) == 40_000


def test_memory_stays_bounded_where_all_hashes_fall_into_one_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leak_pairs, "_BRUTE_NANOSECONDS", 1e9)
    random = np.random.default_rng(2)
    # Two of the three bands are equal everywhere: all pairs are candidates of both.
    third = np.uint64(sum(1 << bit for bit in range(0, 64, 3)))
    left, right = (random.integers(0, 2**64, n, dtype=np.uint64) & third for n in (1000, 20_000))
    tracemalloc.start()
    found = near_pairs(left, right, 2, ALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listed(found) == all_pairs(left, right, 2)
    # The candidates of all pairs together would take 2 * 20 million * 24 bytes = 960 MB.
    assert peak < 250e6


def test_nothing_is_found_among_no_hashes() -> None:
    none, some = np.zeros(0, np.uint64), np.ones(3, np.uint64)
    for left, right in ((none, some), (some, none), (none, none)):
        assert listed(near_pairs(left, right, 8, 8)) == []
