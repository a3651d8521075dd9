"""The class-parallel loss against its dense twin: the same loss over all logits, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.class_config import ClassesConfig
from dist_dml.config import LossConfig, OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.losses.cross_entropy import CrossEntropy
from dist_dml.losses.softmax import TileTarget
from dist_dml.parallel.class_partition import ClassPartition, part_bounds
from dist_dml.parallel.classifier import ClassParallelClassifier

C, D, R = 37, 8, 22
CASES = {
    "linear": LossConfig(),
    "no bias": LossConfig(bias=False),
    "smoothed": LossConfig(label_smoothing=0.1),
    "cosine": LossConfig(similarity="cosine", scale=13.0, init_std=1.0),
    "smoothed cosine": LossConfig(similarity="cosine", label_smoothing=0.3, init_std=1.0),
}


def problem(logit_size: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, labels, class weights, bias in float64, with logits of about `logit_size`."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(R, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(C, D, generator=generator, dtype=torch.float64) / D**0.5 * logit_size
    bias = torch.randn(C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (R,), generator=generator)
    return embeddings, labels, weight, bias


def dense_twin(
    embeddings: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """Loss, accuracy and gradients from full rows of logits, by PyTorch's own functions."""
    leaves = [tensor.clone().requires_grad_() for tensor in (embeddings, weight, bias)]
    z, w, b = leaves
    if config.similarity == "cosine":
        logits = config.factor * F.normalize(z, dim=1) @ F.normalize(w, dim=1).T
    else:
        logits = z @ w.T + (b if config.bias else 0)
    smoothing = config.label_smoothing * C / (C - 1)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    loss.backward()
    return {
        "loss": loss.detach(),
        "num_correct": (logits.argmax(1) == labels).sum(),
        "embeddings": z.grad,
        "weight": w.grad,
        "bias": b.grad if b.grad is not None else torch.zeros_like(b),
    }


def row_counts_of(num_workers: int) -> tuple[int, ...]:
    """Uneven rows: worker 0 has few, the last the rest; with 4 workers one has a single row."""
    counts = {1: (R,), 2: (9, 13), 3: (2, 12, 8), 4: (5, 1, 10, 6)}
    return counts[num_workers]


def sharded(
    rank: int,
    num_workers: int,
    group: ProcessGroup | None,
    cases: list[tuple[LossConfig, float]],
    dtype: torch.dtype,
    micro_batches: int = 1,
) -> list[dict[str, Tensor]]:
    """This worker's rows and classes of every case, computed by the real classifier."""
    results = []
    for config, logit_size in cases:
        embeddings, labels, weight, bias = problem(logit_size)
        partition = ClassPartition.of_worker(rank, num_workers, C, group)
        classifier = ClassParallelClassifier(
            D, partition, config, OptimizerConfig(), seed=0, max_rows=R, dtype=dtype
        )
        # A budget of a few classes a tile: many tiles, and a last one that is smaller.
        demand = classifier.problem().demand(R, D)
        classifier.tile_bytes = int(demand.of_rows() + 17 * demand.of_class()) * dtype.itemsize
        own = slice(partition.start, partition.stop)
        with torch.no_grad():
            classifier.weight.copy_(weight[own])
            if classifier.bias is not None:
                classifier.bias.copy_(bias[own])
        results.append(one_batch(classifier, embeddings, labels, rank, num_workers, micro_batches))
    return results


