"""Paper A's L1 and L2 over classes against 60-digit arithmetic, and the power-sum form's error.

The 60-digit twin is the definition; its gradient is a difference quotient with a step of 1e-20,
which is exact to 40 digits and knows none of the formulas it checks.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from tiled_losses import in_tiles
from torch import Tensor

from dist_dml.losses.metric_softmax import MetricSoftmax, power_sums_suffice
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.losses.softmax import TileTarget
from dist_dml.metric_parameters import MetricParameters, largest_metric_k

TINY = 1 / (1 + 1e-6)
PARAMETERS = [(1.0, 1.0), (TINY, 1.0)]
PARAMETERS += [(k, p) for p in (0.99, 0.9, 0.5, 0.1) for k in (1.0, TINY, largest_metric_k(p))]
# All logits are float32 numbers, so that both dtypes share the twin.
BASE = (0.25, -0.625, 0.0, 1.125, 0.75, -1.375)
LABEL = 2


def with_entries(**entries: float) -> tuple[float, ...]:
    """`BASE` with logits replaced: `with_entries(at2=5.0)`."""
    row = list(BASE)
    for key, value in entries.items():
        row[int(key[2:])] = value
    return tuple(row)


# Rows of logits. 29 and 31 lie on both sides of the switch in `log_space`; of those that `cancel`,
# the gradient is a difference of equal numbers, 0 or nearly.
SIX_CLASSES: dict[str, tuple[float, ...]] = {
    **{f"right by {d:g}": with_entries(at2=1.125 + d) for d in (0, 5, 29, 31, 50, 700, 1e4)},
    **{f"wrong by {d:g}": with_entries(at4=1.125 + d) for d in (0, 5, 29, 31, 50, 700, 1e4)},
    "flat at 1e4": (1e4,) * 6,
    "tied with the top": with_entries(at1=50.0, at2=50.0),
    "rivals cancel, tied": with_entries(at1=50.0, at3=50.0),
    "rivals cancel, far": with_entries(at1=1e4, at3=1e4, at2=-1e4),
    "spread over 10000": tuple(1e4 * s for s in BASE),
}
TWO_CLASSES = {f"wrong of two, {s:g}": (0.0, float(s)) for s in (-1e4, -40, -3, 0, 3, 40, 1e4)}


def log_complement(k: Any, p: Any, own: Any, rest: Any) -> Any:
    """log(1 - k P^p) of P = own / (own + rest)."""
    if own < rest:
        return mpmath.log1p(-k * (own / (own + rest)) ** p)
    return mpmath.log(1 - k - k * mpmath.expm1(-p * mpmath.log1p(rest / own)))


def exact_value(logits: list[Any], label: int, k: Any, p: Any) -> Any:
    shares = [mpmath.exp(s - logits[0]) for s in logits]
    total = mpmath.mpf(0)
    for j, share in enumerate(shares):
        rest = mpmath.fsum(other for i, other in enumerate(shares) if i != j)
        own, rest = (rest, share) if j == label else (share, rest)
        total += log_complement(k, p, own, rest)
    return -total / p


def exact(row: tuple[float, ...], label: int, k: float, p: float) -> tuple[float, Tensor]:
    """Value and gradient."""
    with mpmath.workdps(60):
        step, numbers = mpmath.mpf(10) ** -20, (mpmath.mpf(k), mpmath.mpf(p))
        logits, gradient = [mpmath.mpf(s) for s in row], []
        for j in range(len(row)):
            sides = []
            for sign in (1, -1):
                moved = list(logits)
                moved[j] += sign * step
                sides.append(exact_value(moved, label, *numbers))
            gradient.append(float((sides[0] - sides[1]) / (2 * step)))
        value = float(exact_value(logits, label, *numbers))
    return value, torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("p", sorted({p for _, p in PARAMETERS}))
@pytest.mark.parametrize("rows", [SIX_CLASSES, TWO_CLASSES], ids=["six classes", "two classes"])
def test_hard_rows_equal_60_digits(rows: dict[str, tuple[float, ...]], p: float) -> None:
    label = LABEL if rows is SIX_CLASSES else 0
    for k in (k for k, own_p in PARAMETERS if own_p == p):
        twins = [exact(row, label, k, p) for row in rows.values()]
        value = torch.tensor([twin[0] for twin in twins], dtype=torch.float64)
        gradient = torch.stack([twin[1] for twin in twins])
        size = gradient.abs().amax(1)
        # With k < 1 the loss is bounded: lost rows have no gradient but what rounding leaves.
        lost = torch.tensor(["cancel" in n or (k < 1 and "wrong" in n) for n in rows])
        size = torch.where(lost, size.clamp_min(10 / p), size)
        far = torch.tensor(["10000" in name for name in rows])
        for dtype, tolerance in ((torch.float64, 3e-12), (torch.float32, 6e-6)):
            logits = torch.tensor(list(rows.values()), dtype=dtype)
            labels = torch.full((len(logits),), label)
            # Differences of 1e4 are themselves known to 5e-4 in float32.
            loose = torch.where(far, 100 if dtype == torch.float32 else 1, 1)
            # One tile, and single classes: a tile of nothing but the label.
            for bounds in ((), tuple(range(logits.shape[1] + 1))):
                for powers in (False, True) if power_sums_suffice(p) else (False,):
                    loss = MetricSoftmax(MetricParameters(k, p), powers)
                    got = in_tiles(loss, logits, labels, bounds)
                    bad = ~((got.values - value).abs() <= tolerance * value + 1e-45)
                    assert not bad.any(), f"{loss} {bounds}: {[*rows][int(bad.int().argmax())]}"
                    errors = (got.gradient - gradient).abs().amax(1)
                    bad = ~(errors <= loose * tolerance * size + 1e-45)
                    assert not bad.any(), f"{loss} {bounds}: {[*rows][int(bad.int().argmax())]}"


def test_it_is_the_metric_loss_to_the_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(9, 23, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 23, (9,), generator=generator)
    for k, p in PARAMETERS:
        parameters = MetricParameters(k, p)
        wanted = MetricLoss(parameters).to_label(logits.log_softmax(1), labels)
        got = in_tiles(MetricSoftmax(parameters), logits, labels, (0, 1, 12, 23)).values
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_the_gradient_scales_with_upstream_and_its_classes_sum_to_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(9, 60, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 60, (9,), generator=generator)
    upstream = torch.linspace(-1, 2, 9, dtype=torch.float64)
    for k, p in PARAMETERS:
        for powers in (False, True) if power_sums_suffice(p) else (False,):
            loss = MetricSoftmax(MetricParameters(k, p), powers)
            plain = in_tiles(loss, logits, labels, (0, 31, 60)).gradient
            scaled = in_tiles(loss, logits, labels, (0, 31, 60), upstream).gradient
            torch.testing.assert_close(scaled, plain * upstream[:, None], rtol=1e-12, atol=0)
            # Raising all logits alike changes no probability.
            assert (plain.sum(1).abs() / plain.abs().sum(1)).max() < (1e-6 if powers else 1e-13)


C = 20_000


def hard_rows() -> dict[str, Tensor]:
    """Class 0 is the label. `m equal`: the series' worst case is a little above the 32 kept."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(C, generator=generator, dtype=torch.float64)
    rows = {"flat": 0.05 * noise}
    for count in (1, 3, 10, 32, 33, 34, 40, 45, 64, 100, 1000):
        cosines = (0.1 * noise).clamp(-0.5, 0.5)
        cosines[5 : 5 + count] = 0.9
        rows[f"{count} hard at s = 64"] = 64 * cosines
        rows[f"{count} equal"] = torch.full_like(noise, -1e3).index_fill(
            0, torch.arange(5, 5 + count), 0.0
        )
    ids = torch.arange(1, C + 1, dtype=torch.float64)
    return rows | {"geometric": -0.01 * ids, "power law": -1.2 * ids.log()}


