"""Workers measure together: bandwidth, latency, clocks, and whether they see the same folder.

Every function is called by all workers of a group, in the same order. Dimensions: W workers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_dml.config import Config
from dist_dml.doctor.findings import Finding, ok, problem, warning
from dist_dml.parallel.collectives import barrier, gather_equal, gather_objects

KIBIBYTE = 2**10
SIZES = (8, 64 * KIBIBYTE, 1024 * KIBIBYTE, 16 * 1024 * KIBIBYTE)
"""Bytes of a worker's tensor, the first for the latency; GPUs get a larger one as well."""
GPU_SIZE = 256 * 2**20
_CASE_SECONDS = 0.3
_MOST_TURNS = 200
_ROUNDS = 10
# Between hosts; inside one the processors are as busy as they are.
_SLOW_BYTES, _SLOW_LATENCY = 0.11e9, 1e-3
_SLOW_GPU_BYTES = 3e9
_SKEW_SECONDS = 1.0
# Network file systems keep the names of a folder for some seconds.
_SEEN_SECONDS = 4.0


@dataclass(frozen=True)
class Rate:
    """One collective at one size.

    Attributes:
        name: `all-reduce` or `all-gather`.
        size: bytes of each worker's tensor.
        seconds: median of one call.
        bus: bytes a second that each worker must send for it at least: 2 (W - 1) / W of the size
            for an all-reduce, W - 1 times it for an all-gather.
    """

    name: str
    size: int
    seconds: float
    bus: float


