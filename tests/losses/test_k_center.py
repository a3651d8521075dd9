"""Greedy k-center against the rule done by hand, and against all subsets of tiny pools."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.k_center import k_center


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _greedy(points: np.ndarray, count: int, covering: np.ndarray) -> tuple[list[int], list[float]]:
    """The rule of papers.md 4.2 for one class, point by point."""
    known, chosen, radii = list(covering), [], []
    for _ in range(count):
        distances = [min(float(np.linalg.norm(p - k)) for k in known) for p in points]
        chosen.append(distances.index(max(distances)))
        if not chosen[:-1] and not covering.any():
            known = []  # The origin is where the rule starts, and covers nothing.
        known.append(points[chosen[-1]])
        radii.append(max(min(float(np.linalg.norm(p - k)) for k in known) for p in points))
    return chosen, radii


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    classes=st.integers(1, 5),
    points=st.integers(1, 9),
    features=st.integers(1, 4),
    count=st.integers(1, 5),
    known=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_it_is_the_brute_force_greedy_answer(
    classes: int, points: int, features: int, count: int, known: int, seed: int
) -> None:
    pool = _random(classes, points, features, seed=seed)
    covering = _random(classes, known, features, seed=seed + 1) if known else None
    chosen, radii = k_center(pool, count, covering=covering)
    for each in range(classes):
        start = np.zeros((1, features)) if covering is None else covering[each].numpy()
        wanted, wanted_radii = _greedy(pool[each].numpy(), count, start)
        distinct = min(count, points)
        assert chosen[each, :distinct].tolist() == wanted[:distinct]
        np.testing.assert_allclose(radii[each], wanted_radii, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    points=st.integers(2, 8),
    count=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    coarse=st.booleans(),
    cosine=st.booleans(),
)
def test_its_radius_is_at_most_twice_the_smallest_of_all_subsets(
    points: int, count: int, seed: int, coarse: bool, cosine: bool
) -> None:
    pool = _random(1, points, 2, seed=seed)
    pool = (2 * pool).round() + 0.25 if coarse else pool  # Ties and equal points.
    count = min(count, points)
    radius = k_center(pool, count, "cosine" if cosine else "l2").radii[0, -1]
    measured = pool[0] / pool[0].norm(dim=1, keepdim=True) if cosine else pool[0]
    distances = torch.linalg.vector_norm(measured[:, None] - measured[None], dim=-1)
    best = min(
        float(distances[:, list(some)].amin(1).amax())
        for some in combinations(range(points), count)
    )
    assert best - 1e-12 <= radius <= 2 * best + 1e-12


def test_a_line_of_points_by_hand() -> None:
    pool = torch.tensor([[[0.0], [1.0], [4.0], [10.0], [6.0]]])
    chosen, radii = k_center(pool, 4)
    # 10 is the farthest from the origin; then 0, then 4 (of distance 4, as 6: the lowest place).
    assert chosen.tolist() == [[3, 0, 2, 4]]
    assert radii.tolist() == [[10.0, 4.0, 2.0, 1.0]]
    # What covers the class takes part as if chosen before: 9 and 0 leave 4, then 6.
    known = k_center(pool, 2, covering=torch.tensor([[[9.0], [0.0]]]))
    assert known.chosen.tolist() == [[2, 4]]
    assert known.radii.tolist() == [[2.0, 1.0]]


def test_equal_distances_go_to_the_lowest_place() -> None:
    square = torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]])
    assert k_center(square, 4).chosen.tolist() == [[0, 2, 1, 3]]
    assert k_center(square.flip(1), 4).chosen.tolist() == [[0, 2, 1, 3]]
    alike = torch.ones(1, 3, 2)
    assert k_center(alike, 3).chosen.tolist() == [[0, 0, 0]]  # No more distinct points than 1.


def test_cosine_sees_directions_alone_and_begins_with_the_first_point() -> None:
    pool = _random(6, 9, 4, seed=3)
    scaled = pool * (1 + torch.arange(9, dtype=torch.float64))[:, None]
    covering = _random(6, 2, 4, seed=4)
    for known in (None, covering):
        wanted = k_center(pool, 4, "cosine", covering=known)
        found = k_center(scaled, 4, "cosine", covering=known)
        assert torch.equal(wanted.chosen, found.chosen)
        torch.testing.assert_close(wanted.radii, found.radii)
    assert (k_center(pool, 4, "cosine").chosen[:, 0] == 0).all()
    unit = pool / pool.norm(dim=-1, keepdim=True)
    by_l2 = k_center(unit, 4, covering=covering / covering.norm(dim=-1, keepdim=True))
    assert torch.equal(by_l2.chosen, k_center(pool, 4, "cosine", covering=covering).chosen)


def test_neither_tiles_nor_permuted_classes_nor_rotations_change_the_choice() -> None:
    pool, covering = _random(7, 8, 5, seed=1), _random(7, 3, 5, seed=2)
    wanted = k_center(pool, 4, covering=covering)
    small = k_center(pool, 4, covering=covering, tile_bytes=1)
    assert torch.equal(wanted.chosen, small.chosen)
    assert torch.equal(wanted.radii, small.radii)
    order = torch.tensor([3, 0, 6, 2, 1, 5, 4])
    permuted = k_center(pool[order], 4, covering=covering[order])
    assert torch.equal(permuted.chosen, wanted.chosen[order])
    rotation = torch.linalg.qr(_random(5, 5, seed=9)).Q
    rotated = k_center(pool @ rotation, 4, covering=covering @ rotation)
    assert torch.equal(rotated.chosen, wanted.chosen)
    torch.testing.assert_close(rotated.radii, wanted.radii)
    # Permuted points are the same points, elsewhere.
    places = torch.tensor([4, 1, 7, 0, 2, 6, 3, 5])
    moved = k_center(pool[:, places], 4, covering=covering)
    assert torch.equal(places[moved.chosen], wanted.chosen)


def test_places_without_a_point_are_never_chosen_and_count_in_no_radius() -> None:
    pool = _random(5, 6, 3, seed=5)
    filled = torch.ones(5, 6, dtype=torch.bool)
    filled[0, [0, 5]] = False
    filled[1, 1:] = False
    filled[2] = False
    far = torch.where(filled[..., None], pool, float("nan"))
    chosen, radii = k_center(far, 4, filled=filled)
    wanted = k_center(pool[:1, 1:5], 4)
    assert torch.equal(chosen[0], wanted.chosen[0] + 1)
    assert torch.equal(radii[0], wanted.radii[0])
    assert chosen[1].tolist() == [0, 0, 0, 0]
    assert radii[1].tolist() == [0.0] * 4
    assert chosen[2].tolist() == [-1] * 4
    assert radii[2].tolist() == [0.0] * 4
    assert torch.equal(chosen[3:], k_center(pool[3:], 4).chosen)
    # By directions too, where the first point is the first *filled* one.
    assert k_center(far, 2, "cosine", filled=filled).chosen[:3, 0].tolist() == [1, 0, -1]


def test_near_points_are_told_apart_far_from_the_origin() -> None:
    # Sums of products give 0 for both distances in float32, and the choice falls on the first.
    pool = torch.tensor([[[4000.0], [4000.0], [4000.001], [4000.002]]])
    assert k_center(pool, 1, covering=pool[:, :1]).chosen.tolist() == [[3]]
    assert k_center(pool.bfloat16(), 2).radii.dtype == torch.float32


def test_no_class_is_no_choice_and_nonsense_is_refused_in_one_line() -> None:
    assert k_center(torch.zeros(0, 3, 2), 2).chosen.shape == (0, 2)
    with pytest.raises(UsageError, match="got 0 points to choose"):
        k_center(torch.zeros(1, 3, 2), 0)
    with pytest.raises(UsageError, match="pool of 0 points"):
        k_center(torch.zeros(1, 0, 2), 1)