@pytest.mark.parametrize("p", [1.0, 0.99, 0.9, 0.85])
@pytest.mark.parametrize("label", ["lost", "even", "right"])
def test_power_sums_stay_within_the_first_omitted_term(p: float, label: str) -> None:
    parameters = MetricParameters(1.0, p)
    # The docstring's claim of the sum of logarithms; H's series leaves out N + 1 times as much, but
    # of the classes beyond the 32 kept only.
    claimed = 33 ** (-4 * p) / 5
    rows = torch.stack(list(hard_rows().values()))
    rivals = rows[:, 1:]
    rows[:, 0] = {
        "lost": torch.full_like(rows[:, 0], -2e3),
        "even": rivals.logsumexp(1),
        "right": rivals.amax(1) + 5,
    }[label]
    labels, bounds = torch.zeros(len(rows), dtype=torch.int64), (0, 7000, 14_000, C)
    wanted = in_tiles(MetricSoftmax(parameters), rows, labels)
    series = in_tiles(MetricSoftmax(parameters, powers=True), rows, labels, bounds)
    assert relative_errors(series.values, wanted.values).max() <= claimed
    errors = relative_errors(series.gradient, wanted.gradient)
    assert 1e-10 < errors.max() <= claimed  # The series is used, and is as near as claimed.
    # In float32 its error drowns in rounding.
    single = rows.float()
    wanted = in_tiles(MetricSoftmax(parameters), single.double(), labels)
    rounded = in_tiles(MetricSoftmax(parameters, powers=True), single, labels, bounds)
    assert relative_errors(rounded.values, wanted.values).max() <= 1.5e-6
    assert relative_errors(rounded.gradient, wanted.gradient).max() <= 1.5e-6


