"""Paper A's losses as distances: axioms, tiers, counter-examples, and the digits near 0 and 1.

The twins are the definition in plain float64, and 300-digit decimals where float64 cannot follow.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.metric_space import MetricLoss, log_complements
from dist_dml.losses.outer import IDENTITY, LOGARITHM, RATIO, SATURATION, Outer
from dist_dml.metric_parameters import largest_metric_k

SQUARE = Outer("t^2", torch.square, is_concave=False)
CONCAVE = [IDENTITY, LOGARITHM, RATIO, SATURATION]
# Rounding of a sum of a few terms.
SLACK = 1e-9

examples = settings(derandomize=True, deadline=None, max_examples=150)
exponents = st.floats(0.01, 0.99)
shares = st.floats(0.01, 1.0)
points = st.floats(0, 1)
outers = st.sampled_from(CONCAVE)


@st.composite
def triples(draw: st.DrawFn) -> Tensor:
    """Three rows of log-probabilities (3, C), from uniform to nearly one-hot, in float64."""
    num_classes, size = draw(st.integers(2, 6)), draw(st.floats(0, 30))
    units = st.lists(st.floats(-1, 1), min_size=num_classes, max_size=num_classes)
    logits = torch.tensor([draw(units) for _ in range(3)], dtype=torch.float64)
    return (size * logits).log_softmax(1)


def plain(x: Tensor, y: Tensor, k: float, p: float) -> Tensor:
    """The definition, for all pairs of rows of probabilities."""
    return -torch.log1p(-k * (x[:, None] - y[None]).abs() ** p).sum(2) / p


def one_hot(num_classes: int) -> Tensor:
    """Log-probabilities of the labels (C, C)."""
    return torch.eye(num_classes, dtype=torch.float64).log()


def holds(left: Tensor, right: Tensor) -> bool:
    return bool((left <= right + SLACK * (1 + right.abs())).all())


@examples
@given(triples(), shares, exponents, outers)
def test_the_distance_is_the_definition_and_symmetric_and_zero_for_equals_only(
    log_x: Tensor, k: float, p: float, outer: Outer
) -> None:
    loss = MetricLoss.l2(k, p, outer)
    got = loss.distance(log_x, log_x)
    x = log_x.exp()
    # Differences of probabilities are rounded, and |s - t|^p magnifies that near 0.
    rounding = plain(torch.full((1, 1), 4e-16), torch.zeros(1, 1), k, p).item() * x.shape[1]
    expected = outer.function(plain(x, x, k, p))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9 + 2 * rounding)
    # Not to the bit: MKL's exponentials and logarithms round by where a number lies in memory.
    torch.testing.assert_close(got, got.T, rtol=1e-12, atol=1e-15)
    assert (got.diagonal() == 0).all()
    assert (got >= 0).all()
    apart = (x[:, None] - x[None]).abs().amax(2) > 1e-9
    assert (got[apart] > 0).all()


@examples
@given(triples(), exponents, shares, outers)
def test_up_to_the_largest_k_every_outer_function_keeps_the_triangle_inequality(
    log_x: Tensor, p: float, share: float, outer: Outer
) -> None:
    loss = MetricLoss.l2(share * largest_metric_k(p), p, outer)
    assert loss.tier().name == "metric"
    d = loss.distance(log_x, log_x)
    for i, j, m in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        assert holds(d[i, m], d[i, j] + d[j, m])


@examples
@given(points, points, points, exponents, shares)
def test_up_to_the_largest_k_one_coordinate_keeps_the_triangle_inequality(
    x: float, y: float, z: float, p: float, share: float
) -> None:
    loss = MetricLoss.l2(share * largest_metric_k(p), p)
    s, t = torch.tensor([[x, x, y], [z, y, z]], dtype=torch.float64)
    whole, first, second = loss.coordinate(s, t)
    assert holds(whole, first + second)


@examples
@given(triples(), shares, st.floats(0.01, 1.0), outers)
def test_any_k_and_p_keep_the_triangle_inequality_through_every_label(
    log_x: Tensor, k: float, p: float, outer: Outer
) -> None:
    labels = one_hot(log_x.shape[1])
    # k = 1 has infinite distances; inf <= inf holds.
    for loss in (MetricLoss.l2(k, p, outer), MetricLoss.l1(outer)):
        d, to_labels = loss.distance(log_x, log_x), loss.distance(log_x, labels)
        through = (to_labels[:, None] + to_labels[None]).amin(2)
        assert bool((d <= through + SLACK * (1 + d)).all())


@examples
@given(triples(), shares, st.floats(0.01, 1.0))
def test_saturation_makes_every_k_a_metric_and_l1_as_well(
    log_x: Tensor, k: float, p: float
) -> None:
    for loss in (MetricLoss.l2(k, p, SATURATION), MetricLoss.l1(SATURATION)):
        assert loss.tier().name == "metric"
        d = loss.distance(log_x, log_x)
        for i, j, m in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            assert holds(d[i, m], d[i, j] + d[j, m])
    # By hand: F(L1) = 1 - prod(1 - |x_i - y_i|).
    x = log_x.exp()
    by_hand = 1 - (1 - (x[:, None] - x[None]).abs()).prod(2)
    torch.testing.assert_close(MetricLoss.l1(SATURATION).distance(log_x, log_x), by_hand)


HALF_WAY = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)


def excess_at_half_way(loss: MetricLoss) -> tuple[float, float]:
    """L(x, z) - L(x, y) - L(y, z) at 0, 1/2, 1 in one coordinate and on the simplex."""
    s, t = torch.tensor([[0.0, 0.0, 0.5], [1.0, 0.5, 1.0]], dtype=torch.float64)
    whole, first, second = loss.coordinate(s, t).tolist()
    d = loss.distance(HALF_WAY.log(), HALF_WAY.log())
    return whole - first - second, float(d[0, 2] - d[0, 1] - d[1, 2])


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_a_hundredth_above_the_largest_k_half_way_breaks_the_triangle_inequality(p: float) -> None:
    largest = largest_metric_k(p)
    # 1.01 K(p) may exceed 1, where L does not exist: then k = 1, or just below it.
    for k in {min(1.01 * largest, 1.0), min(1.01 * largest, (1 + largest) / 2)}:
        loss = MetricLoss.l2(k, p)
        assert loss.tier().name == "weak"
        assert min(excess_at_half_way(loss)) > 1e-9
    at_the_largest = MetricLoss.l2(largest, p)
    assert at_the_largest.tier().name == "metric"
    for excess in excess_at_half_way(at_the_largest):
        assert abs(excess) <= 1e-9 * at_the_largest.vertex_distance


@pytest.mark.parametrize("k", [1e-6, 0.1, 0.5, 1 / (1 + 1e-7), 1.0])
def test_p_1_is_never_a_metric(k: float) -> None:
    loss = MetricLoss.l2(k, 1)
    assert loss.tier().name == "weak"
    assert min(excess_at_half_way(loss)) > 0
    assert loss.tier().uniform_points == "every one-hot label"


def test_the_papers_counter_example_of_l1_has_the_numbers_of_the_reference() -> None:
    # With an offset of 1e-7: 16.1 > 1.386 in one coordinate.
    excess, _ = excess_at_half_way(MetricLoss.of_offset(1e-7))
    assert excess == pytest.approx(16.118 - 1.386, abs=1e-3)
    assert excess_at_half_way(MetricLoss.l1())[0] == math.inf


def test_a_convex_outer_function_breaks_the_triangle_inequality_and_is_called_semi() -> None:
    loss = MetricLoss.l2(largest_metric_k(0.5), 0.5, SQUARE)
    # Half way is an equality with F = t, so that t^2 must break it: (2m)^2 > m^2 + m^2.
    m = MetricLoss.l2(largest_metric_k(0.5), 0.5).vertex_distance
    d = loss.distance(HALF_WAY.log(), HALF_WAY.log())
    assert float(d[0, 2]) == pytest.approx(4 * m**2)
    assert float(d[0, 1] + d[1, 2]) == pytest.approx(2 * m**2)
    tier = loss.tier()
    assert (tier.name, tier.uniform_points) == ("semi", "none is known")
    assert "t^2 is not concave" in tier.why
    for bound in (loss.intra_bound, loss.inter_bound, lambda _: loss.certified_below):
        with pytest.raises(UsageError, match="not concave"):
            bound(0.1)


def test_the_tier_gives_its_numbers() -> None:
    metric = MetricLoss.l2(0.8, 0.5).tier()
    assert (metric.name, metric.uniform_points) == ("metric", "every point")
    for part in ("k <= K(p)", "k = 0.8", "p = 0.5", "K(p) = 0.828427125", "M = 3.21888"):
        assert part in metric.why
    weak = MetricLoss.l1().tier()
    for part in ("k > K(p)", "k = 1, p = 1, K(p) = 0, M = inf"):
        assert part in weak.why
    assert "every k" in MetricLoss.l1(SATURATION).tier().why


def test_a_claim_about_an_outer_function_that_fails_is_refused() -> None:
    for function, message in (
        (lambda t: t + 1, r"F\(0\) = 0"),
        (torch.zeros_like, r"F\(t\) > 0"),
        (lambda t: t * torch.exp(-t), "increase strictly"),
        (torch.square, "is_concave=False"),
        (lambda t: torch.sqrt(t) + t**1.5 / 100, "is_concave=False"),
    ):
        with pytest.raises(UsageError, match=message):
            Outer("mine", function, is_concave=True)
    for function in (torch.log1p, RATIO.function, lambda t: t):
        with pytest.raises(UsageError, match=r"F\(-log\(1 - u\)\)"):
            Outer("mine", function, is_concave=True, makes_every_k_a_metric=True)
    assert Outer("root", torch.sqrt, is_concave=True).is_concave


def test_labels_are_apart_by_f_of_2m() -> None:
    labels = one_hot(4)
    for outer in CONCAVE:
        for k, p in ((0.8, 0.5), (1 / (1 + 1e-6), 1.0), (1.0, 1.0), (1.0, 0.1), (1e-3, 0.99)):
            loss = MetricLoss.l2(k, p, outer)
            d = loss.distance(labels, labels)
            expected = torch.full((4, 4), loss.label_separation, dtype=torch.float64)
            torch.testing.assert_close(d, expected.fill_diagonal_(0), rtol=1e-12, atol=0)
    assert MetricLoss.l2(0.8, 0.5).label_separation == pytest.approx(-4 * math.log(0.2))
    assert MetricLoss.l1().vertex_distance == math.inf
    assert MetricLoss.l1(SATURATION).label_separation == 1
    assert MetricLoss.l1(RATIO).label_separation == 1


@examples
@given(triples(), exponents, shares, outers)
def test_lemmas_3_and_4_hold_for_every_pair_with_f_included(
    log_x: Tensor, p: float, share: float, outer: Outer
) -> None:
    loss = MetricLoss.l2(share * largest_metric_k(p), p, outer)
    labels = log_x.argmax(1)
    epsilon, d = loss.to_label(log_x, labels), loss.distance(log_x, log_x)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        worst = float(torch.maximum(epsilon[i], epsilon[j]))
        if labels[i] == labels[j]:
            assert holds(d[i, j], epsilon[i] + epsilon[j])
            assert float(d[i, j]) <= loss.intra_bound(worst) + SLACK * (1 + worst)
        else:
            assert holds(loss.label_separation - epsilon[i] - epsilon[j], d[i, j])
            assert float(d[i, j]) >= loss.inter_bound(worst) - SLACK * (1 + worst)


@examples
@given(triples(), exponents, shares, outers)
def test_a_certified_row_is_classified_correctly(
    log_x: Tensor, p: float, share: float, outer: Outer
) -> None:
    loss = MetricLoss.l2(share * largest_metric_k(p), p, outer)
    for label in range(log_x.shape[1]):
        epsilon = loss.to_label(log_x, torch.full((3,), label))
        certified = epsilon < loss.certified_below * (1 - SLACK)
        assert (log_x.argmax(1)[certified] == label).all()


def test_the_bounds_by_hand_and_what_is_not_claimed() -> None:
    loss = MetricLoss.l2(0.8, 0.5)
    separation = -4 * math.log(0.2)
    assert loss.intra_bound(0.3) == pytest.approx(0.6)
    assert loss.inter_bound(0.3) == pytest.approx(separation - 0.6)
    assert loss.certified_below == pytest.approx(separation / 4)
    outer = MetricLoss.l2(0.8, 0.5, SATURATION)
    assert outer.certified_below == pytest.approx((1 - 0.2**4) / 4)
    # The sum inside F alone would certify more: F(M / 2) >= F(2M) / 4.
    assert 1 - math.exp(-outer.vertex_distance / 2) > outer.certified_below
    for weak in (MetricLoss.l1(), MetricLoss.l2(0.84, 0.5)):
        assert weak.intra_bound(0.3) == pytest.approx(0.6)
        with pytest.raises(UsageError, match=r"breaks k <= K\(p\) = "):
            weak.inter_bound(0.3)
        with pytest.raises(UsageError, match=r"breaks k <= K\(p\) = "):
            _ = weak.certified_below


@examples
@given(triples(), shares, st.floats(0.01, 1.0), outers)
def test_the_distance_to_a_label_equals_the_distance_to_its_one_hot_vector(
    log_x: Tensor, k: float, p: float, outer: Outer
) -> None:
    for loss in (MetricLoss.l2(k, p, outer), MetricLoss.l1(outer)):
        dense = loss.distance(log_x, one_hot(log_x.shape[1]))
        for label in range(log_x.shape[1]):
            got = loss.to_label(log_x, torch.full((3,), label))
            torch.testing.assert_close(got, dense[:, label], rtol=1e-12, atol=1e-13)


def test_l1_to_a_label_is_binary_cross_entropy_over_the_softmax() -> None:
    # Equation (15) equals (14) for one-hot labels.
    generator = torch.Generator().manual_seed(0)
    log_x = torch.randn(8, 5, generator=generator, dtype=torch.float64).log_softmax(1)
    labels = torch.randint(0, 5, (8,), generator=generator)
    target = F.one_hot(labels, 5).double()
    twin = F.binary_cross_entropy(log_x.exp(), target, reduction="none").sum(1)
    torch.testing.assert_close(MetricLoss.l1().to_label(log_x, labels), twin)


def test_the_gradient_to_the_logits_is_that_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    logits[0, 3] += 60  # Certain to beyond float64's resolution of 1.
    labels = torch.tensor([3, 0, 1, 6, 2, 5])
    for k, p in ((1 / (1 + 1e-6), 1.0), (0.8, 0.5), (1.0, 0.1), (0.9999, 0.01)):
        leaf = logits.clone().requires_grad_()
        MetricLoss.l2(k, p).to_label(leaf.log_softmax(1), labels).sum().backward()
        q = logits.log_softmax(1).exp()
        mine = F.one_hot(labels, 7).bool()
        others = q.masked_fill(mine, 0.0)
        om, q_y = others.sum(1), q[mine]
        h = (k * others**p / (1 - k * others**p)).masked_fill(mine, 0.0)
        g_y = -k * om ** (p - 1) / (1 - k * om**p)
        total = h.sum(1)
        wanted = h - q * (q_y * g_y + total)[:, None]
        wanted[mine] = q_y * (g_y * om - total)
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-10, atol=1e-14)


def exact_probabilities(logits: list[float]) -> list[Decimal]:
    with localcontext() as context:
        context.prec = 300
        weights = [Decimal(value).exp() for value in logits]
        return [weight / sum(weights) for weight in weights]


def exact_distance(x: list[Decimal], y: list[Decimal], k: float, p: float) -> float:
    with localcontext() as context:
        context.prec = 300
        total = Decimal(0)
        for s, t in zip(x, y, strict=True):
            difference = abs(s - t)
            power = (Decimal(p) * difference.ln()).exp() if difference else Decimal(0)
            inner = 1 - Decimal(k) * power
            if inner == 0:
                return math.inf
            total -= inner.ln()
        return float(total / Decimal(p))


HARD_ROWS = [
    [0.0, 0.0, 0.0, 0.0],
    [50.0, 0.0, 1.0, -3.0],
    [52.0, 2.5, -1.0, 0.0],
    [-3.0, 60.0, 0.0, 4.0],
    [400.0, 0.0, 2.0, 1.0],
    [0.4, 0.0, -9.0, -1.0],
    [1.0, 0.9, -80.0, -300.0],
]
HARD_PARAMETERS = [(1.0, 1.0), (1 / (1 + 1e-6), 1.0), (0.8, 0.5), (0.9948485, 0.1), (1.0, 0.01)]


@pytest.mark.parametrize(("k", "p"), HARD_PARAMETERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=str
)
def test_tiny_and_nearly_certain_probabilities_keep_their_digits(
    k: float, p: float, dtype: torch.dtype, tolerance: float
) -> None:
    # Against 300-digit arithmetic. In float32 a logit of 400 is itself known to 3e-5.
    loss = MetricLoss.l2(k, p)
    logits = torch.tensor(HARD_ROWS, dtype=dtype)
    rows = [exact_probabilities(row) for row in logits.double().tolist()]
    log_x = logits.log_softmax(1)
    exact = [[exact_distance(x, y, k, p) for y in rows] for x in rows]
    wanted = torch.tensor(exact, dtype=dtype)
    got = loss.distance(log_x, log_x)
    # Equal rows differ by nothing; |difference|^0.01 makes 0.7 of 1e-16.
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-30)
    for label in range(4):
        vertex = [Decimal(int(j == label)) for j in range(4)]
        wanted = torch.tensor([exact_distance(x, vertex, k, p) for x in rows], dtype=dtype)
        got = loss.to_label(log_x, torch.full((len(rows),), label))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-30)


def test_the_plain_formula_loses_what_the_distance_keeps() -> None:
    # Why the complement is carried: two rows of class 0, both certain beyond float32.
    logits = torch.tensor([[30.0, 0.0, 1.0], [27.0, 0.0, 1.0]])
    loss = MetricLoss.l2(0.9948485, 0.1)
    wanted = loss.distance(logits.double().log_softmax(1), logits.double().log_softmax(1))[0, 1]
    x = logits.log_softmax(1).exp()
    naive = plain(x, x, 0.9948485, 0.1)[0, 1]
    got = loss.distance(logits.log_softmax(1), logits.log_softmax(1))[0, 1]
    assert float(naive) < 0.7 * float(wanted)
    assert float(got) == pytest.approx(float(wanted), rel=1e-4)


def test_logits_of_ten_thousand_stay_finite_and_right() -> None:
    # L1 is the logit gap where the label is hopeless: -log q_y, and -log(1 - q_j) for the winner.
    logits = torch.tensor([[1e4, 0.0, 0.0]])
    for dtype in (torch.float64, torch.float32):
        log_x = logits.to(dtype).log_softmax(1)
        hopeless = MetricLoss.l1().to_label(log_x, torch.tensor([1]))
        assert float(hopeless) == pytest.approx(1e4 + 1e4 - math.log(2), rel=1e-6)
        assert float(MetricLoss.l1().to_label(log_x, torch.tensor([0]))) == 0
        assert MetricLoss.l2(0.99, 0.01).to_label(log_x, torch.tensor([0])).isfinite().all()


@examples
@given(triples())
def test_complements_are_the_sums_of_the_others(log_x: Tensor) -> None:
    x = log_x.exp()
    rows = range(x.shape[1])
    sums = torch.stack([x[:, [j for j in rows if j != i]].sum(1) for i in rows], dim=1)
    assume(bool((sums > 0).all()))
    torch.testing.assert_close(log_complements(log_x), sums.log(), rtol=1e-9, atol=1e-14)


def test_a_million_classes_start_at_the_loss_of_a_uniform_row() -> None:
    for p, expected in ((1.0, 14.8), (0.1, 2.9e6)):
        loss = MetricLoss.l2(1.0, p)
        log_x = torch.full((1, 1_000_000), -math.log(1e6), dtype=torch.float64)
        got = float(loss.to_label(log_x, torch.tensor([7])))
        assert got == pytest.approx(loss.parameters.loss_at_uniform(1_000_000), rel=1e-9)
        assert got == pytest.approx(expected, rel=0.02)


def test_a_single_class_is_certain() -> None:
    log_x = torch.zeros(2, 1)
    assert MetricLoss.l1().to_label(log_x, torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0]
    assert MetricLoss.l1().distance(log_x, log_x).abs().max() == 0


def test_wrong_parameters_are_refused_where_a_loss_is_made() -> None:
    with pytest.raises(UsageError, match="0 < p <= 1"):
        MetricLoss.l2(0.5, 1.5)
    with pytest.raises(UsageError, match="0 < k <= 1"):
        MetricLoss.l2(1.5, 0.5)
    with pytest.raises(UsageError, match="b <= a"):
        MetricLoss.of_offset(0.5, 1.0, 0.5, "main")
    both = [MetricLoss.of_offset(1 + 0.25, 0.5, 0.5, "main"), MetricLoss.of_offset(0.25, 0.5, 0.5)]
    assert both[0] == both[1] == MetricLoss.l2(0.4, 0.5)
