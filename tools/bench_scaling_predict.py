"""What `dist-dml estimate`'s model says of the points of `bench_scaling`.

The rates are those of one worker's threads on this machine, measured in the run while nothing of
the benchmark works. More workers than cores share them: the model knows no such thing, so that its
time of a step is multiplied by workers x threads over cores.

Dimensions: W workers.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from bench_scaling_worker import Size, config_of

from dist_dml.estimate_embedder import NETWORK_SHARE, EmbedderCost, embedder_cost, embedder_seconds
from dist_dml.estimate_head import backend_of, estimate_head, shape_of
from dist_dml.parallel.cost import link_bytes
from dist_dml.parallel.machine import Machine
from dist_dml.parallel.machine_rates import measure_machine


def measured_machine(size: Size) -> Machine:
    """The rates of one worker of this point."""
    tile = (min(size.rows, 1024), 2048, size.dim)
    return measure_machine(torch.device("cpu"), size.threads, tile=tile)


def measured_embedder(size: Size) -> EmbedderCost:
    """What an image costs the embedder, timed on one worker's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(size.threads)
    try:
        return embedder_cost(config_of(size), measure=True)
    finally:
        torch.set_num_threads(before)


def crowding(size: Size, cores: int | None = None) -> float:
    """How many threads share a core; 1 where each has its own."""
    return max(1.0, size.num_workers * size.threads / (cores or os.cpu_count() or 1))


def predict(size: Size, machine: Machine, embedder: EmbedderCost) -> dict[str, Any]:
    """Seconds and bytes of a step.

    Args:
        size: of the point.
        machine: rates of one worker.
        embedder: of an image.

    Returns:
        `head_seconds`, `step_seconds` (with `crowding` in them), `crowding`, `head_link_bytes` and
        `step_link_bytes` that a worker receives, and `bound` by.
    """
    config, workers = config_of(size), size.num_workers
    machine = replace(machine, workers_per_node=max(machine.workers_per_node, workers))
    shape, kernels = shape_of(config, size.num_classes, workers, size.dim)
    head = estimate_head(config, shape, machine, backend_of(config, machine, kernels))
    computing, sending = embedder_seconds(config, embedder, machine, workers, NETWORK_SHARE)
    shared = crowding(size)
    of_gradients = 2 * 4 * embedder.parameters * (workers - 1) / workers
    return {
        "head_seconds": shared * head.cost.total_seconds,
        "step_seconds": shared * (head.cost.total_seconds + computing) + sending,
        "crowding": shared,
        "head_link_bytes": sum(link_bytes(shape)),
        "step_link_bytes": sum(link_bytes(shape)) + of_gradients,
        "bound_by": head.cost.binds,
    }
