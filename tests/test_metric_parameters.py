"""k and p of the metric losses: the condition of a metric, refusals, and how users write them."""

from __future__ import annotations

import math
import re

import pytest

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters, MetricSpec, largest_metric_k, parse_metric

# p, K(p) to six digits, and the smallest a with b = 1 in the supplement's convention.
TABLE = [
    (0.01, 0.999952, 4.838e-5),
    (0.05, 0.998756, 0.001245),
    (0.1, 0.994849, 0.005178),
    (0.2, 0.977889, 0.022611),
    (0.3, 0.946572, 0.056443),
    (0.5, 0.828427, 0.207107),
    (0.7, 0.609994, 0.639361),
    (0.9, 0.249930, 3.00112),
    (0.99, 0.027439, 35.44),
]


@pytest.mark.parametrize(("p", "largest", "smallest_a"), TABLE)
def test_the_largest_k_and_the_smallest_a_are_those_of_the_papers_table(
    p: float, largest: float, smallest_a: float
) -> None:
    assert largest_metric_k(p) == pytest.approx(largest, abs=6e-7)
    assert largest_metric_k(p) == pytest.approx(2 ** (p + 1) - 2 ** (2 * p), abs=1e-15)
    assert 1 / largest_metric_k(p) - 1 == pytest.approx(smallest_a, rel=2e-4)
    # A little more offset is a metric, a little less is none.
    assert MetricParameters.of_offset(1.001 * smallest_a, 1.0, p).is_metric
    assert not MetricParameters.of_offset(0.999 * smallest_a, 1.0, p).is_metric


@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_the_largest_k_is_a_metric_and_the_next_above_is_none(p: float) -> None:
    largest = largest_metric_k(p)
    assert MetricParameters(largest, p).is_metric
    assert not MetricParameters(largest + 1e-14, p).is_metric


def test_k_of_1_and_p_of_1_are_no_metrics_however_near_the_condition_rounds() -> None:
    assert largest_metric_k(1) == 0
    assert not MetricParameters(1e-300, 1).is_metric
    assert not MetricParameters(1e-13, 1).is_metric
    # K(1e-7) = 1 - 4.8e-15, and K(1e-9) rounds to 1; d(0, 1) is infinite with k = 1.
    assert not MetricParameters(1.0, 1e-7).is_metric
    assert not MetricParameters(1.0, 1e-9).is_metric


def test_the_paper_s_a_of_3_at_p_of_0_9_misses_the_condition_by_a_hair() -> None:
    assert MetricParameters.of_offset(3.0, 1.0, 0.9) == MetricParameters(0.25, 0.9)
    assert not MetricParameters.of_offset(3.0, 1.0, 0.9).is_metric
    assert MetricParameters.of_offset(3.0012, 1.0, 0.9).is_metric


@pytest.mark.parametrize("a", [1e-6, 0.25, 3.0])
@pytest.mark.parametrize("b", [0.1, 1.0])
def test_both_conventions_give_the_same_parameters(a: float, b: float) -> None:
    supplement = MetricParameters.of_offset(a, b, 0.5, "supplement")
    assert supplement == MetricParameters.of_offset(1 + a, b, 0.5, "main")
    assert supplement.k == pytest.approx(b / (1 + a))
    assert MetricParameters.of_offset(a, b, 0.5) == supplement


@pytest.mark.parametrize(
    ("a", "b", "p", "convention", "inequality"),
    [
        (-0.1, 1.0, 0.5, "supplement", "a >= 0"),
        (math.nan, 1.0, 0.5, "supplement", "a >= 0"),
        (2.0, 1.1, 0.5, "main", "0 < b <= 1"),
        (2.0, 0.0, 0.5, "main", "0 < b <= 1"),
        (2.0, -1.0, 0.5, "supplement", "0 < b <= 1"),
        (2.0, math.nan, 0.5, "supplement", "0 < b <= 1"),
        (0.5, 0.6, 0.5, "main", "b <= a"),
        (0.0, 1.0, 0.5, "main", "b <= a"),
        (0.1, 1.0, 0.0, "supplement", "0 < p <= 1"),
        (0.1, 1.0, -0.5, "supplement", "0 < p <= 1"),
        (0.1, 1.0, 1.01, "supplement", "0 < p <= 1"),
        (0.1, 1.0, math.nan, "supplement", "0 < p <= 1"),
        (math.inf, 1.0, 0.5, "supplement", "0 < k <= 1"),
    ],
)
def test_offsets_outside_the_definition_are_refused_by_the_inequality_that_fails(
    a: float, b: float, p: float, convention: str, inequality: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(inequality)) as caught:
        MetricParameters.of_offset(a, b, p, convention)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [1 + 1e-9, 2.0, 0.0, -0.5, math.nan, math.inf])