def relative_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Of each row's largest entry."""
    wanted, got = wanted.reshape(len(got), -1), got.reshape(len(got), -1).double()
    return (got - wanted).abs().amax(1) / wanted.abs().amax(1)


def test_power_sums_are_for_p_from_0_85() -> None:
    assert power_sums_suffice(0.85)
    assert not power_sums_suffice(0.84)
    # At p = 1/2 the series leaves out 1e-5 of the sum over 65 equal rivals.
    row = torch.full((1, 2000), -1e3, dtype=torch.float64)
    row[:, 5:70] = 0.0
    row[:, 0] = 4.0
    parameters, labels = MetricParameters(1.0, 0.5), torch.tensor([0])
    wanted = in_tiles(MetricSoftmax(parameters), row, labels).values
    series = in_tiles(MetricSoftmax(parameters, powers=True), row, labels).values
    assert relative_errors(series, wanted) > 1e-6


def test_rows_are_right_if_the_label_is_above_all_others() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    for bounds in ((0, 3), (0, 1, 3), (0, 2, 3)):
        loss = MetricSoftmax(MetricParameters(1.0, 1.0))
        got = in_tiles(loss, logits, torch.zeros(3, dtype=torch.int64), bounds)
        assert got.correct.tolist() == [False, True, False]


def test_class_ids_above_2_to_the_24_stay_exact() -> None:
    # A float32 holds no odd id beyond 16.8 million; the top rival's id travels in two parts.
    first = 2**25 + 1
    logits = torch.tensor([[0.0, 1.0, 9.0, 2.0]])
    loss = MetricSoftmax(MetricParameters(1.0, 1.0))
    target = TileTarget.of(torch.tensor([first]), first, first + 4, first)
    statistics = loss.tile_statistics(logits.clone(), target)
    refined = loss.tile_refinement(logits.clone(), target, statistics)
    terms = loss.gradient_terms(torch.cat((statistics, refined)))
    gradient = logits.clone()
    loss.gradient_(gradient, target, terms, torch.ones(1))
    _, wanted = exact((0.0, 1.0, 9.0, 2.0), 0, 1.0, 1.0)
    torch.testing.assert_close(gradient[0].double(), wanted, rtol=1e-5, atol=1e-6)
    assert math.isclose(gradient[0, 2].item(), gradient[0].max().item())
