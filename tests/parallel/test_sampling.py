"""Sampled classes: who is drawn, what the correction estimates, and neighbours over all workers."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.class_config import ClassesConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.loss_tables import READS
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.sampling import (
    ActiveClasses,
    check_sampling,
    columns_of,
    neighbour_classes,
    random_classes,
)
from dist_dml.retrieval.class_index import ExactClassIndex

NO_LABELS = torch.empty(0, dtype=torch.int64)


def whole(num_classes: int) -> ClassPartition:
    return ClassPartition(0, num_classes, num_classes)


def drawn(num_classes: int, rate: float, seed: int, step: int) -> Tensor:
    """(C,) bool: who is drawn without any label."""
    active = random_classes(NO_LABELS, whole(num_classes), rate, "none", seed, step, "cpu")
    return torch.zeros(num_classes, dtype=torch.bool).index_fill_(0, active.ids, True)


def dense(active: ActiveClasses, logits: Tensor) -> Tensor:
    """Corrected logits of all classes, -inf for those that do not take part."""
    every = torch.full_like(logits, -math.inf)
    added = 0.0 if active.correction is None else active.correction
    every[:, active.ids] = logits[:, active.ids] + added
    return every


def test_the_corrected_mass_is_right_in_the_mean_and_the_naive_correction_of_all_is_not() -> None:
    rows, num_classes, rate, steps = 6, 400, 0.1, 1500
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(rows, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, 3, 77, 200, 0, 399])
    logits[torch.arange(rows), labels] += 4.0  # As after some training.
    estimates, naive = torch.zeros(2, rows, dtype=torch.float64)
    for step in range(steps):
        active = random_classes(labels, whole(num_classes), rate, "importance", 5, step, "cpu")
        estimates += dense(active, logits).logsumexp(1).exp() / steps
        naive += logits[:, active.ids].exp().sum(1) / rate / steps
    exact = logits.exp().sum(1)
    others = torch.ones(num_classes, dtype=torch.bool)
    others[labels] = False
    variance = (1 / rate - 1) * (2 * logits[:, others]).exp().sum(1)
    error_of_mean = (variance / steps).sqrt()
    assert ((estimates - exact).abs() < 4 * error_of_mean).all()
    # What the naive one adds: the labels' exponentials, 1 / rate - 1 times too often.
    excess = (1 / rate - 1) * logits[:, ~others].exp().sum(1)
    assert ((naive - exact - excess).abs() < 4 * error_of_mean).all()
    assert (excess > 6 * error_of_mean).all()


def test_the_correction_is_zero_for_the_batch_and_log_of_one_over_the_rate_for_others() -> None:
    labels = torch.tensor([50_000, 7, 7, 99_999, 65_536])
    part = ClassPartition(40_000, 90_000, 100_000)
    active = random_classes(labels, part, 0.05, "importance", 1, 2, "cpu")
    assert active.correction is not None
    always = torch.isin(active.ids + part.start, labels)
    assert active.ids[always].tolist() == [10_000, 25_536]
    assert (active.correction[always] == 0).all()
    torch.testing.assert_close(
        active.correction[~always], torch.full((int((~always).sum()),), math.log(20.0))
    )
    plain = random_classes(labels, part, 0.05, "none", 1, 2, "cpu")
    assert plain.correction is None
    assert torch.equal(plain.ids, active.ids)
    assert (active.ids.diff() > 0).all()


def test_rate_one_takes_every_class_and_corrects_nothing() -> None:
    labels = torch.tensor([1, 69_999])
    active = random_classes(labels, whole(70_000), 1.0, "importance", 3, 4, "cpu")
    assert active.correction is not None
    assert torch.equal(active.ids, torch.arange(70_000))
    assert not active.correction.any()


@pytest.mark.parametrize("num_workers", [2, 3, 7])
@pytest.mark.parametrize("first", [0, 2**33 - 100_000])
def test_the_set_is_the_same_for_any_number_of_workers(num_workers: int, first: int) -> None:
    num_classes = 200_000
    labels = first + torch.tensor([0, 199_999, 100_000, 100_000])
    one = ClassPartition(first, first + num_classes, first + num_classes)
    alone = random_classes(labels, one, 0.1, "importance", 8, 9, "cpu")
    ids, corrections = [], []
    for rank in range(num_workers):
        part = ClassPartition.of_worker(rank, num_workers, num_classes)
        part = ClassPartition(first + part.start, first + part.stop, one.num_classes)
        active = random_classes(labels, part, 0.1, "importance", 8, 9, "cpu")
        ids.append(active.ids + part.start - first)
        assert active.correction is not None
        corrections.append(active.correction)
    assert alone.correction is not None
    assert torch.equal(torch.cat(ids), alone.ids)
    assert torch.equal(torch.cat(corrections), alone.correction)


def test_draws_are_even_and_independent_over_classes_and_steps() -> None:
    rate, steps, num_classes = 0.25, 800, 70_000
    seen = torch.stack([drawn(num_classes, rate, 11, step) for step in range(steps)])
    seen = torch.cat((seen[:, :2048], seen[:, 65_536 : 65_536 + 2048]), dim=1).double() - rate
    variance = rate * (1 - rate)
    of_class = seen.sum(0) / math.sqrt(steps * variance)
    of_step = seen.sum(1) / math.sqrt(seen.shape[1] * variance)
    for z in (of_class, of_step):  # Standard normal if draws are even and independent.
        assert z.abs().max() < 5
        assert abs(float(z.var()) - 1) < 6 * math.sqrt(2 / len(z))
    for distance in (1, 2, 3, 64, 1024, 2048):  # The last one: the same place in another block.
        product = (seen[:, distance:] * seen[:, :-distance]).sum() / variance
        assert abs(float(product)) < 5 * math.sqrt(steps * (seen.shape[1] - distance))
    for lag in (1, 2, 8):
        product = (seen[lag:] * seen[:-lag]).sum() / variance
        assert abs(float(product)) < 5 * math.sqrt((steps - lag) * seen.shape[1])


def test_pairs_of_classes_are_drawn_together_as_often_as_chance_has_it() -> None:
    rate, steps = 0.25, 1500
    seen = torch.stack([drawn(300, rate, 2, step) for step in range(steps)]).double() - rate
    correlation = (seen.T @ seen) / (rate * (1 - rate) * math.sqrt(steps))
    pairs = correlation[torch.triu(torch.ones(300, 300), 1).bool()]
    assert pairs.abs().max() < 5.5  # Of 44,850 standard normal ones.
    assert abs(float(pairs.var()) - 1) < 0.05


def test_seed_and_step_change_who_is_drawn() -> None:
    first = drawn(70_000, 0.1, 1, 1)
    assert torch.equal(first, drawn(70_000, 0.1, 1, 1))
    for seed, step in ((1, 2), (2, 1)):
        assert int((first & drawn(70_000, 0.1, seed, step)).sum()) < 1000  # 700 by chance.


def test_a_worker_may_have_no_active_class() -> None:
    part = ClassPartition(5, 9, 20)
    labels = torch.tensor([-100, 3, 15])  # Ignored, and other workers'.
    active = random_classes(labels, part, 1e-9, "importance", 0, 0, "cpu")
    assert len(active.ids) == 0
    assert columns_of(labels, active, part).tolist() == [-1, -1, -1]


def test_columns_are_the_labels_places_among_the_active_classes() -> None:
    part = ClassPartition(100, 200, 1000)
    labels = torch.tensor([100, 199, 150, 99, 200, 150, 0, 151])
    active = random_classes(labels[:-1], part, 0.3, "none", 4, 4, "cpu")
    places = {int(local): place for place, local in enumerate(active.ids)}
    expected = [places.get(int(label) - part.start, -1) for label in labels]
    assert columns_of(labels, active, part).tolist() == expected
    assert expected.count(-1) >= 3


# ---- neighbours ----

C, D, K = 61, 7, 4


def weights() -> Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(6))


LABELS = torch.tensor([0, 60, 17, 17, 30, 31, 5, 59])


def neighbours(
    rank: int, num_workers: int, group: ProcessGroup | None, labels: Tensor, cosine: bool
) -> Tensor:
    """This worker's active classes by their global ids."""
    part = ClassPartition.of_worker(rank, num_workers, C, group)
    weight = weights()[part.start : part.stop].contiguous()
    index = ExactClassIndex(weight, cosine)
    return neighbour_classes(labels, weight, index.search, part, K).ids + part.start


