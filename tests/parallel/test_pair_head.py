"""The head of losses of pairs: what each `loss.name` is, on any number of workers, with memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.checkpoint import Contents, load_head, save_checkpoint
from dist_dml.checkpoint_manifest import Progress, verify_checkpoint
from dist_dml.config_loading import config_hash, resolve, to_yaml
from dist_dml.engine import build_engine
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.loss_tables import PAIR_LOSSES
from dist_dml.losses.pair_objectives import LabelSets
from dist_dml.losses.pairs import PairLoss
from dist_dml.losses.pairwise_cross_entropy import SPCE
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.heads import Head
from dist_dml.parallel.pair_head import PairHead
from dist_dml.parallel.pair_parallel import pair_parallel_loss
from dist_dml.parallel.world import Ranks, World

B, C, D, STEPS = 16, 5, 6, 4
ROW_COUNTS = {1: (16,), 2: (7, 9), 4: (5, 1, 0, 10)}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in PAIR_LOSSES},
    "contrastive, non-zero": {"name": "contrastive", "reduction": "nonzero", "power": 1},
    "contrastive, cosines": {
        "name": "contrastive",
        "comparison": "cosine",
        "positive_margin": 0.9,
        "negative_margin": 0.2,
    },
    "triplet, semi-hard, anchors": {
        "name": "triplet",
        "mining": "semihard",
        "reduction": "anchors",
        "triplet_margin": 0.3,
    },
    "multi-similarity, mined": {"name": "multi_similarity", "mining_epsilon": 0.1},
    "spce, relative labels": {"name": "spce", "label_sets": "two"},
    "c2, relative labels": {"name": "c2", "label_sets": "two"},
    "snca, inner products": {"name": "snca", "comparison": "inner", "temperature": 0.7},
}

# Of the 5 classes: two sets and a class in none; three sets.
TWO_LABELLINGS = LabelSets(torch.tensor([[0, 0, 1, 1, -100], [2, 0, 1, 0, 1]]), (2, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(B, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (B,), generator=generator)
    labels[3] = -100  # Ignored.
    return rows, labels


def head_of(
    settings: dict[str, Any], rank: int = 0, size: int = 1, group: ProcessGroup | None = None
) -> PairHead:
    partition = ClassPartition.of_worker(rank, size, C, group)
    config = LossConfig.model_validate({"block_mebibytes": 0.01, **settings})
    sets = TWO_LABELLINGS if config.label_sets else None
    return PairHead(config, D, partition, B, dtype=torch.float64, label_sets=sets)


def steps_of(
    head: PairHead, rank: int, counts: tuple[int, ...], steps: range
) -> list[tuple[Tensor, Tensor]]:
    """Values and this worker's gradients of some steps."""
    own, found = slice(sum(counts[:rank]), sum(counts[: rank + 1])), []
    for step in steps:
        rows, labels = batch(step)
        leaf = rows[own].clone().requires_grad_()
        output = head(leaf, labels[own], counts, B, factor=1.0, last=True)
        assert output.num_correct is None
        output.loss.backward()
        head.step_done()
        assert leaf.grad is not None
        found.append((output.loss.detach(), leaf.grad))
    return found


def with_memory(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"memory_size": 24, "memory_warmup_steps": 1}


def all_cases(rank: int, size: int, group: ProcessGroup) -> dict[Any, list[tuple[Tensor, Tensor]]]:
    results = {}
    for name, settings in CASES.items():
        for kept in (False, True):
            head = head_of(with_memory(settings) if kept else settings, rank, size, group)
            results[name, kept] = steps_of(head, rank, ROW_COUNTS[size], range(STEPS))
    return results


@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_train_as_one_process_with_the_whole_batch(
    num_workers: int, tmp_path: Path
) -> None:
    found = run_workers(all_cases, num_workers, tmp_path)
    for name, settings in CASES.items():
        for kept in (False, True):
            alone = head_of(with_memory(settings) if kept else settings)
            wanted = steps_of(alone, 0, ROW_COUNTS[1], range(STEPS))
            for step, (value, gradient) in enumerate(wanted):
                parts = [worker[name, kept][step] for worker in found]
                assert all(torch.equal(part[0], parts[0][0]) for part in parts), name
                torch.testing.assert_close(parts[0][0], value, rtol=1e-11, atol=1e-12)
                whole = torch.cat([part[1] for part in parts]) / num_workers
                torch.testing.assert_close(whole, gradient, rtol=1e-9, atol=1e-11)


def by_peer(loss: Any, miner: Any = None) -> Callable[[Tensor, Tensor], Tensor]:
    """pytorch-metric-learning's value, which leaves the ignored row out."""

    def value(rows: Tensor, labels: Tensor) -> Tensor:
        known = labels >= 0
        rows, labels = F.normalize(rows[known], dim=1), labels[known]
        return loss(rows, labels, miner(rows, labels) if miner else None)

    return value


