"""What is recorded about embeddings while they train: the same on every number of workers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.losses.diagnostics import diagnose
from dist_dml.losses.pair_objectives import build_pair_objective, parts_of_rows
from dist_dml.losses.pairwise_cross_entropy import SPCE
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.heads import Head
from dist_dml.parallel.pair_head import PairHead
from dist_dml.parallel.world import Ranks, World
from dist_dml.training_diagnosis import TrainingDiagnosis

R, C, D = 24, 6, 5
COUNTS = {1: (24,), 3: (9, 0, 15)}
PARTS: list[dict[str, Any]] = [
    {"name": "c2"},
    {"name": "c1"},
    {"name": "contrastive"},
    {"name": "multi_similarity"},
    {"name": "snca"},
    {"name": "spce"},
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(R) % C
    rows = torch.randn(R, D, generator=generator) + torch.randn(C, D, generator=generator)[labels]
    return rows, labels


def world_of(rank: int, size: int, group: ProcessGroup | None) -> World:
    return World(Ranks(rank, size, rank, size), torch.device("cpu"), group, None)


def heads(rank: int = 0, size: int = 1, group: ProcessGroup | None = None) -> dict[str, Head]:
    partition = ClassPartition.of_worker(rank, size, C, group)
    config = LossConfig(similarity="cosine", scale=8.0, init_std=0.5)
    optimizer = OptimizerConfig(name="sgd")
    return {
        "classes": ClassParallelClassifier(D, partition, config, optimizer, 0, R),
        "pairs": PairHead(LossConfig(name="snca"), D, partition, R),
    }


def of_workers(rank: int, size: int, group: ProcessGroup | None) -> dict[str, dict[str, float]]:
    rows, labels = batch()
    own = slice(sum(COUNTS[size][:rank]), sum(COUNTS[size][: rank + 1]))
    found = {}
    for name, head in heads(rank, size, group).items():
        diagnosis = TrainingDiagnosis(head, world_of(rank, size, group), -100, enabled=True)
        assert diagnosis.metrics() == {}
        diagnosis.note(rows[own], labels[own], COUNTS[size])
        found[name] = diagnosis.metrics()
    return found


def test_every_worker_tells_the_numbers_of_the_whole_batch(tmp_path: Path) -> None:
    alone = of_workers(0, 1, None)
    for worker in run_workers(of_workers, 3, tmp_path):
        for name, numbers in alone.items():
            assert worker[name] == pytest.approx(numbers, rel=1e-5)
    rows, labels = batch()
    wanted = diagnose(F.normalize(rows, dim=1), labels, -100)
    assert alone["pairs"]["diagnosis/covering_radius"] == pytest.approx(
        float(wanted.covering_radius)
    )
    assert alone["classes"]["diagnosis/information"] == pytest.approx(float(wanted.information))
    assert {"diagnosis/tightness", "diagnosis/contrastive"} <= alone["classes"].keys()


def test_the_parts_of_a_classifier_add_up_to_its_cross_entropy() -> None:
    rows, labels = batch()
    head = heads()["classes"]
    assert isinstance(head, ClassParallelClassifier)
    logits = 8 * F.normalize(rows, dim=1) @ F.normalize(head.weight.detach(), dim=1).T
    parts = head.parts(rows, labels)
    assert parts is not None
    torch.testing.assert_close(parts[0], -logits[torch.arange(R), labels].mean())
    torch.testing.assert_close(parts[1], logits.logsumexp(1).mean())


@pytest.mark.parametrize("settings", PARTS, ids=lambda settings: settings["name"])
def test_the_parts_of_a_loss_of_pairs_add_up_to_it(settings: dict[str, Any]) -> None:
    rows, labels = batch()
    head = PairHead(LossConfig(**settings), D, ClassPartition.of_worker(0, 1, C), R)
    value = head(rows, labels, (R,), R, factor=1.0, last=True).loss
    parts = head.parts(rows, labels)
    assert parts is not None
    torch.testing.assert_close(parts[0] + parts[1], value)
    assert all(math.isfinite(float(part)) for part in parts)


@pytest.mark.parametrize("name", ["triplet", "fastap", "center"])
def test_losses_without_parts_say_so(name: str) -> None:
    rows, labels = batch()
    objective = build_pair_objective(LossConfig.model_validate({"name": name}), C)
    assert parts_of_rows(objective, rows, labels, -100) is None


def test_spce_is_of_all_classes_of_the_data() -> None:
    objective = build_pair_objective(LossConfig(name="spce"), 77)
    assert objective.losses == (SPCE(77),)
    assert not objective.normalised


def test_embeddings_that_are_not_finite_leave_the_word_to_the_loss() -> None:
    rows, labels = batch()
    diagnosis = TrainingDiagnosis(heads()["classes"], world_of(0, 1, None), -100, enabled=True)
    diagnosis.note(rows.index_fill(0, torch.tensor([3]), math.nan), labels, (R,))
    assert diagnosis.metrics() == {}


def test_switched_off_it_keeps_nothing() -> None:
    rows, labels = batch()
    diagnosis = TrainingDiagnosis(heads()["pairs"], world_of(0, 1, None), -100, enabled=False)
    diagnosis.note(rows, labels, (R,))
    assert diagnosis.metrics() == {}
