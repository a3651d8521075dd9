"""Every objective on 1 to 4 workers against its dense float64 twin: value and all gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_losses import Batch, NormState, dense, random_batch
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition, part_bounds
from dist_dml.parallel.classifier import ClassParallelClassifier

# 149 classes in tiles of 17: nine tiles and a thin last one on one worker, three on each of four.
C, D, R, TILE = 149, 8, 22, 17
# Relative, of value and gradients (times 10). Power sums leave out a little, whatever the dtype; of
# the rows that lose most, tests/losses/test_losses_metric_softmax.py has the bound.
EXACT, SERIES = 1e-13, 1e-9


@dataclass(frozen=True)
class Case:
    """A loss and what its rows are.

    `batches`: AdaFace's margins follow the batches before. `ignored`: every fifth row.
    """

    config: LossConfig
    batches: int = 1
    ignored: bool = False
    weighted: bool = False

    @property
    def coupled(self) -> bool:
        return self.config.name in ("proxy_anchor", "adaface")

    @property
    def tolerance(self) -> float:
        return SERIES if self.config.sums == "powers" else EXACT


def case(name: Any, **keys: Any) -> Case:
    return Case(LossConfig(name=name, **keys))


CASES: dict[str, Case] = {
    "cross-entropy": case("cross_entropy"),
    "without bias": case("cross_entropy", bias=False),
    "of cosines": case("cross_entropy", similarity="cosine", scale=13.0),
    "smoothed over others": case("cross_entropy", label_smoothing=0.2),
    "smoothed over all": case("cross_entropy", label_smoothing=0.2, smoothing="all"),
    "normalised softmax": case("normalised_softmax", temperature=0.05),
    "normalised, smoothed": case("normalised_softmax", label_smoothing=0.1, scale=9.0),
    "balanced": case("balanced_softmax"),
    "balanced, of cosines": case("balanced_softmax", similarity="cosine"),
    "cosface": case("cosface"),
    "cosface, own margin": case("cosface", cosine_margin=0.2, scale=30.0),
    "arcface": case("arcface"),
    "arcface of temperature": case("arcface", temperature=0.1, angle_margin=1.5),
    "combined": case("combined_margin"),
    "combined, beyond pi": case("combined_margin", angle_multiplier=1.2, angle_margin=1.0),
    "sub-centres": case("sub_centre_arcface", centres=3),
    "one sub-centre": case("sub_centre_arcface", centres=1),
    "dynamic": case("dynamic_arcface"),
    "dynamic, wide": case("dynamic_arcface", dynamic_margin=(1.0, 0.3, 0.1), scale=20.0),
    "adaface": replace(case("adaface", norm_momentum=0.5), batches=2),
    "adaface, default": replace(case("adaface"), batches=2),
    "l1": case("l1"),
    "l1, of cosines": case("l1", similarity="cosine", scale=10.0),
    "l1, powers": case("l1", sums="powers"),
    **{f"l2, p={p}": case("l2", p=p, sums="sweep") for p in (1.0, 0.99, 0.9, 0.5, 0.1)},
    **{f"l2, p={p}, powers": case("l2", p=p, sums="powers") for p in (1.0, 0.99, 0.9)},
    "l2, k": case("l2", p=0.5, k=0.8),
    "l2, a": case("l2", p=0.99, a=0.5, similarity="cosine"),
    "binary": case("binary_cross_entropy"),
    "binary, of cosines": case("binary_cross_entropy", similarity="cosine"),
    "proxy-nca": case("proxy_nca"),
    "proxy-nca, scale": case("proxy_nca", scale=3.0),
    "proxy-anchor": case("proxy_anchor"),
    "proxy-anchor, margin": case("proxy_anchor", scale=8.0, cosine_margin=0.5),
    "soft-triple": case("soft_triple", centres=3),
    "soft-triple, no spread": case("soft_triple", centres=2, centre_spread=0.0),
    "soft-triple, hard": case("soft_triple", centre_temperature=0.02, cosine_margin=0.3),
    # What stands before or after a loss, on one loss of each kind.
    "inverse weights": case("cross_entropy", class_weights="inverse"),
    "effective weights": case("arcface", class_weights="effective"),
    "weighted l2": case("l2", p=0.9, sums="sweep", class_weights="inverse"),
    "weighted l1, powers": case("l1", sums="powers", class_weights="effective"),
    "weighted binary": case("binary_cross_entropy", class_weights="effective"),
    "weighted soft-triple": case("soft_triple", centres=2, class_weights="inverse"),
    "rows ignored": replace(case("cross_entropy"), ignored=True),
    "rows ignored, own index": replace(case("l1", ignore_index=3), ignored=True),
    "rows ignored, sub-centres": replace(case("sub_centre_arcface"), ignored=True),
    "rows weighted": replace(case("arcface", label_smoothing=0.0), weighted=True),
    "rows weighted and ignored": replace(
        case("l2", p=0.5, k=0.8, class_weights="inverse"), weighted=True, ignored=True
    ),
    "rows ignored, coupled": replace(case("proxy_anchor"), ignored=True),
    "rows ignored, binary": replace(case("binary_cross_entropy"), weighted=True, ignored=True),
}


def batch_of(case: Case, number: int) -> Batch:
    """Batch `number` of a case: later ones are the first's rows in another order, longer."""
    batch = random_batch(R, C, D, case.config.num_centres, logit_size=2.0)
    labels = batch.labels.roll(number)
    if case.ignored:
        labels = labels.where(torch.arange(R) % 5 != 1, case.config.ignore_index)
    weights = torch.linspace(0, 2, R, dtype=torch.float64) if case.weighted else None
    embeddings = batch.embeddings.roll(number, 0) * (1 + number)
    return replace(batch, embeddings=embeddings, labels=labels, row_weights=weights)


