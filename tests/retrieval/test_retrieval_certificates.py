"""Certificates: hand-worked numbers, and the bounds on every pair of a real test set."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dist_dml.errors import RunError, UsageError
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.losses.outer import SATURATION, Outer
from dist_dml.metric_parameters import largest_metric_k
from dist_dml.retrieval.certificate_figure import certificate_figure
from dist_dml.retrieval.certificates import Certificate, certificate_text, certify

# M = -2 log(0.2) = 3.2189, F(2M) / 4 = 1.6094.
METRIC = MetricLoss.l2(0.8, 0.5)
M = -2 * math.log(0.2)


def certificate_of(epsilon: list[float], correct: list[bool], loss: MetricLoss) -> Certificate:
    return certify(np.array(epsilon, np.float32), np.array(correct), loss)


def test_a_certificate_by_hand() -> None:
    # The wrong sample of 0.25 is not certified, nor the correct ones of 2 and 4.
    got = certificate_of([0.5, 1, 2, 4, 8, 0.25, 1.5, 0.125], [True] * 4 + [False] * 2 + [True] * 2,
                         METRIC)  # fmt: skip
    assert (got.tier, got.num_samples, got.accuracy) == ("metric", 8, 0.75)
    assert got.epsilon == 4
    # Of 0.125, 0.5, 1, 1.5, 2, 4: the third, and the last for 90% and 99%.
    assert got.quantiles == {"q50": 1, "q90": 4, "q99": 4}
    assert got.vertex_distance == pytest.approx(M)
    assert got.label_separation == pytest.approx(2 * M)
    assert got.intra_bound == 8
    assert got.inter_bound == pytest.approx(2 * M - 8)
    assert got.certified_below == pytest.approx(M / 2)
    assert got.certified_share == 4 / 8
    assert not got.theorem_applies
    assert list(got.scores()) == [
        "epsilon",
        "epsilon_q50",
        "epsilon_q90",
        "epsilon_q99",
        "vertex_distance",
        "label_separation",
        "intra_bound",
        "inter_bound",
        "certified_share",
        "accuracy",
    ]
    assert got.scores()["epsilon_q90"] == 4


def test_a_quantile_is_the_smallest_value_that_the_share_does_not_exceed() -> None:
    epsilon = [float(i) for i in range(1, 101)]
    got = certificate_of(epsilon, [True] * 100, METRIC)
    assert got.quantiles == {"q50": 50, "q90": 90, "q99": 99}
    got = certificate_of(epsilon[:10], [True] * 10, METRIC)
    assert got.quantiles == {"q50": 5, "q90": 9, "q99": 10}


def test_the_theorem_applies_below_a_quarter_of_the_separation_of_labels() -> None:
    below = np.float32(M / 2 - 1e-6)
    assert certificate_of([float(below), 0.1], [True, True], METRIC).theorem_applies
    assert not certificate_of([M / 2 + 1e-6, 0.1], [True, True], METRIC).theorem_applies
    # Wrong samples have no say in epsilon, and count in the share.
    got = certificate_of([0.5, 9], [True, False], METRIC)
    assert got.theorem_applies
    assert got.certified_share == 0.5


def test_no_bound_between_classes_is_claimed_for_l1_and_infinity_is_not_logged() -> None:
    got = certificate_of([0.5, math.inf, 1], [True, True, False], MetricLoss.l1())
    assert (got.tier, got.epsilon, got.intra_bound) == ("weak", math.inf, math.inf)
    assert (got.inter_bound, got.certified_below, got.certified_share) == (None, None, None)
    assert not got.theorem_applies
    assert got.quantiles == {"q50": 0.5, "q90": math.inf, "q99": math.inf}
    assert got.scores() == {"epsilon_q50": 0.5, "accuracy": pytest.approx(2 / 3)}
    json.dumps(got.scores(), allow_nan=False)
    finite = certificate_of([0.5, 0.25], [True, True], MetricLoss.l1())
    assert finite.intra_bound == finite.scores()["intra_bound"] == 1
    assert "inter_bound" not in finite.scores()


def test_nothing_is_claimed_for_a_semi_metric() -> None:
    square = Outer("t^2", torch.square, is_concave=False)
    got = certificate_of([0.5], [True], MetricLoss.l2(0.8, 0.5, square))
    assert got.tier == "semi"
    assert (got.intra_bound, got.inter_bound, got.certified_share) == (None, None, None)
    assert got.label_separation == pytest.approx(4 * M**2)


def test_without_a_correct_sample_there_is_no_epsilon() -> None:
    got = certificate_of([0.5, 1.0], [False, False], METRIC)
    assert (got.epsilon, got.quantiles, got.intra_bound, got.inter_bound) == (None, {}, None, None)
    assert got.certified_share == 0
    assert not got.theorem_applies
    assert set(got.scores()) == {
        "vertex_distance",
        "label_separation",
        "certified_share",
        "accuracy",
    }
    assert "No sample is classified correctly" in words(
        {"none": (np.array([1], np.float32), np.array([False]), METRIC)}
    )


def test_no_samples_and_nan_are_refused() -> None:
    with pytest.raises(UsageError, match="certificate_split"):
        certify(np.zeros(0, np.float32), np.zeros(0, bool), METRIC)
    with pytest.raises(RunError, match="1 of 2 distances to labels are nan"):
        certificate_of([0.5, math.nan], [True, True], METRIC)
    with pytest.raises(UsageError, match=r"evaluation\.certificates"):
        certificate_figure({})


@dataclass(frozen=True)
class Digits:
    """Held-out log-probabilities (n, 10), float64, of a small network, and the labels (n,)."""

    log_probabilities: Tensor
    labels: Tensor

    @property
    def correct(self) -> np.ndarray:
        return (self.log_probabilities.argmax(1) == self.labels).numpy()


@cache
def trained_digits() -> Digits:
    """A two-layer network on two thirds of scikit-learn's digits, trained by L2 with p = 1."""
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels).float() / 16, torch.tensor(targets).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    loss = MetricLoss.of_offset(1e-6)  # k = 1 / (1 + 1e-6), p = 1: the paper's training loss.
    draw = torch.Generator().manual_seed(1)
    for _ in range(40):
        for rows in train[torch.randperm(1200, generator=draw)].split(100):
            optimizer.zero_grad()
            log_x = network(images[rows]).log_softmax(1)
            loss.to_label(log_x, labels[rows]).mean().backward()
            optimizer.step()
    with torch.no_grad():
        return Digits(network(images[test]).double().log_softmax(1), labels[test])


