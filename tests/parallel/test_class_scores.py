"""Probabilities and distances to labels from classes that are split over workers, against full rows
of logits in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.metric_parameters import MetricParameters
from dist_dml.parallel import class_scores
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

# The third of three workers owns 7 classes: fewer than the TOP that are asked for.
N, C, D, K, TOP = 37, 23, 6, 3, 9
CASES = {
    "linear": LossConfig(name="l2", p=0.5, init_std=1.0),
    "margin": LossConfig(name="arcface", scale=7.0, init_std=1.0),
    "sub-centres": LossConfig(name="sub_centre_arcface", scale=7.0, centres=K, init_std=1.0),
    "columns": LossConfig(name="proxy_anchor", scale=7.0, init_std=1.0),
}
METRICS = (MetricParameters(1.0, 1.0), MetricParameters(0.82, 0.5), MetricParameters(0.99, 0.1))


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    embeddings = 2 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(0, C, (N,), generator=generator)


def classifier_of(
    config: LossConfig, rank: int, num_workers: int, group: ProcessGroup | None
) -> ClassParallelClassifier:
    return ClassParallelClassifier(
        D,
        ClassPartition.of_worker(rank, num_workers, C, group),
        config,
        OptimizerConfig(),
        seed=5,
        max_rows=N,
        dtype=torch.float64,
    )


def answers(rank: int, num_workers: int, group: ProcessGroup | None) -> list[dict[str, Tensor]]:
    """What every worker is told, for all cases, from tiles of a few classes."""
    embeddings, labels = samples()
    found = []
    for config in CASES.values():
        classifier = classifier_of(config, rank, num_workers, group)
        classifier.tile_bytes = 1  # As few classes a tile as an evaluation takes.
        problem = classifier.problem()
        rows = classifier.rows_for_scores(embeddings)
        case = {"full": class_scores.log_probabilities(rows, problem)}
        case["top"], case["ids"] = class_scores.top_log_probabilities(rows, problem, TOP)
        for i, parameters in enumerate(METRICS):
            distances = class_scores.label_distances(rows, labels, problem, parameters)
            case[f"distance {i}"], case["correct"] = distances
        found.append(case)
    return found


def dense_log_probabilities(config: LossConfig) -> Tensor:
    embeddings, _ = samples()
    classifier = classifier_of(config, 0, 1, None)
    weight = classifier.weight.detach()
    if not config.uses_cosine:
        assert classifier.bias is not None
        return (embeddings @ weight.T + classifier.bias.detach()).log_softmax(1)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    cosines = torch.einsum("nd,ckd->nck", unit, weight.view(C, -1, D)) / weight.view(C, -1, D).norm(
        dim=2
    )
    return (config.factor * cosines.amax(2)).log_softmax(1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_all_workers_get_the_dense_probabilities_and_distances(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if num_workers == 1:
        monkeypatch.setattr(class_scores, "_ROWS", 16)  # Several blocks of rows, the last short.
        results = [answers(0, 1, None)]
    else:
        results = run_workers(answers, num_workers, tmp_path)
    _, labels = samples()
    for worker in results:
        for config, got in zip(CASES.values(), worker, strict=True):
            wanted = dense_log_probabilities(config)
            torch.testing.assert_close(got["full"], wanted, rtol=1e-11, atol=1e-11)
            values, ids = wanted.topk(TOP)
            torch.testing.assert_close(got["top"], values, rtol=1e-11, atol=1e-11)
            assert torch.equal(got["ids"], ids)
            assert torch.equal(got["correct"], wanted.argmax(1) == labels)
            for i, parameters in enumerate(METRICS):
                expected = MetricLoss(parameters).to_label(wanted, labels)
                torch.testing.assert_close(got[f"distance {i}"], expected, rtol=1e-10, atol=1e-12)


def test_all_classes_are_the_top_ones() -> None:
    embeddings, _ = samples()
    classifier = classifier_of(CASES["linear"], 0, 1, None)
    rows, problem = classifier.rows_for_scores(embeddings), classifier.problem()
    values, ids = class_scores.top_log_probabilities(rows, problem, C)
    full = class_scores.log_probabilities(rows, problem)
    torch.testing.assert_close(values, full.sort(1, descending=True).values)
    torch.testing.assert_close(full.gather(1, ids), values)


def test_no_rows_give_no_answers() -> None:
    classifier = classifier_of(CASES["linear"], 0, 1, None)
    problem, rows = classifier.problem(), torch.empty(0, D, dtype=torch.float64)
    assert class_scores.log_probabilities(rows, problem).shape == (0, C)
    values, ids = class_scores.top_log_probabilities(rows, problem, 4)
    assert values.shape == ids.shape == (0, 4)
    labels = torch.empty(0, dtype=torch.int64)
    distances, correct = class_scores.label_distances(rows, labels, problem, METRICS[1])
    assert len(distances) == len(correct) == 0


def test_a_certain_classs_probability_keeps_its_digits_in_float32() -> None:
    # Logits 40 apart: log q of the top class is -e^-40, which 1 - q in float32 takes for 0.
    weight = torch.eye(3) * 40
    classifier = ClassParallelClassifier(
        3, ClassPartition.of_worker(0, 1, 3), LossConfig(), OptimizerConfig(), 0, 4
    )
    with torch.no_grad():
        classifier.weight.copy_(weight)
    problem = classifier.problem()
    wanted = torch.eye(3).double().mul(40).log_softmax(1)
    wanted.fill_diagonal_(-2 * torch.tensor(-40.0).double().exp().item())
    full = class_scores.log_probabilities(torch.eye(3), problem)
    torch.testing.assert_close(full.double(), wanted, rtol=1e-6, atol=0)
    top, ids = class_scores.top_log_probabilities(torch.eye(3), problem, 2)
    torch.testing.assert_close(top[:, 0].double(), wanted.diagonal(), rtol=4e-6, atol=0)
    assert ids[:, 0].tolist() == [0, 1, 2]