def row_counts_of(num_workers: int, num_rows: int) -> tuple[int, ...]:
    """Uneven rows: with 4 workers one has a single row."""
    if num_rows == R:
        return {1: (22,), 2: (9, 13), 3: (2, 12, 8), 4: (5, 1, 10, 6)}[num_workers]
    bounds = [part_bounds(worker, num_workers, num_rows) for worker in range(num_workers)]
    return tuple(stop - start for start, stop in bounds)


def worker_results(
    rank: int, num_workers: int, group: ProcessGroup | None, cases: list[Case]
) -> list[list[dict[str, Tensor]]]:
    """For each case, of a whole batch and, where the loss allows, of two micro-batches."""
    results = []
    for case in cases:
        partition = ClassPartition.of_worker(rank, num_workers, C, group)
        classifier = ClassParallelClassifier(
            D,
            partition,
            case.config,
            OptimizerConfig(),
            seed=0,
            max_rows=R,
            dtype=torch.float64,
            class_counts=batch_of(case, 0).counts,
        )
        demand = classifier.problem().demand(R, D)
        classifier.tile_bytes = int(8 * (demand.of_rows() + TILE * demand.of_class())) + 8
        own = slice(partition.start, partition.stop)
        batch = batch_of(case, 0)
        with torch.no_grad():
            classifier.weight.copy_(batch.weight[own])
            if classifier.bias is not None:
                classifier.bias.copy_(batch.bias[own])
        batches = [batch_of(case, number) for number in range(case.batches)]
        wholes = [one_batch(classifier, each, rank, num_workers, 1) for each in batches]
        results.append([wholes[-1]])
        if not case.coupled:
            results[-1].append(one_batch(classifier, batch, rank, num_workers, 2))
    return results


def one_batch(
    classifier: ClassParallelClassifier,
    batch: Batch,
    rank: int,
    num_workers: int,
    micro_batches: int,
) -> dict[str, Tensor]:
    """This worker's part: the loss, its rows' and its classes' gradients."""
    loss, correct, gradients = torch.zeros(()), torch.tensor(0), []
    for micro in range(micro_batches):
        start, stop = part_bounds(micro, micro_batches, R)
        counts = row_counts_of(num_workers, stop - start)
        first = start + sum(counts[:rank])
        own = slice(first, first + counts[rank])
        rows = batch.embeddings[own].clone().requires_grad_()
        weights = None if batch.row_weights is None else batch.row_weights[own]
        output = classifier(rows, batch.labels[own], counts, R, weights)
        output.loss.backward()
        assert rows.grad is not None
        loss, correct = loss + output.loss.detach(), correct + output.num_correct
        # DDP divides by the number of workers; so does the comparison.
        gradients.append(rows.grad / num_workers)
    assert classifier.weight.grad is not None
    classifier._gradient_is_stale = True  # As after a step, which would change the weights.
    bias = torch.zeros(len(classifier.weight))
    if classifier.bias is not None and classifier.bias.grad is not None:
        bias = classifier.bias.grad.clone()
    return {
        "loss": loss,
        "num_correct": correct,
        "embeddings": torch.cat(gradients),
        "weight": classifier.weight.grad.clone(),
        "bias": bias,
    }


def assert_equal_to_twins(results: list[list[list[dict[str, Tensor]]]]) -> None:
    num_workers = len(results)
    for number, (name, case) in enumerate(CASES.items()):
        norms = NormState()
        twins = [dense(case.config, batch_of(case, each), norms) for each in range(case.batches)]
        twin = twins[-1]
        for way in range(1 if case.coupled else 2):
            parts = [worker[number][way] for worker in results]
            where = f"{name}, {num_workers} workers, {way + 1} micro-batches"
            for part in parts:
                assert part["num_correct"] == twin.num_correct, where
                error = abs(part["loss"] / twin.loss - 1).item()
                assert error < case.tolerance, f"{where}: the loss is off by {error:.1e}"
            for key, wanted in twin.gradients.items():
                if key == "embeddings" and way == 1:
                    got = rows_of_micro_batches(parts)
                else:
                    got = torch.cat([part[key].double() for part in parts])
                size = wanted.abs().max()
                error = ((got - wanted).abs().max() / size.clamp_min(1e-300)).item()
                assert error < 10 * case.tolerance, f"{where}: {key}'s gradient, {error:.1e}"


def rows_of_micro_batches(parts: list[dict[str, Tensor]]) -> Tensor:
    """Workers hold their rows of the first micro-batch, then of the second."""
    counts = row_counts_of(len(parts), R // 2)
    halves = [
        part["embeddings"].split([n, len(part["embeddings"]) - n])
        for part, n in zip(parts, counts, strict=True)
    ]
    return torch.cat([half[micro] for micro in range(2) for half in halves])


def test_every_objective_in_one_process_equals_its_dense_twin() -> None:
    assert_equal_to_twins([worker_results(0, 1, None, list(CASES.values()))])


@pytest.mark.parametrize(
    "num_workers",
    [pytest.param(n, marks=() if n == 3 else pytest.mark.slow) for n in (1, 2, 3, 4)],
)
def test_every_objective_over_workers_equals_its_dense_twin(
    num_workers: int, tmp_path: Path
) -> None:
    assert_equal_to_twins(run_workers(worker_results, num_workers, tmp_path, list(CASES.values())))