def measure(
    group: ProcessGroup,
    device: torch.device,
    agree: ProcessGroup,
    sizes: Sequence[int] = SIZES,
    case_seconds: float = _CASE_SECONDS,
) -> list[Rate]:
    """Rates of all-reduce and all-gather; about `case_seconds` for each of them and each size.

    Args:
        group: to measure.
        device: of the tensors.
        agree: the same workers over gloo, for the number of turns.
        sizes: bytes of a worker's tensor.
        case_seconds: of one collective at one size.
    """
    workers = group.size()
    found = []
    for size in sizes:
        values = torch.zeros(max(1, size // 4), device=device)
        cases: dict[str, tuple[Callable[[], object], float]] = {
            "all-reduce": (_all_reduce(values, group), 2 * (workers - 1) / workers),
            "all-gather": (_all_gather(values, group), workers - 1.0),
        }
        for name, (call, sent) in cases.items():
            seconds = _median(call, device, agree, case_seconds)
            found.append(Rate(name, size, seconds, sent * size / seconds))
    return found


def _all_reduce(values: Tensor, group: ProcessGroup) -> Callable[[], object]:
    return lambda: dist.all_reduce(values, group=group)


def _all_gather(values: Tensor, group: ProcessGroup) -> Callable[[], object]:
    return lambda: gather_equal(values, group)


def _median(
    call: Callable[[], object], device: torch.device, agree: ProcessGroup, seconds: float
) -> float:
    """Seconds of a call, after one that connects and one that tells how many fit the time."""
    call()
    turns, times = 1, [0.0]
    for step in range(2):
        barrier(agree)
        times = []
        for _ in range(turns):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        if step == 0:
            # All make the same number of turns: what worker 0 can afford.
            chosen = torch.tensor([min(_MOST_TURNS, max(3, int(seconds / max(times[0], 1e-7))))])
            dist.broadcast(chosen, 0, group=agree)
            turns = int(chosen)
    return sorted(times)[len(times) // 2]


def link_findings(
    kind: str, rates: Sequence[Rate], workers: int, num_hosts: int
) -> Iterator[Finding]:
    """Findings about what was measured.

    Args:
        kind: gloo or nccl.
        rates: of `measure`.
        workers: W.
        num_hosts: that they are on.
    """
    smallest = min(rate.size for rate in rates)
    latency = min(rate.seconds for rate in rates if rate.size == smallest)
    way = f"{latency * 1e6:,.0f} us for {smallest} bytes, {workers} workers on {num_hosts} host(s)"
    if num_hosts > 1 and kind == "gloo" and latency > _SLOW_LATENCY:
        remedy = "workers in one zone or rack: each step waits for several such messages"
        yield warning(f"{kind} latency", way, remedy, seconds=latency)
    else:
        yield ok(f"{kind} latency", way, seconds=latency)
    for name in dict.fromkeys(rate.name for rate in rates):
        of_name = [rate for rate in rates if rate.name == name and rate.size > smallest]
        best = max(rate.bus for rate in of_name)
        measured = ", ".join(
            f"{_size(r.size)} {_milliseconds(r.seconds)} ({r.bus / 1e9:.2f} GB/s)" for r in of_name
        )
        values = {
            "bus_bytes_per_second": best,
            "rates": [{"bytes": r.size, "seconds": r.seconds, "bus": r.bus} for r in of_name],
        }
        slow_gpu = kind == "nccl" and best < _SLOW_GPU_BYTES
        if slow_gpu or (num_hosts > 1 and best < _SLOW_BYTES):
            remedy = (
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME of the fastest network; NCCL_DEBUG=INFO "
                "shows what NCCL chose (InfiniBand, sockets, P2P)"
            )
            yield warning(f"{kind} {name}", f"slow: {measured}", remedy, **values)
        else:
            yield ok(f"{kind} {name}", measured, **values)


def head_finding(config: Config, rates: Sequence[Rate], workers: int) -> Finding:
    """What the class-parallel head's rows take on these links (docs/estimate.md).

    Rows are gathered and their gradients reduced: 4 R D (W - 1) / W bytes each way, float32.

    Args:
        config: batch size and embedding width.
        rates: of `measure`.
        workers: W.
    """
    width = config.model.embedding_dim or 512
    assumed = "" if config.model.embedding_dim else " (assumed)"
    rows = config.data.batch_size
    size = 2 * 4 * rows * width * (workers - 1) / workers
    near = min((r for r in rates if r.size > 8), key=lambda r: abs(r.size - size / workers))
    seconds = size / near.bus + 4 * min(rate.seconds for rate in rates)
    measured = (
        f"{rows} rows x {width}{assumed} take about {_milliseconds(seconds)} of each step to travel"
        f", from the rate at {_size(near.size)} and four messages; the embedder's gradients come "
        "on top"
    )
    return ok("class head", measured, seconds=seconds, bytes=size)


def clock_offsets(
    targets: Sequence[int],
    group: ProcessGroup,
    clock: Callable[[], float] = time.time,
) -> dict[int, tuple[float, float]]:
    """How far the clocks of some workers are ahead of worker 0's, with the uncertainty.

    Ten questions each; the one with the shortest way counts, and half its way is the uncertainty.
    Known to worker 0 only; the others return nothing.

    Args:
        targets: workers, not 0.
        group: over gloo.
        clock: of this worker, in seconds.
    """
    rank, found = group.rank(), {}
    for target in targets:
        best = (0.0, float("inf"))
        for _ in range(_ROUNDS):
            there = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                asked = clock()
                dist.send(there, target, group=group)
                dist.recv(there, target, group=group)
                came = clock()
                if came - asked < 2 * best[1]:
                    best = (float(there) - (asked + came) / 2, (came - asked) / 2)
            elif rank == target:
                dist.recv(there, 0, group=group)
                there[0] = clock()
                dist.send(there, 0, group=group)
        if rank == 0:
            found[target] = best
    return found


def skew_findings(
    offsets: Mapping[int, tuple[float, float]], hosts: Sequence[str]
) -> Iterator[Finding]:
    """Findings about the clocks of hosts.

    Args:
        offsets: of `clock_offsets`.
        hosts: of each worker.
    """
    if not offsets:
        return
    worst = max(offsets, key=lambda rank: abs(offsets[rank][0]))
    off, unsure = offsets[worst]
    values = {"seconds": {hosts[rank]: offset for rank, (offset, _) in offsets.items()}}
    if len(set(hosts)) == 1:
        measured = f"one host; two workers agree within {(abs(off) + unsure) * 1e3:.1f} ms"
        yield ok("clocks", measured, **values)
        return
    measured = (
        f"{hosts[worst]} is {abs(off):.3f} s {'ahead of' if off > 0 else 'behind'} {hosts[0]} "
        f"(known to {unsure * 1e3:.1f} ms), the most of {len(offsets)} host(s)"
    )
    if abs(off) - unsure > _SKEW_SECONDS:
        remedy = "chronyd or systemd-timesyncd on all hosts (timedatectl shows the state)"
        text = f"{measured}: files seem to come from the future, logs do not line up"
        yield warning("clocks", text, remedy, **values)
    else:
        yield ok("clocks", measured, **values)


def shared_folder(
    folder: Path, leaders: Sequence[int], group: ProcessGroup, patience: float = _SEEN_SECONDS
) -> Iterator[Finding]:
    """A finding about whether the hosts see one another's files in a folder; on worker 0 only.

    Args:
        folder: that exists, for worker 0 to leave an empty file in and remove it again.
        leaders: one worker of each host.
        group: over gloo.
        patience: seconds that a file may take to be seen.
    """
    import os
    import uuid

    rank = group.rank()
    path: Path | None = None
    if rank == 0:
        path = folder / f".dist_dml-doctor-{uuid.uuid4().hex}"
        try:
            path.touch()
        except OSError:
            path = None  # Said by the check of the disk.
    wanted = gather_objects(path, group)[0]
    seen: bool | None = None
    if wanted is not None and rank in leaders:
        deadline = time.monotonic() + patience
        while not (seen := os.path.exists(wanted)) and time.monotonic() < deadline:
            time.sleep(0.2)
    answers = gather_objects(seen, group)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    blind = [leader for leader in leaders if not answers[leader]]
    if blind:
        yield problem(
            "run.root shared",
            f"{len(blind)} of {len(leaders)} host(s) do not see worker 0's files in {folder}",
            "run.root on a file system that all hosts mount at the same place: each worker writes "
            "its part of a checkpoint there",
            workers=blind,
        )
    else:
        yield ok("run.root shared", f"all {len(leaders)} host(s) see the same folder")


def gpus_alike(names: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """A finding where workers have different GPUs.

    Args:
        names: of each worker's GPU; of none, an empty list.
    """
    kinds: dict[Any, int] = {}
    for of_worker in names:
        kinds[tuple(of_worker)] = kinds.get(tuple(of_worker), 0) + 1
    if len(kinds) > 1:
        text = ", ".join(f"{count} x {' '.join(kind) or 'CPU'}" for kind, count in kinds.items())
        remedy = "workers on equal devices: the slowest sets the pace, and CPU and GPU do not mix"
        yield warning("devices alike", text, remedy)


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // KIBIBYTE} KiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