CONTRASTIVE: Any = losses.ContrastiveLoss  # Its stub wants whole numbers for margins.
PEERS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "c2": ({"name": "c2"}, by_peer(CONTRASTIVE(0.0, 0.5))),
    "contrastive, non-zero": (
        CASES["contrastive, non-zero"] | {"negative_margin": 0.5},
        by_peer(CONTRASTIVE(0.0, 0.5)),
    ),
    "triplet": (
        {"name": "triplet", "triplet_margin": 0.2},
        by_peer(losses.TripletMarginLoss(0.2, distance=LpDistance())),
    ),
    "multi-similarity": ({"name": "multi_similarity"}, by_peer(losses.MultiSimilarityLoss(2, 40))),
    "multi-similarity, mined": (
        CASES["multi-similarity, mined"],
        by_peer(losses.MultiSimilarityLoss(2, 40), miners.MultiSimilarityMiner(0.1)),
    ),
    "fastap": ({"name": "fastap"}, by_peer(losses.FastAPLoss(10))),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_configured_loss_is_that_of_pytorch_metric_learning(name: str) -> None:
    settings, peer = PEERS[name]
    for step in range(3):
        rows, labels = batch(step)
        leaf, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        value = head_of(settings)(leaf, labels, (B,), B, factor=1.0, last=True).loss
        wanted = peer(other, labels)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
        value.backward()
        wanted.backward()
        assert wanted > 0
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_paper_b_contrastive_squares_its_terms() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    config = LossConfig(name="contrastive")
    head = PairHead(config, 2, ClassPartition.of_worker(0, 1, 2), 3, dtype=torch.float64)
    # D^2 = 2 for the positive pair; negatives at D^2 = 2 - 2 * 0.8 and 2 - 2 * 0.6, margin 1.
    negatives = (1 - 0.4**0.5) ** 2 + (1 - 0.8**0.5) ** 2
    value = head(rows, labels, (3,), 3, factor=1.0, last=True).loss
    torch.testing.assert_close(float(value), (2 * 2 + 2 * negatives) / 3)


SETTINGS = [
    "data.image.size=8",
    "data.image.channels=1",
    "data.image.mean=[0.5]",
    "data.image.std=[0.25]",
    "model.embedding_dim=6",
    "loss.name=c1",
    "loss.memory_size=24",
]


def save_some(rank: int, size: int, group: ProcessGroup | None, folder: Path) -> None:
    config = resolve(None, SETTINGS).config
    world = World(Ranks(rank, size, rank, size), torch.device("cpu"), group, None)
    engine = build_engine(config, build_embedder(config.model, config.data.image, 0, group), world)
    head = head_of(with_memory({"name": "c1"}), rank, size, group)
    assert isinstance(head, Head)
    steps_of(head, rank, ROW_COUNTS[size], range(3))
    contents = Contents(Progress(3, 3 * B), {}, to_yaml(config), config_hash(config))
    save_checkpoint(folder, contents, engine, head, world)


def test_a_checkpoint_carries_the_memory_to_another_number_of_workers(tmp_path: Path) -> None:
    settings = with_memory({"name": "c1"})
    run_workers(save_some, 2, tmp_path, tmp_path / "run")
    checkpoint = tmp_path / "run" / "step-000000003"
    resumed = head_of(settings)
    load_head(checkpoint, verify_checkpoint(checkpoint), resumed)
    alone = head_of(settings)
    steps_of(alone, 0, (B,), range(3))
    wanted, found = (steps_of(head, 0, (B,), range(3, 5)) for head in (alone, resumed))
    assert resumed.report() == {"loss/memory_rows": 24.0}
    for (value, gradient), (got, of_rows) in zip(wanted, found, strict=True):
        assert torch.equal(value, got)
        assert torch.equal(gradient, of_rows)
    smaller = head_of(settings | {"memory_size": 8})
    with pytest.raises(UsageError, match="cross-batch memory"):
        load_head(checkpoint, verify_checkpoint(checkpoint), smaller)


def test_a_batch_in_pieces_is_refused() -> None:
    rows, labels = batch(0)
    with pytest.raises(UsageError, match=r"training\.accumulate=1"):
        head_of({"name": "c1"})(rows, labels, (B,), 2 * B, factor=1.0, last=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["loss.name=c1", "loss.scale=3"], "loss.scale=3.0 is not read by loss.name=c1"),
        (["loss.name=c1", "classes.sample=random"], "classes.sample=random"),
        (["loss.name=c1", "training.accumulate=2"], "training.accumulate=2"),
        (["loss.name=snca", "loss.comparison=l2"], "loss.comparison=l2"),
        (["loss.name=c1", "loss.memory_warmup_steps=5"], "loss.memory_size=0"),
        (["loss.name=cross_entropy", "loss.memory_size=5"], "loss.memory_size=5"),
        (["loss.name=triplet", "loss.mining=none"], "loss.mining"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: list[str], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve(None, settings)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_relative_labels_add_up_the_losses_of_their_labellings() -> None:
    rows, labels = batch(0)
    counts = ROW_COUNTS[1]

    def value(settings: dict[str, Any], of_rows: Tensor) -> Tensor:
        return head_of(settings)(rows, of_rows, counts, B, factor=1.0, last=True).loss

    known = torch.where(labels < 0, 0, labels)
    columns = [torch.where(labels < 0, -100, sets[known]) for sets in TWO_LABELLINGS.sets]
    # SPCE sums over the sets of a labelling: as many classes as that has.
    found = value({"name": "spce", "label_sets": "two"}, labels)
    rows_only = [
        pair_objective_value(SPCE(count), rows, column)
        for column, count in zip(columns, TWO_LABELLINGS.counts, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(rows_only).sum())
    c2 = value({"name": "c2", "label_sets": "two"}, labels)
    torch.testing.assert_close(c2, sum(value({"name": "c2"}, column) for column in columns))
    assert head_of({"name": "c2", "label_sets": "two"}).parts(rows, labels) is None


def pair_objective_value(loss: PairLoss, rows: Tensor, labels: Tensor) -> Tensor:
    return pair_parallel_loss(rows, labels, ROW_COUNTS[1], loss, None, None, 1.0, -100)