def test_a_k_outside_the_definition_is_refused_with_the_largest_of_a_metric(k: float) -> None:
    with pytest.raises(UsageError, match=r"0 < k <= 1.*K\(p\) = 0\.828427"):
        MetricParameters(k, 0.5)


def test_the_loss_at_the_start_is_the_sum_written_out() -> None:
    for k, p, num_classes in ((1.0, 1.0, 2), (0.8, 0.5, 10), (0.9948, 0.1, 1000), (1.0, 0.01, 7)):
        share = 1 / num_classes
        label = -math.log1p(-k * (1 - share) ** p)
        others = -(num_classes - 1) * math.log1p(-k * share**p)
        got = MetricParameters(k, p).loss_at_uniform(num_classes)
        assert got == pytest.approx((label + others) / p, rel=1e-12)
    assert MetricParameters(1.0, 1.0).loss_at_uniform(1) == 0


@pytest.mark.parametrize(
    ("k", "p", "expected"),
    [
        (1 - 1e-7, 1.0, 14.8),
        (1 - 1e-7, 0.99, 15.0),
        (largest_metric_k(0.5), 0.5, 1.7e3),
        (largest_metric_k(0.1), 0.1, 2.9e6),
        (largest_metric_k(0.01), 0.01, 2.0e8),
    ],
)
def test_the_loss_at_the_start_of_a_million_classes_explodes_below_p_of_0_99(
    k: float, p: float, expected: float
) -> None:
    assert MetricParameters(k, p).loss_at_uniform(10**6) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("text", "k", "p", "top", "name"),
    [
        ("metric(p=0.1)", largest_metric_k(0.1), 0.1, 0, "metric_p0.1"),
        ("metric(k=0.8,p=0.5)", 0.8, 0.5, 0, "metric_k0.8_p0.5"),
        ("metric(a=1e-6,p=0.01)", 1 / (1 + 1e-6), 0.01, 0, "metric_a1e-6_p0.01"),
        ("metric(p=0.1,top=64)", largest_metric_k(0.1), 0.1, 64, "metric_p0.1_top64"),
        (" metric( k = 1, p = 1 ) ", 1.0, 1.0, 0, "metric_k1_p1"),
        ("metric(p=1, a=1e+0)", 0.5, 1.0, 0, "metric_p1_a1e0"),
        ("metric(p=0.5,\tk=0.8)", 0.8, 0.5, 0, "metric_p0.5_k0.8"),
    ],
)
def test_a_distance_is_read_and_named(text: str, k: float, p: float, top: int, name: str) -> None:
    spec = parse_metric(text)
    assert spec == MetricSpec(MetricParameters(k, p), top, text.strip())
    assert spec.name == name
    # What MLflow takes in the name of a metric.
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", spec.name)


@pytest.mark.parametrize("p", [1e-5, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_without_k_and_a_it_is_a_metric(p: float) -> None:
    assert parse_metric(f"metric(p={p})").parameters.is_metric


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric", "cannot be read"),
        ("metric()", "cannot be read"),
        ("metric(0.1)", "cannot be read"),
        ("metric(p=0.1", "cannot be read"),
        ("metric(p=0.1,)", "cannot be read"),
        ("metric(p=0.1) or so", "cannot be read"),
        ("cosine", "cannot be read"),
        ("metric(q=0.1)", "'q' unknown or twice"),
        ("metric(p=0.1,p=0.2)", "'p' unknown or twice"),
        ("metric(p=small)", "p=small, no number"),
        ("metric(k=0.5)", "needs p"),
        ("metric(k=0.5,a=1,p=0.5)", "k or a or neither"),
        ("metric(p=1)", r"K\(1\) = 0"),
        ("metric(p=0)", "0 < p <= 1"),
        ("metric(p=nan)", "0 < p <= 1"),
        ("metric(k=1.5,p=0.5)", "0 < k <= 1"),
        ("metric(a=-1,p=0.5)", "a >= 0"),
        ("metric(p=0.1,top=0)", "top=0"),
        ("metric(p=0.1,top=2.5)", r"top=2\.5"),
        ("metric(p=0.1,top=-3)", "top=-3"),
        ("metric(p=0.1,top=nan)", "top=nan"),
        ("metric(p=0.1,top=inf)", "top=inf"),
        ("metric(p=1e-9)", "rounds to 1"),
    ],
)
def test_a_distance_that_cannot_be_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_metric(text)
    assert "\n" not in str(caught.value)