def one_batch(
    classifier: ClassParallelClassifier,
    embeddings: Tensor,
    labels: Tensor,
    rank: int,
    num_workers: int,
    micro_batches: int,
) -> dict[str, Tensor]:
    loss, correct, gradients = torch.zeros(()), 0, []
    for micro in range(micro_batches):
        start, stop = part_bounds(micro, micro_batches, R)
        counts = row_counts_of(num_workers)
        if micro_batches > 1:
            counts = tuple(
                b - a
                for a, b in (part_bounds(w, num_workers, stop - start) for w in range(num_workers))
            )
        first = start + sum(counts[:rank])
        rows = embeddings[first : first + counts[rank]].clone().requires_grad_()
        output = classifier(rows, labels[first : first + counts[rank]], counts, R)
        output.loss.backward()
        assert rows.grad is not None
        loss, correct = loss + output.loss.detach(), correct + output.num_correct
        # DDP divides by the number of workers; so does the comparison.
        gradients.append(rows.grad / num_workers)
    assert classifier.weight.grad is not None
    bias = classifier.bias
    return {
        "loss": loss,
        "num_correct": torch.as_tensor(correct),
        "embeddings": torch.cat(gradients),
        "weight": classifier.weight.grad,
        "bias": torch.zeros(len(classifier.weight)) if bias is None else bias.grad,
    }


def joined(results: list[list[dict[str, Tensor]]], case: int, key: str) -> Tensor:
    return torch.cat([worker[case][key].double() for worker in results])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_values_and_gradients_equal_the_dense_float64_twin(
    num_workers: int, tmp_path: Path
) -> None:
    cases = [(config, size) for config in CASES.values() for size in (1.0, 1e4)]
    results = run_workers(sharded, num_workers, tmp_path, cases, torch.float64)
    for case, (config, logit_size) in enumerate(cases):
        twin = dense_twin(*problem(logit_size), config)
        for worker in results:
            torch.testing.assert_close(worker[case]["loss"], twin["loss"], rtol=1e-12, atol=1e-12)
            assert worker[case]["num_correct"] == twin["num_correct"]
        for key in ("embeddings", "weight", "bias"):
            torch.testing.assert_close(
                joined(results, case, key), twin[key].double(), rtol=1e-9, atol=1e-11 * logit_size
            )


