"""Margins as functions of the cosine: values, derivatives, the ends of the range, batch rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_dml.losses.margins import (
    AngularMargin,
    ClassMargin,
    Margin,
    adaptive_margin,
    dynamic_angles,
    running_norms,
)
from dist_dml.losses.softmax import TileTarget

# Cosines of 40 rows, besides the ends; beyond pi is reached by angles of 1.5 and multipliers.
COSINES = torch.linspace(-0.995, 0.995, 40, dtype=torch.float64)
TARGET = TileTarget.of(torch.arange(40) % 5, 0, 5)
ROW_ANGLES = torch.linspace(-1.2, 1.2, 40, dtype=torch.float64)
MARGINS: dict[str, Margin] = {
    "none": AngularMargin(),
    "cosface": AngularMargin(cosine=0.35),
    "arcface": AngularMargin(angle=0.5),
    "arcface, wide": AngularMargin(angle=1.5),
    "combined": AngularMargin(1.0, 0.3, 0.2),
    "sphereface": AngularMargin(4.0),
    "multiplied": AngularMargin(1.2, 1.0, 0.1),
    "of classes": ClassMargin(torch.tensor([0.0, 0.2, 0.5, 1.0, 1.5], dtype=torch.float64)),
    "of rows, clipped": AngularMargin(1.0, ROW_ANGLES, 0.4 - ROW_ANGLES, beyond="clip"),
}


@pytest.mark.parametrize("name", MARGINS)
def test_the_derivative_is_that_of_the_value(name: str) -> None:
    margin, step = MARGINS[name], 1e-6
    _, derivative = margin.apply(COSINES, TARGET)
    above, _ = margin.apply(COSINES + step, TARGET)
    below, _ = margin.apply(COSINES - step, TARGET)
    quotient = (above - below) / (2 * step)
    # A kink between the two sides (ArcFace's and the clip's at pi) is no derivative.
    smooth = (quotient - (above - margin.apply(COSINES, TARGET)[0]) / step).abs() < 1e-3
    assert smooth.sum() >= 38
    torch.testing.assert_close(derivative[smooth], quotient[smooth], rtol=1e-7, atol=1e-7)


def test_values_are_those_of_the_papers() -> None:
    angle = COSINES.acos()

    def value(name: str) -> Tensor:
        return MARGINS[name].apply(COSINES, TARGET)[0]

    torch.testing.assert_close(value("none"), COSINES)
    torch.testing.assert_close(value("cosface"), COSINES - 0.35)
    arcface = torch.where(
        angle + 0.5 <= math.pi, (angle + 0.5).cos(), COSINES - 0.5 * math.sin(0.5)
    )
    torch.testing.assert_close(value("arcface"), arcface)
    # SphereFace: (-1)^n cos(4 t) - 2 n with n = floor(4 t / pi).
    n = (4 * angle / math.pi).floor()
    torch.testing.assert_close(value("sphereface"), (-1) ** n * (4 * angle).cos() - 2 * n)
    clipped = (angle + ROW_ANGLES).clamp(0, math.pi).cos() - (0.4 - ROW_ANGLES)
    torch.testing.assert_close(value("of rows, clipped"), clipped)
    by_class = torch.tensor([0.0, 0.2, 0.5, 1.0, 1.5], dtype=torch.float64)[torch.arange(40) % 5]
    wanted = torch.where(
        angle + by_class <= math.pi, (angle + by_class).cos(), COSINES - by_class * by_class.sin()
    )
    torch.testing.assert_close(value("of classes"), wanted)


@pytest.mark.parametrize("name", ["arcface", "arcface, wide", "combined", "sphereface"])
def test_a_larger_cosine_is_never_worth_less(name: str) -> None:
    # Also over the jump of ArcFace's field form at the angle pi, which is upwards.
    cosine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    target = TileTarget.of(torch.zeros(4001, dtype=torch.int64), 0, 1)
    value, derivative = MARGINS[name].apply(cosine, target)
    assert (value.diff() > -1e-12).all()
    assert (derivative > -1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["arcface", "arcface, wide", "sphereface", "multiplied"])
def test_at_the_ends_and_beyond_them_all_is_finite(name: str, dtype: torch.dtype) -> None:
    # A cosine of unit vectors can round to 1 + 1e-7.
    cosine = torch.tensor([-1.0, 1.0, -1 - 1e-6, 1 + 1e-6, -1 + 1e-7, 1 - 1e-7], dtype=dtype)
    margin = MARGINS[name]
    value, derivative = margin.apply(cosine, TARGET)
    assert value.isfinite().all()
    assert derivative.isfinite().all()
    assert isinstance(margin, AngularMargin)
    exact, _ = margin.apply(cosine.double().clamp(-1, 1), TARGET)
    # The angle of a cosine near 1 is known to the root of the rounding.
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=2e-3)
    # The derivative sin(t + m) / sin t grows without bound towards 0 and is held at sin t = 1e-3.
    assert derivative.abs().max() <= margin.multiplier / {4: 1e-3, 8: 1e-7}[dtype.itemsize]


def test_class_margins_are_read_at_the_owners_place() -> None:
    # This worker owns classes 10..14 and the tile holds 12..14.
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    labels = torch.tensor([12, 14, 10, 99])
    target = TileTarget.of(labels, 12, 15, first_class=10)
    value, _ = ClassMargin(angles).apply(torch.full((4,), 0.5, dtype=torch.float64), target)
    wanted = [math.cos(math.acos(0.5) + m) for m in (0.3, 0.5)]
    assert value[:2].tolist() == pytest.approx(wanted, rel=1e-14)


def test_dynamic_margins_fall_with_the_class_size() -> None:
    counts = torch.tensor([0, 1, 16, 10_000])
    angles = dynamic_angles(counts, 0.5, 0.05, 0.25)
    # A class without images counts as one with a single image.
    assert angles.tolist() == pytest.approx([0.55, 0.55, 0.30, 0.10])


def test_adaface_follows_its_equations() -> None:
    norms = torch.tensor([10.0, 20.0, 30.0, 1e4, 0.0], dtype=torch.float64)
    mean, deviation = torch.tensor(20.0).double(), torch.tensor(10.0).double()
    margin = adaptive_margin(norms, mean, deviation, margin=0.4, concentration=0.333)
    # Norms are first clipped to 0.001..100, then z = (norm - 20) / (10 / h) to -1..1.
    z = torch.tensor([-0.333, 0.0, 0.333, 1.0, -0.66597], dtype=torch.float64)
    torch.testing.assert_close(margin.angle, -0.4 * z, rtol=3e-4, atol=0)
    torch.testing.assert_close(margin.cosine, 0.4 * z + 0.4, rtol=3e-4, atol=0)
    assert margin.beyond == "clip"


def test_running_norms_move_towards_the_batch() -> None:
    norms = torch.tensor([1.0, 3.0, 1e5], dtype=torch.float64)  # The last counts as 100.
    start = torch.tensor(20.0).double(), torch.tensor(100.0).double()
    mean, deviation = running_norms(
        norms, torch.ones(len(norms), dtype=torch.bool), *start, momentum=0.1
    )
    clipped = torch.tensor([1.0, 3.0, 100.0], dtype=torch.float64)
    assert mean.item() == pytest.approx(0.9 * 20 + 0.1 * clipped.mean().item())
    assert deviation.item() == pytest.approx(0.9 * 100 + 0.1 * clipped.std().item())
    # Rows that do not count leave no trace, and a batch without rows none at all.
    mixed = torch.tensor([1.0, 7.0, 3.0, 100.0], dtype=torch.float64)
    counted = torch.tensor([True, False, True, True])
    assert running_norms(mixed, counted, *start, momentum=0.1) == (mean, deviation)
    assert running_norms(mixed, counted & False, *start, momentum=0.1) == start
    # A single row has no standard deviation: 0 instead of nan.
    _, deviation = running_norms(norms[:1], torch.ones(1, dtype=torch.bool), *start, momentum=0.1)
    assert deviation.item() == pytest.approx(90.0)
