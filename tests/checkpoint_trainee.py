"""A small engine with classes behind it, on random images, for tests of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_dml.checkpoint import (
    Contents,
    load_embedder_tensors,
    load_head,
    load_optimizer_state,
    save_checkpoint,
)
from dist_dml.checkpoint_manifest import Progress, verify_checkpoint
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, resolve, to_yaml
from dist_dml.engine import Engine, build_engine
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition, part_bounds
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import Ranks, World

C, R = 11, 7
SETTINGS = [
    "data.batch_size=7",
    "data.image={size: 8, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
    "model={embedding_dim: 6, norm: batch}",
]
# By name, the settings besides SETTINGS; the optimizer comes first.
CASES = {
    "sgd": ("optimizer.name=sgd",),
    "adamw": ("optimizer.name=adamw",),
    "centres": ("optimizer.name=adamw", "loss.name=soft_triple", "loss.centres=3"),
    "running norms": ("optimizer.name=sgd", "loss.name=adaface"),
}


@dataclass
class Trainee:
    """One worker's engine and classes, on random images."""

    config: Config
    world: World
    engine: Engine
    classifier: ClassParallelClassifier

    def train(self, steps: range) -> None:
        """Steps over `R` rows, of which this worker has its slice."""
        size = self.world.size
        bounds = [part_bounds(rank, size, R) for rank in range(size)]
        counts = tuple(stop - start for start, stop in bounds)
        own = slice(*bounds[self.world.rank])
        self.engine.embedder.train()
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            images = torch.randint(0, 256, (R, 1, 8, 8), generator=generator).to(torch.uint8)
            labels = torch.randint(0, C, (R,), generator=generator)
            embeddings = self.engine(images[own], torch.arange(R)[own], last=True)
            self.engine.backward(self.classifier(embeddings, labels[own], counts, R).loss)
            self.engine.step(1.0)
            self.classifier.step(1.0)

    def contents(self, step: int) -> Contents:
        """What a checkpoint of a step says besides tensors."""
        return Contents(
            Progress(step, R * step, 1.5, 0.25, 1),
            {"seed": 0, "fingerprint": "abc"},
            to_yaml(self.config),
            config_hash(self.config),
        )

    def save(self, folder: Path, step: int) -> Path:
        """Write a checkpoint and wait for it."""
        contents = self.contents(step)
        return save_checkpoint(folder, contents, self.engine, self.classifier, self.world)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "classes": clones(self.classifier.shard_tensors()),
            "embedder": clones(self.engine.embedder.state_dict()),
            "optimizer": clones(self.engine.optimizer_tensors()),
        }


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def trainee(
    case: str,
    rank: int = 0,
    size: int = 1,
    group: ProcessGroup | None = None,
    checkpoint: Path | None = None,
    num_classes: int = C,
) -> Trainee:
    """New, or restored from a checkpoint in the order that the project uses."""
    config = resolve(None, [*SETTINGS, *CASES[case]]).config
    world = World(Ranks(rank, size, rank, size), torch.device("cpu"), group, None)
    embedder = build_embedder(config.model, config.data.image, 0, group)
    partition = ClassPartition.of_worker(rank, size, num_classes, group)
    classifier = ClassParallelClassifier(6, partition, config.loss, config.optimizer, 0, R)
    if checkpoint is not None:
        embedder.load_state_dict(load_embedder_tensors(checkpoint))
        load_head(checkpoint, verify_checkpoint(checkpoint), classifier)
    engine = build_engine(config, embedder, world)
    if checkpoint is not None:
        engine.load_optimizer_tensors(load_optimizer_state(checkpoint))
    return Trainee(config, world, engine, classifier)


def joined(workers: list[dict[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """All classes in order; what the workers hold alike must be equal on all of them."""
    first, *others = workers
    for kind in ("embedder", "optimizer"):
        for other in others:
            assert_equal(other[kind], first[kind])
    classes = {
        f"classes {name}": value
        if value.ndim == 0
        else torch.cat([worker["classes"][name] for worker in workers])
        for name, value in first["classes"].items()
    }
    alike = {f"{kind} {n}": v for kind in ("embedder", "optimizer") for n, v in first[kind].items()}
    return classes | alike


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