def all_neighbours(
    rank: int, num_workers: int, group: ProcessGroup | None, cases: list[Tensor]
) -> list[Tensor]:
    find = partial(neighbours, rank, num_workers, group)
    return [find(labels, cosine) for labels in cases for cosine in (True, False)]


def dense_neighbours(labels: Tensor, cosine: bool) -> list[int]:
    weight = weights().double()
    weight = F.normalize(weight, dim=1) if cosine else weight
    best = (weight[labels] @ weight.T).topk(K, dim=1).indices
    return sorted(set(best.flatten().tolist()) | set(labels.tolist()))


@pytest.mark.parametrize("cosine", [True, False])
def test_neighbours_are_the_nearest_class_weights_and_the_labels(cosine: bool) -> None:
    found = neighbours(0, 1, None, LABELS, cosine)
    assert found.tolist() == dense_neighbours(LABELS, cosine)
    assert len(found) < C // 2


def test_rows_without_a_class_have_no_neighbours() -> None:
    ignored = torch.tensor([-100, 17, -100])
    assert neighbours(0, 1, None, ignored, True).tolist() == dense_neighbours(ignored[1:2], True)
    assert len(neighbours(0, 1, None, ignored[:1], True)) == 0


def test_more_neighbours_than_classes_are_all_classes() -> None:
    weight = weights()[:3].contiguous()
    search = ExactClassIndex(weight, True).search
    active = neighbour_classes(torch.tensor([1]), weight, search, whole(3), 10)
    assert active.ids.tolist() == [0, 1, 2]
    assert active.correction is None


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_find_the_neighbours_that_one_process_finds(
    num_workers: int, tmp_path: Path
) -> None:
    # The second batch's labels all belong to the last worker, the third has none at all.
    cases = [LABELS, torch.tensor([58, 60]), torch.tensor([-100])]
    parts = run_workers(all_neighbours, num_workers, tmp_path, cases)
    together = [torch.cat(found) for found in zip(*parts, strict=True)]
    alone = all_neighbours(0, 1, None, cases)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert [len(found) > 0 for found in alone] == [True] * 4 + [False] * 2