def test_float32_is_as_close_to_the_float64_twin_as_pytorchs_own_float32(tmp_path: Path) -> None:
    cases = [(config, size) for config in CASES.values() for size in (1.0, 1e4)]
    results = run_workers(sharded, 2, tmp_path, cases, torch.float32)
    for case, (config, logit_size) in enumerate(cases):
        twin = dense_twin(*problem(logit_size), config)
        # One unit in the last place of a logit of 1e4 is 1e-3: the loss cannot be nearer than that.
        tolerance = max(2e-6, 1e-6 * logit_size)
        loss = results[0][case]["loss"].double()
        torch.testing.assert_close(loss, twin["loss"], rtol=2e-6, atol=tolerance)
        gradient = joined(results, case, "weight")
        torch.testing.assert_close(gradient, twin["weight"], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_micro_batches_add_up_to_the_whole_batch(num_workers: int, tmp_path: Path) -> None:
    cases = [(config, 1.0) for config in CASES.values()]
    results = run_workers(sharded, num_workers, tmp_path, cases, torch.float64, 3)
    for case, (config, _) in enumerate(cases):
        twin = dense_twin(*problem(1.0), config)
        torch.testing.assert_close(results[0][case]["loss"].double(), twin["loss"])
        for key in ("weight", "bias"):
            torch.testing.assert_close(joined(results, case, key), twin[key].double())


def test_merging_statistics_is_associative_and_equals_one_tile() -> None:
    loss = CrossEntropy(num_classes=C, label_smoothing=0.2)
    generator = torch.Generator().manual_seed(1)
    logits = 100 * torch.randn(R, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (R,), generator=generator)

    def statistics(start: int, stop: int) -> Tensor:
        target = TileTarget.of(labels, start, stop)
        return loss.tile_statistics(logits[:, start:stop].clone(), target)

    a, b, c = statistics(0, 5), statistics(5, 6), statistics(6, C)
    whole = statistics(0, C)

    def merged(*parts: Tensor) -> Tensor:
        return loss.merge(torch.stack(parts))

    torch.testing.assert_close(merged(merged(a, b), c), whole)
    torch.testing.assert_close(merged(a, merged(c, b)), whole)
    torch.testing.assert_close(merged(c, a, b), whole)


def test_zero_class_weights_score_no_correct_rows() -> None:
    partition = ClassPartition.of_worker(0, 1, C)
    config = LossConfig(init_std=0.0)
    classifier = ClassParallelClassifier(D, partition, config, OptimizerConfig(), 0, R)
    output = classifier(torch.randn(R, D), torch.zeros(R, dtype=torch.int64), (R,), R)
    assert output.num_correct == 0
    torch.testing.assert_close(output.loss, torch.tensor(float(C)).log())


@pytest.mark.parametrize("similarity", ["linear", "cosine"])
@pytest.mark.parametrize("num_classes", [20_000, 200_000])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_memory_beyond_weights_stays_within_the_tile_budget(
    backend: Any, similarity: Any, num_classes: int
) -> None:
    budget_mebibytes = 4.0
    config = LossConfig(similarity=similarity, tile_mebibytes=budget_mebibytes)
    partition = ClassPartition.of_worker(0, 1, num_classes)
    classes = ClassesConfig(backend=backend)
    classifier = ClassParallelClassifier(
        16, partition, config, OptimizerConfig(), 0, 64, classes=classes
    )
    labels = torch.arange(64)
    with LiveBytes() as counter:
        rows = torch.randn(64, 16, requires_grad=True)
        classifier(rows, labels, (64,), 64, factor=1.0).loss.backward()
    # The gradient of biases, one number a class, is not a tile's.
    biases = 0 if classifier.bias is None else 4 * num_classes
    assert 0 < counter.peak - biases <= budget_mebibytes * 2**20
    if classifier.backend is None:
        # The budget is used, too: the peak is not small because the count is blind.
        assert counter.peak >= 0.5 * budget_mebibytes * 2**20


def test_initial_weights_do_not_depend_on_the_number_of_workers() -> None:
    def weights(num_workers: int) -> Tensor:
        parts = []
        for rank in range(num_workers):
            partition = ClassPartition.of_worker(rank, num_workers, C)
            parts.append(
                ClassParallelClassifier(D, partition, LossConfig(), OptimizerConfig(), 7, R).weight
            )
        return torch.cat(parts)

    assert torch.equal(weights(1), weights(3))
    assert 0.008 < weights(1).std() < 0.012


def test_fewer_classes_than_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="3 classes for 4 workers"):
        ClassPartition.of_worker(0, 4, 3)


def test_a_budget_without_room_for_a_tile_is_refused_with_the_room_it_needs() -> None:
    partition = ClassPartition.of_worker(0, 1, 1000)
    config = LossConfig(tile_mebibytes=1.0)
    with pytest.raises(UsageError, match=r"loss\.tile_mebibytes=1 .* set it to \d+\.\d or more"):
        ClassParallelClassifier(512, partition, config, OptimizerConfig(), 0, max_rows=4096)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_fifty_class_updates_equal_the_plain_optimizer(name: Any) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.05, class_weight_decay=0.01)
    partition = ClassPartition.of_worker(0, 1, C)
    classifier = ClassParallelClassifier(
        D, partition, LossConfig(), config, 0, R, dtype=torch.float64
    )
    twin = torch.nn.Linear(D, C, dtype=torch.float64)
    twin.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})
    groups = [
        {"params": [twin.weight], "weight_decay": 0.01},
        {"params": [twin.bias], "weight_decay": 0.0},
    ]
    plain = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.05),
        "adam": lambda: torch.optim.Adam(groups, lr=0.05),
    }[name]()
    for step in range(50):
        embeddings, labels, _, _ = problem(1.0, seed=step)
        rows = embeddings.requires_grad_()
        classifier(rows, labels, (R,), R).loss.backward()
        classifier.step(1.0)
        plain.zero_grad()
        F.cross_entropy(twin(embeddings), labels).backward()
        plain.step()
    torch.testing.assert_close(classifier.weight, twin.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(classifier.bias, twin.bias, rtol=1e-9, atol=1e-12)
