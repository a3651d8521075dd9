"""One training step of N workers against one process on the whole batch, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.loader import Batch
from dist_dml.data.plan import row_counts, worker_slice
from dist_dml.engine import TorchEngine
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import Ranks, World

C, R = 23, 128


def configuration(*overrides: str) -> Config:
    """A network with batch norms and dropout, on small images."""
    settings = [
        "data.image={size: 16, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
        "model={embedding_dim: 12, norm: batch, dropout: 0.4}",
        "optimizer={name: sgd, learning_rate: 0.1}",
    ]
    return resolve(None, [*settings, *overrides]).config


def micro_batches(config: Config, rank: int, num_workers: int, step: int) -> list[Batch]:
    """This worker's rows of one batch of 128 random images, cut as the loader cuts it."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (R, 1, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, C, (R,), generator=generator)
    batches = []
    pieces = config.training.accumulate
    for micro in range(pieces):
        whole = torch.arange(R)[worker_slice(R, micro, pieces)]
        mine = whole[worker_slice(len(whole), rank, num_workers)]
        counts = row_counts(len(whole), num_workers)
        batches.append(
            Batch(
                images=images[mine],
                mirrored=torch.zeros(len(mine), dtype=torch.bool),
                labels=labels[mine],
                sample_ids=mine,
                positions=mine,
                readable=torch.ones(len(mine), dtype=torch.bool),
                row_counts=counts,
                step=step,
                micro=micro,
            )
        )
    return batches


def trained(
    rank: int, num_workers: int, group: ProcessGroup | None, config: Config, steps: int
) -> dict[str, Tensor]:
    """The gradients of the first step, and the weights after `steps`, by name."""
    world = World(Ranks(rank, num_workers), torch.device("cpu"), group, None)
    embedder = build_embedder(config.model, config.data.image, 0, group).double()
    engine = TorchEngine(config, embedder, world)
    partition = ClassPartition.of_worker(rank, num_workers, C, group)
    classifier = ClassParallelClassifier(
        embedder.embedding_dim, partition, config.loss, config.optimizer, 0, R, dtype=torch.float64
    )
    result: dict[str, Tensor] = {}
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches(config, rank, num_workers, step):
            last = batch.micro == config.training.accumulate - 1
            keys = row_keys(key_of(0, "dropout", step), batch.positions)
            output = classifier(engine(batch.images, keys, last), batch.labels, batch.row_counts, R)
            engine.backward(output.loss)
            total += output.loss.detach()
            if step == 0 and last:
                for name, parameter in embedder.named_parameters():
                    assert parameter.grad is not None
                    result[f"gradient of {name}"] = parameter.grad.clone()
            engine.step(1.0)
        classifier.step(1.0)
        result[f"loss {step}"] = total
    result |= {f"final {k}": v.detach().clone() for k, v in embedder.state_dict().items()}
    return result | {"classes": classifier.weight.detach().clone()}


@pytest.mark.parametrize(
    ("num_workers", "overrides"),
    [
        (2, ()),
        (3, ()),
        (3, ("loss.similarity=cosine", "loss.scale=16", "optimizer.clip_norm=0.1")),
        pytest.param(3, ("training.accumulate=3",), marks=pytest.mark.slow),
        (3, ("loss={name: l2, p: 0.5, a: 0.21, init_std: 0.3}", "training.accumulate=2")),
        pytest.param(
            3,
            ("loss={name: soft_triple, centres: 2, init_std: 0.3}", "training.accumulate=2"),
            marks=pytest.mark.slow,
        ),
        pytest.param(2, ("loss={name: adaface, scale: 8, init_std: 0.3}",), marks=pytest.mark.slow),
        (3, ("loss={name: proxy_anchor, init_std: 0.3}",)),
    ],
)
def test_workers_train_like_one_process_on_the_whole_batch(
    num_workers: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """128 rows on 3 workers are uneven; batch norm and dropout are those of the whole batch."""
    smoothed = ("loss.label_smoothing=0.1", "loss.init_std=0.3")
    named = any(override.startswith("loss={") for override in overrides)
    config = configuration(*(() if named else smoothed), *overrides)
    expected = trained(0, 1, None, config, 4)
    results = run_workers(trained, num_workers, tmp_path, config, 4)
    for result in results:
        for name, value in expected.items():
            if name != "classes":
                torch.testing.assert_close(result[name], value, rtol=1e-8, atol=1e-10, msg=name)
    classes = torch.cat([result["classes"] for result in results])
    torch.testing.assert_close(classes, expected["classes"], rtol=1e-8, atol=1e-10)


def test_settling_the_buckets_leaves_no_trace(tmp_path: Path) -> None:
    """The step on blank images that lays out DDP's buckets changes no weight and no statistic."""
    config = configuration()
    untouched = build_embedder(config.model, config.data.image, 0, None).double().state_dict()
    for result in run_workers(trained, 2, tmp_path, config, 0):
        for name, value in untouched.items():
            assert torch.equal(result[f"final {name}"], value), name