# ---- refusals ----

ACCEPTED = (
    "cross_entropy", "normalised_softmax", "balanced_softmax", "cosface", "arcface",
    "combined_margin", "dynamic_arcface", "adaface", "proxy_nca",
)  # fmt: skip
REFUSED = {
    "smoothed target gives every class a share": {"name": "cross_entropy", "label_smoothing": 0.1},
    "a class has 3 rows of weights": {"name": "sub_centre_arcface"},
    "term on centres sums over all classes": {"name": "soft_triple"},
    "a decision of its own": {"name": "binary_cross_entropy"},
    "averages over all classes": {"name": "proxy_anchor"},
}


@pytest.mark.parametrize("sample", ["random", "neighbours"])
def test_losses_of_softmax_form_may_be_sampled_and_all_others_may_not(sample: str) -> None:
    classes = ClassesConfig.model_validate({"sample": sample})
    for name in READS:
        loss = LossConfig.model_validate({"name": name})
        check_sampling(ClassesConfig(), loss)
        if name in ACCEPTED:
            check_sampling(classes, loss)
        else:
            with pytest.raises(UsageError, match=f"classes.sample={sample} .*loss.name={name}"):
                check_sampling(classes, loss)


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_says_why_and_what_to_do(reason: str) -> None:
    classes, loss = ClassesConfig(sample="random"), LossConfig.model_validate(REFUSED[reason])
    with pytest.raises(UsageError, match=rf"{reason}.*; set .*classes\.sample=all") as refusal:
        check_sampling(classes, loss)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_metric_losses_need_whole_probability_vectors(name: str) -> None:
    loss = LossConfig.model_validate({"name": name})
    with pytest.raises(UsageError, match="whole probability vectors"):
        check_sampling(ClassesConfig(sample="neighbours"), loss)


def test_one_sub_centre_may_be_sampled() -> None:
    check_sampling(ClassesConfig(sample="random"), LossConfig(name="sub_centre_arcface", centres=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    labels = torch.tensor([5, 19_999_999, 7_000_000])
    part = ClassPartition(1_000_001, 19_000_000, 20_000_000)
    on_cpu = random_classes(labels, part, 0.1, "importance", 1, 2, "cpu")
    on_gpu = random_classes(labels.cuda(), part, 0.1, "importance", 1, 2, "cuda")
    assert on_cpu.correction is not None
    assert on_gpu.correction is not None
    assert torch.equal(on_cpu.ids, on_gpu.ids.cpu())
    assert torch.equal(on_cpu.correction, on_gpu.correction.cpu())
