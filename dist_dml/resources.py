"""Memory and disk that a run needs, compared with what there is before work starts."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_dml.checkpoint_writer import kept_copy_bytes
from dist_dml.config import Config
from dist_dml.errors import UsageError
from dist_dml.parallel.class_optim import class_step, state_bytes, weight_dtype
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.heads import Head
from dist_dml.parallel.world import World
from dist_dml.usable import usable_memory


def check_memory(
    config: Config, embedding_dim: int, partition: ClassPartition, world: World
) -> None:
    """Refuse classes whose weights, optimizer state and tiles cannot fit; before any is allocated.

    Called by all workers together; all raise the same.

    Raises:
        UsageError: with what is needed, what there is, and which keys change it.
    """
    if config.loss.of_pairs:
        needed, text = _pair_bytes(config, embedding_dim, partition)
    else:
        on_cpu = world.device.type == "cpu"
        needed, text = _class_bytes(config, embedding_dim, partition, on_cpu)
    free, sharers = _free_bytes(world)
    short = free < sharers * needed
    text = (
        f"worker {world.rank} needs {_gibibytes(needed)} for {text[0]}, and {sharers} worker(s) "
        f"share {_gibibytes(free)} of free memory; {text[1]}"
    )
    copy = _host_copy_bytes(config, embedding_dim, partition, world)
    host_free = usable_memory() if copy else 0
    if copy and not short and host_free < world.ranks.local_size * copy:
        short = True
        text = (
            f"worker {world.rank} needs {_gibibytes(copy)} of main memory for the copy that a "
            f"checkpoint is written from, and {world.ranks.local_size} worker(s) share "
            f"{_gibibytes(host_free)}; set checkpoint.background=false or use more machines"
        )
    for found in gather_objects(text if short else None, world.group):
        if found is not None:
            raise UsageError(found)


def _host_copy_bytes(
    config: Config, embedding_dim: int, partition: ClassPartition, world: World
) -> int:
    """What is copied to main memory from a device; on a CPU it is counted with the rest."""
    if world.device.type == "cpu" or config.loss.of_pairs:
        return 0
    return kept_copy_bytes(config.checkpoint, sum(_state_bytes(config, embedding_dim, partition)))


def _class_bytes(
    config: Config, embedding_dim: int, partition: ClassPartition, on_cpu: bool
) -> tuple[int, tuple[str, str]]:
    """What a worker's classes take, what for in words, and what takes less."""
    weights, state = _state_bytes(config, embedding_dim, partition)
    tiles = int(config.loss.tile_mebibytes * 2**20)
    copy = kept_copy_bytes(config.checkpoint, weights + state) if on_cpu else 0
    copied = f", the copy that a checkpoint is written from {_gibibytes(copy)}" if copy else ""
    text = (
        f"its {partition.size} classes (weights {_gibibytes(weights)}, optimizer state "
        f"{_gibibytes(state)}, tiles {_gibibytes(tiles)}{copied})"
    )
    remedy = (
        "use more workers, classes.weight_dtype=bfloat16, classes.state_dtype=bfloat16, "
        + "checkpoint.background=false, " * bool(copy)
        + "or lower model.embedding_dim or loss.tile_mebibytes"
    )
    return weights + state + tiles + copy, (text, remedy)


def _state_bytes(config: Config, embedding_dim: int, partition: ClassPartition) -> tuple[int, int]:
    """Bytes of a worker's class weights, and of their optimizer state."""
    rows = partition.size * config.loss.num_centres
    width = 2 if config.engine.precision == "float64" else 1
    weights = width * rows * embedding_dim * weight_dtype(config.classes).itemsize
    rule = class_step(config.optimizer, config.classes)
    return weights, width * state_bytes(rule, config.classes, rows, embedding_dim)


def _pair_bytes(
    config: Config, embedding_dim: int, partition: ClassPartition
) -> tuple[int, tuple[str, str]]:
    """What a worker's pairs take: the gathered rows and their gradients, the memory or the proxies
    of its classes, a block."""
    memory = config.loss.memory_size * (4 * embedding_dim + 8)
    rows = 4 * 4 * config.data.batch_size * embedding_dim
    block = int(config.loss.block_mebibytes * 2**20)
    proxies, given = 0, config.proxies
    if given.per_class:
        # The proxies, their best twice, gradient and its sum, two moments; the pool, and the bank.
        enough = given.pool_size >= given.per_class
        places = given.pool_size * (1 if enough else given.per_class)
        of_class = 7 * given.per_class + places * (2 if given.pool == "bank" else 1)
        proxies = 4 * partition.size * embedding_dim * of_class
    text = (
        f"the pairs of a batch (rows {_gibibytes(rows)}, memory {_gibibytes(memory)}, proxies "
        f"{_gibibytes(proxies)}, block {_gibibytes(block)})"
    )
    remedy = (
        "lower proxies.per_class or proxies.pool_size, loss.block_mebibytes or data.batch_size"
        if proxies
        else "lower loss.memory_size, loss.block_mebibytes or data.batch_size"
    )
    return memory + rows + proxies + block, (text, remedy)


def _free_bytes(world: World) -> tuple[int, int]:
    """Free memory where this worker's classes will lie, and how many workers share it."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0], 1
    return usable_memory(), world.ranks.local_size


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def peak_mebibytes(world: World) -> float:
    """The most memory that any worker has held so far: on its GPU, or resident on a CPU. By all
    workers together."""
    if world.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(world.device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux.
    return max(gather_objects(own, world.group)) / 2**20


def check_disk(
    config: Config,
    folder: Path,
    embedder: nn.Module,
    head: Head,
    world: World,
) -> None:
    """Refuse a run whose checkpoints cannot fit: those kept, the best, and the one being written.

    Called by all workers together; all raise the same.

    Raises:
        UsageError: with what is needed and what there is.
    """
    states = 1 if config.optimizer.name == "sgd" else 2
    own = sum(_bytes(tensor) for tensor in head.shard_tensors().values())
    one = sum(gather_objects(own, world.group))
    one += sum(_bytes(tensor) for tensor in head.shared_tensors().values())
    # Paper C's proxies come with up to three copies of the embedder.
    copies = 1 + states + (3 if config.proxies.per_class else 0)
    one += copies * sum(_bytes(tensor) for tensor in embedder.state_dict().values())
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
