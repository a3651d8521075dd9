"""`dist-dml estimate`: what a configuration needs and reaches on a cluster that need not be there.

    dist-dml estimate --config F a.b=v --workers 8 --machine h200
    dist-dml estimate --table
    dist-dml estimate --machine measured --validate

Everything is calculated by `parallel.cost` from rates of a machine; docs/estimate.md says how, and
how far it is off.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dist_dml.command_line import add_config_option
from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.errors import UsageError
from dist_dml.estimate_embedder import (
    NETWORK_SHARE,
    EmbedderCost,
    embedder_cost,
    embedder_memory,
    embedder_seconds,
    prefetch_bytes,
)
from dist_dml.estimate_head import (
    HeadEstimate,
    backend_of,
    estimate_head,
    num_classes_of,
    shape_of,
)
from dist_dml.parallel.head_memory import USABLE, largest_num_classes, mebibytes, total_bytes
from dist_dml.parallel.machine import DECLARED, Machine, find_machine
from dist_dml.parallel.machine_rates import measure_machine

NOT_MEASURED = "calculated, not measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml estimate`."""
    add_config_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--workers", type=int, default=1, help="GPUs or processes (default 1)")
    machines = ", ".join((*DECLARED, "measured"))
    parser.add_argument("--machine", default="h200", help=f"{machines} (default h200)")
    parser.add_argument("--nodes-of", type=int, default=0, metavar="N", help="workers of a node")
    parser.add_argument("--classes", type=int, default=0, metavar="C", help="number of classes")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads when measuring")
    parser.add_argument(
        "--share", type=float, default=0.0, help="share of the data sheet's FLOP/s that is reached"
    )
    parser.add_argument(
        "--network-share",
        type=float,
        default=NETWORK_SHARE,
        help=f"share of the GEMM rate that the embedder reaches (default {NETWORK_SHARE})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers")
    parser.add_argument("--table", action="store_true", help="10M to 1B classes on 8 to 512 GPUs")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw C and time over GPUs")
    parser.add_argument(
        "--validate", action="store_true", help="run small real steps on this CPU and compare"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for. Returns the exit code."""
    _check(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or before)
    try:
        found, text = _answer(arguments)
    finally:
        torch.set_num_threads(before)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _answer(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The form that was asked for: numbers for JSON, and text."""
    if arguments.validate:
        from dist_dml.estimate_validate import validate

        return validate(torch.get_num_threads())
    if arguments.table or arguments.figure:
        from dist_dml.estimate_tables import draw, table

        machine = _machine(arguments, (256, 2048, 128))
        found, text = table(machine, arguments.network_share)
        if arguments.figure:
            draw(machine, arguments.figure)
            text += f"\n\nwrote {arguments.figure}"
        return found, text
    return _estimate(arguments)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("share", "network_share"):
        value = getattr(arguments, name)
        if not 0 <= value <= 1 or (name == "network_share" and value == 0):
            option = name.replace("_", "-")
            raise UsageError(f"--{option}={value:g} is no share; give a number above 0, at most 1")
    for name in ("workers", "nodes_of", "threads"):
        if getattr(arguments, name) < (name == "workers"):
            option = name.replace("_", "-")
            raise UsageError(f"--{option}={getattr(arguments, name)}: give 1 or more")
    for path in (arguments.json, arguments.figure):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: its folder does not exist; create it")


def _machine(arguments: argparse.Namespace, tile: tuple[int, int, int]) -> Machine:
    """The machine that was named, with what was overridden."""
    if arguments.machine == "measured":
        if arguments.share:
            raise UsageError("--share is for declared machines; leave it out with measured rates")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        machine = measure_machine(device, torch.get_num_threads(), tile=tile)
    else:
        machine = find_machine(arguments.machine)
    if arguments.share:
        machine = machine.with_share(arguments.share)
    if arguments.nodes_of:
        machine = replace(machine, workers_per_node=arguments.nodes_of)
    return machine


def _estimate(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All numbers of one configuration, and the report."""
    config = resolve(arguments.config, arguments.overrides).config
    num_classes, workers = num_classes_of(config, arguments.classes), arguments.workers
    on_cpu = arguments.machine == "measured" and not torch.cuda.is_available()
    of_embedder = embedder_cost(config, measure=on_cpu)
    width = of_embedder.embedding_dim
    shape, kernels = shape_of(config, num_classes, workers, width)
    machine = _machine(arguments, (min(shape.sweep_rows, 1024), 2048, width))
    head = estimate_head(config, shape, machine, backend_of(config, machine, kernels))
    rows = -(-shape.sweep_rows // workers)
    items = [*head.memory, *embedder_memory(config, of_embedder, workers, rows)]
    others = total_bytes(items) - total_bytes(head.memory)
    budget = config.loss.tile_mebibytes * 2**20
    computing, sending = embedder_seconds(
        config, of_embedder, machine, workers, arguments.network_share
    )
    step = head.cost.total_seconds + computing + sending
    found = {
        "note": NOT_MEASURED,
        "machine": asdict(machine),
        "workers": workers,
        "shape": asdict(shape),
        "backend": head.backend.name,
        "plan": head.plan._asdict(),
        "memory": {item.name: item.size for item in items},
        "memory_bytes": total_bytes(items),
        "host_prefetch_bytes": prefetch_bytes(config, rows),
        "fits": total_bytes(items) <= USABLE * machine.memory_bytes,
        "largest_num_classes": largest_num_classes(shape, machine, budget, others),
        "head": asdict(head.cost),
        "embedder": asdict(of_embedder) | {"seconds": computing, "all_reduce_seconds": sending},
        "step_seconds": step,
        "images_per_second": shape.rows / step,
    }
    return found, _report(config, found, head, of_embedder, machine)


def _report(
    config: Config,
    found: dict[str, Any],
    head: HeadEstimate,
    of_embedder: EmbedderCost,
    machine: Machine,
) -> str:
    """The numbers of one configuration as text."""
    shape, cost = head.shape, head.cost
    there, needed = machine.memory_bytes, found["memory_bytes"]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    whole = f"{shape.workers} x {machine.name}"
    micro = f" in {shape.micro_batches} micro-batches" if shape.micro_batches > 1 else ""
    lines = [
        f"{shape.num_classes:,} classes x {shape.embedding_dim}, batch {shape.rows}{micro}, "
        f"{whole} ({NOT_MEASURED})",
        f"rates: {machine.source}",
        "",
        "memory of a worker",
        *(f"  {name:<34} {mebibytes(size):>12}" for name, size in found["memory"].items()),
        f"  {'total':<34} {mebibytes(needed):>12}   {verdict}: {mebibytes(there)}, of which "
        f"{USABLE:.0%} count",
        f"  {'host: images decoded ahead':<34} {mebibytes(found['host_prefetch_bytes']):>12}",
        f"  most classes that fit {found['largest_num_classes']:>24,}",
        "",
        f"sweeps: {head.plan.sweep}, tiles of {head.plan.tile_classes:,} classes, "
        f"{head.plan.row_chunk:,} rows at a time, backend {head.backend.name}",
        f"  {head.plan.reason}",
        "",
        "a step of the head on a worker",
        f"  operations {cost.flops:.3g} FLOP, exponentials {cost.exponentials:.3g}, "
        f"weights and state {mebibytes(cost.traffic_bytes)}, links {mebibytes(cost.link_bytes)}",
        *(f"  {part:<14} {value * 1e3:>10.3f} ms" for part, value in cost.seconds.items()),
        f"  {'together':<14} {cost.total_seconds * 1e3:>10.3f} ms, bound by {cost.binds}",
        "",
        f"embedder {config.model.backbone}: {of_embedder.parameters / 1e6:.2f}M parameters, "
        f"{of_embedder.flops / 1e9:.3g} GFLOP and {mebibytes(of_embedder.activation_bytes)} an "
        "image",
        f"  {of_embedder.how}",
        f"  {found['embedder']['seconds'] * 1e3:.2f} ms, all-reduce "
        f"{found['embedder']['all_reduce_seconds'] * 1e3:.2f} ms beside it"
        + (" (timed here)" if of_embedder.measured_seconds is not None else ""),
        "",
        f"step {found['step_seconds'] * 1e3:.2f} ms, {found['images_per_second']:,.0f} images/s "
        "(without waits for data)",
    ]
    return "\n".join(lines)