def epsilon_of(digits: Digits, loss: MetricLoss) -> Tensor:
    return loss.to_label(digits.log_probabilities, digits.labels)


def pairs(digits: Digits, loss: MetricLoss) -> tuple[Tensor, Tensor]:
    """All pairwise distances (n, n) in blocks, and which pairs are of one class."""
    rows = digits.log_probabilities
    distances = torch.cat([loss.distance(part, rows) for part in rows.split(100)])
    return distances, digits.labels[:, None] == digits.labels[None]


METRICS = {
    "p=0.1": MetricLoss.l2(largest_metric_k(0.1), 0.1),
    "p=0.5": MetricLoss.l2(largest_metric_k(0.5), 0.5),
    "p=0.9": MetricLoss.l2(largest_metric_k(0.9), 0.9),
    "L1, saturated": MetricLoss.l1(SATURATION),
}
# Most samples are certified at p = 0.5 and 0.9; at p = 0.1 tiny probabilities weigh too much.
LEAST_CERTIFIED = {"p=0.1": 0.0, "p=0.5": 0.5, "p=0.9": 0.5, "L1, saturated": 0.5}


@pytest.mark.parametrize("name", METRICS)
def test_the_bounds_hold_for_every_pair_of_held_out_digits(name: str) -> None:
    digits, loss = trained_digits(), METRICS[name]
    epsilon = epsilon_of(digits, loss)
    certificate = certify(epsilon.float().numpy(), digits.correct, loss)
    distances, same = pairs(digits, loss)
    assert certificate.intra_bound is not None
    assert certificate.inter_bound is not None
    # For each pair by its own two samples, whether they are classified correctly or not.
    sums = epsilon[:, None] + epsilon[None]
    assert (distances <= sums + 1e-9 * (1 + sums))[same].all()
    assert (distances >= loss.label_separation - sums - 1e-9 * (1 + sums))[~same].all()
    # For all correct ones by the largest epsilon, which is stored in float32.
    correct = torch.from_numpy(digits.correct)
    both = correct[:, None] & correct[None]
    assert distances[same & both].max() <= certificate.intra_bound * (1 + 1e-6)
    assert distances[~same & both].min() >= certificate.inter_bound - 1e-6 * sums.max()
    # The certified ones are separated by class: every distance within below all between.
    certified = correct & (epsilon < loss.certified_below)
    both = certified[:, None] & certified[None]
    assert certificate.certified_share == pytest.approx(certified.double().mean().item())
    if certified.any():
        half = loss.label_separation / 2
        assert distances[same & both].max() < half < distances[~same & both].min()
    assert certificate.certified_share is not None
    assert certificate.certified_share >= LEAST_CERTIFIED[name]
    print(f"\n{name}: accuracy {certificate.accuracy:.4f}, epsilon {certificate.epsilon:.4g}, "
          f"certified {certificate.certified_share:.1%}")  # fmt: skip


@pytest.mark.parametrize("loss", [MetricLoss.l1(), MetricLoss.of_offset(1e-6)])
def test_for_l1_the_bound_within_classes_holds_on_digits_and_no_other_is_claimed(
    loss: MetricLoss,
) -> None:
    digits = trained_digits()
    epsilon = epsilon_of(digits, loss)
    certificate = certify(epsilon.float().numpy(), digits.correct, loss)
    distances, same = pairs(digits, loss)
    sums = epsilon[:, None] + epsilon[None]
    assert (distances <= sums + 1e-9 * (1 + sums))[same].all()
    correct = torch.from_numpy(digits.correct)
    assert certificate.intra_bound is not None
    within = distances[same & correct[:, None] & correct[None]]
    assert within.max() <= certificate.intra_bound * (1 + 1e-6)
    assert (certificate.tier, certificate.inter_bound) == ("weak", None)


