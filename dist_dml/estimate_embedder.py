"""What the embedder costs a worker: parameters, operations, activations, state, time.

Dimensions: r rows of this worker in one micro-batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_dml.config import Config
from dist_dml.models.embedder import Embedder, build_embedder
from dist_dml.parallel.head_memory import MemoryItem
from dist_dml.parallel.machine import Machine

# Rows of the forward that is counted: batch norms in training need two.
_COUNTED_ROWS = 2
_TIMED_ROWS = 16
# Share of the machine's rate of matrix products that a whole network reaches. Convolutional
# networks in mixed precision are usually reported between 0.3 and 0.5 on GPUs.
NETWORK_SHARE = 0.4


@dataclass(frozen=True)
class EmbedderCost:
    """Of one image, forward and backward.

    Attributes:
        embedding_dim: D.
        parameters: numbers.
        flops: operations (2 a multiply-add), forward and backward.
        activation_bytes: what the forward keeps for the backward.
        how: how the last two were found.
        measured_seconds: time of an image on this machine, if it was measured.
    """

    embedding_dim: int
    parameters: int
    flops: float
    activation_bytes: float
    how: str
    measured_seconds: float | None = None


def embedder_cost(config: Config, measure: bool) -> EmbedderCost:
    """Count one small forward and backward with random weights.

    In float32 it runs on the meta device, which computes nothing. Under bfloat16 autocast, which
    that device does not know, it runs on this CPU.

    Args:
        config: of the run; no weights are loaded.
        measure: also time it on this CPU.

    Raises:
        UsageError: if the backbone cannot be built.
    """
    model = config.model.model_copy(update={"pretrained": False, "weights": ""})
    embedder = build_embedder(model, config.data.image, config.run.seed, None).train()
    seconds = _measured(embedder, config) if measure else None
    rounds = config.engine.precision == "bfloat16"
    device = torch.device("cpu" if rounds else "meta")
    flops, saved = _counted(embedder.to(device), config, device)
    where = "on this CPU" if rounds else "on the meta device"
    return EmbedderCost(
        embedder.embedding_dim,
        sum(parameter.numel() for parameter in embedder.parameters()),
        flops / _COUNTED_ROWS,
        saved / _COUNTED_ROWS,
        f"counted in a forward and backward of {_COUNTED_ROWS} images {where}",
        seconds,
    )


def _counted(embedder: Embedder, config: Config, device: torch.device) -> tuple[float, float]:
    """Operations of a forward and backward, and bytes saved between them."""
    own = {parameter.untyped_storage()._cdata for parameter in embedder.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter:
        with hooks:
            embeddings = _forward(embedder, config, device, _COUNTED_ROWS)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        embeddings.sum().backward()
    embedder.zero_grad()
    return float(counter.get_total_flops()), float(kept)


def _forward(embedder: Embedder, config: Config, device: torch.device, rows: int) -> Tensor:
    image = config.data.image
    shape = (rows, image.channels, image.size, image.size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    rounds = config.engine.precision == "bfloat16" and device.type == "cpu"
    with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
        return embedder(images, torch.arange(rows, device=device))


def _measured(embedder: Embedder, config: Config) -> float:
    """Median seconds of an image, of three forwards and backwards."""
    rows = min(_TIMED_ROWS, max(2, config.data.batch_size // config.training.accumulate))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        _forward(embedder, config, torch.device("cpu"), rows).sum().backward()
        times.append(time.perf_counter() - started)
        embedder.zero_grad()
    return statistics.median(times[1:]) / rows


def embedder_memory(
    config: Config, cost: EmbedderCost, workers: int, rows: int
) -> list[MemoryItem]:
    """What a worker holds for the embedder, from the engine's rules. Activations of `rows` rows."""
    numbers = 4.0 * cost.parameters
    states = 1 if config.optimizer.name == "sgd" else 2
    if config.optimizer.name == "sgd" and config.optimizer.momentum == 0:
        states = 0
    stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
    parted = workers if stage >= 1 else 1
    items = [
        MemoryItem("embedder parameters", numbers),
        MemoryItem("embedder gradients", numbers / (workers if stage == 2 else 1)),
        MemoryItem("embedder optimizer state", states * numbers / parted),
    ]
    if stage:
        # ZeRO updates a flat copy of its slice.
        items.append(MemoryItem("ZeRO's slice of parameters", numbers / workers))
    items.append(MemoryItem(f"activations of {rows} images", rows * cost.activation_bytes))
    return [item for item in items if item.size]


def prefetch_bytes(config: Config, rows: int) -> float:
    """Decoded images that wait in host memory: micro-batches that the loader prepares ahead."""
    image, data = config.data.image, config.data
    waiting = max(1, data.loader_processes * data.prefetch)
    return float(waiting * rows * image.channels * image.size**2)


def embedder_seconds(
    config: Config, cost: EmbedderCost, machine: Machine, workers: int, share: float
) -> tuple[float, float]:
    """Seconds of a step's forward and backward on a worker, and seconds that the all-reduce of the
    gradients adds: two thirds of the computation, its backward, hide it."""
    rows = -(-config.data.batch_size // workers)
    seconds = rows * cost.flops / (machine.gemm[config.engine.precision] * share)
    if cost.measured_seconds is not None:
        seconds = rows * cost.measured_seconds
    sent = 2 * 4.0 * cost.parameters * (workers - 1) / workers
    return seconds, max(0.0, sent / machine.link(workers).bandwidth - seconds * 2 / 3)
