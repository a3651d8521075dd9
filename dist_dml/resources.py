"""Memory and disk that a run needs, compared with what there is before work starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_dml.config import Config
from dist_dml.errors import UsageError
from dist_dml.parallel.class_optim import class_step, state_bytes, weight_dtype
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World


def check_memory(
    config: Config, embedding_dim: int, partition: ClassPartition, world: World
) -> None:
    """Refuse classes whose weights, optimizer state and tiles cannot fit; before any is allocated.

    Called by all workers together; all raise the same.

    Raises:
        UsageError: with what is needed, what there is, and which keys change it.
    """
    rows = partition.size * config.loss.num_centres
    weights = rows * embedding_dim * weight_dtype(config.classes).itemsize
    rule = class_step(config.optimizer, config.classes)
    state = state_bytes(rule, config.classes, rows, embedding_dim)
    tiles = int(config.loss.tile_mebibytes * 2**20)
    free, sharers = _free_bytes(world)
    short = free < sharers * (weights + state + tiles)
    text = (
        f"worker {world.rank} needs {_gibibytes(weights + state + tiles)} for its {partition.size} "
        f"classes (weights {_gibibytes(weights)}, optimizer state {_gibibytes(state)}, tiles "
        f"{_gibibytes(tiles)}), and {sharers} worker(s) share {_gibibytes(free)} of free memory; "
        "use more workers, classes.weight_dtype=bfloat16, classes.state_dtype=bfloat16, or lower "
        "model.embedding_dim or loss.tile_mebibytes"
    )
    for found in gather_objects(text if short else None, world.group):
        if found is not None:
            raise UsageError(found)


def _free_bytes(world: World) -> tuple[int, int]:
    """Free memory where this worker's classes will lie, and how many workers share it."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0], 1
    import psutil

    return psutil.virtual_memory().available, world.ranks.local_size


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def check_disk(
    config: Config,
    folder: Path,
    embedder: nn.Module,
    classifier: ClassParallelClassifier,
    world: World,
) -> None:
    """Refuse a run whose checkpoints cannot fit: those kept, the best, and the one being written.

    Called by all workers together; all raise the same.

    Raises:
        UsageError: with what is needed and what there is.
    """
    states = 1 if config.optimizer.name == "sgd" else 2
    own = sum(_bytes(tensor) for tensor in classifier.shard_tensors().values())
    one = sum(gather_objects(own, world.group))
    one += (1 + states) * sum(_bytes(tensor) for tensor in embedder.state_dict().values())
    needed = one * (config.checkpoint.keep_last + 2)
    own_view = shutil.disk_usage(folder).free if world.is_first else 0
    free = gather_objects(own_view, world.group)[0]
    if free < needed:
        raise UsageError(
            f"run.root={config.run.root} has {free / 2**20:.1f} MiB free and checkpoints need up "
            f"to {needed / 2**20:.1f} MiB; free space, choose another run.root, or lower "
            "checkpoint.keep_last"
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