@pytest.mark.parametrize("loss", [MetricLoss.of_offset(1e-6), MetricLoss.l2(1 - 1e-6, 0.5)])
def test_the_bound_between_classes_would_be_false_above_the_largest_k(loss: MetricLoss) -> None:
    # Two samples of different classes, both right by a hair: nearly equal, though each is within
    # epsilon of its label, and the labels are far apart.
    log_x = torch.tensor([[0.501, 0.499], [0.499, 0.501]], dtype=torch.float64).log()
    epsilon = loss.to_label(log_x, torch.tensor([0, 1]))
    would_be = loss.label_separation - float(epsilon.sum())
    apart = float(loss.distance(log_x, log_x)[0, 1])
    assert would_be > 3 * apart > 0
    got = certify(epsilon.float().numpy(), np.array([True, True]), loss)
    assert got.inter_bound is None
    # At the largest k of a metric the same pair obeys it.
    metric = MetricLoss.l2(largest_metric_k(0.5), 0.5)
    epsilon = metric.to_label(log_x, torch.tensor([0, 1]))
    bound = metric.label_separation - float(epsilon.sum())
    assert bound <= float(metric.distance(log_x, log_x)[0, 1])


Sample = tuple[np.ndarray, np.ndarray, MetricLoss]


def words(samples: dict[str, Sample]) -> str:
    """Everything that a figure says, in one line."""
    figure = certificate_figure(samples)
    texts = [text.get_text() for text in figure.texts]
    texts += [text.get_text() for axes in figure.axes for text in axes.texts]
    return " ".join(" ".join(texts).split())


def test_the_table_says_what_is_and_what_is_not_claimed() -> None:
    weak = certificate_of([0.5, math.inf], [True, True], MetricLoss.l1())
    metric = certificate_of([0.5, 1.0, 9.0], [True, True, False], METRIC)
    text = certificate_text({"L1": weak, "metric_p0.5": metric})
    heading, _, first, second, *legend = text.splitlines()
    assert heading.split()[:3] == ["tier", "accuracy", "epsilon"]
    assert " ".join(first.split()) == "L1 weak 1.0000 inf 0.5 inf inf inf inf inf - -"
    cells = "metric_p0.5 metric 0.6667 1 0.5 1 1 3.219 6.438 2 4.438 66.7%"
    assert " ".join(second.split()) == cells
    assert all(len(line) <= 100 for line in legend)
    assert "Nothing is promised for other samples or for classes that were not trained" in " ".join(
        text.split()
    )


def test_the_figure_draws_shares_of_all_samples_and_says_what_is_guaranteed() -> None:
    epsilon = np.array([0.5, 1.0, 4.0, math.inf], np.float32)
    correct = np.array([True, True, True, False])
    samples = {"$ a": (epsilon, correct, METRIC), "L1": (epsilon, correct, MetricLoss.l1())}
    figure = certificate_figure(samples)
    axes = figure.axes[0]
    lines = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.lines]
    (right_x, right_y), (_, wrong_y) = lines[:2]
    # Up by a quarter at each correct sample, flat beyond the last; the wrong one is infinite.
    np.testing.assert_allclose(right_x[1:-1], [0.5, 1, 4])
    np.testing.assert_allclose(right_y, [0, 0.25, 0.5, 0.75, 0.75])
    np.testing.assert_allclose(wrong_y, [0, 0])
    verticals = {float(x[0]) for x, _ in lines[2:] if x.min() == x.max()}
    np.testing.assert_allclose(sorted(verticals), [M / 2, M])
    assert len(figure.axes[1].lines) == 2
    assert "50.0% certified" in {text.get_text() for text in axes.texts}
    said = words(samples)
    for part in (
        "50.0% of all samples are certified. Any two of them are nearer than 3.219 = F(2M)/2",
        "nothing about different classes, because epsilon",
        "A weak-metric guarantees nothing about different classes.",
        "Nothing is promised for classes that were not trained.",
    ):
        assert part in said


def test_the_figure_says_when_all_correct_samples_are_separated() -> None:
    epsilon, correct = np.array([0.5, 1.0, 9.0], np.float32), np.array([True, True, False])
    said = words({"a": (epsilon, correct, METRIC)})
    assert "no two of different classes nearer than 4.438" in said
    assert "Hence classes are separated for all of them" in said


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.inf, math.inf], [1e-30, 1.0]])
def test_extreme_samples_can_be_drawn(values: list[float]) -> None:
    epsilon = np.array(values, np.float32)
    for loss in (METRIC, MetricLoss.l1()):
        figure = certificate_figure({"a": (epsilon, np.array([True, True]), loss)})
        figure.savefig(io.BytesIO(), format="png")
        low, high = figure.axes[0].get_xlim()
        assert 0 < low < high < math.inf
