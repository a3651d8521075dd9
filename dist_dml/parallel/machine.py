"""What a worker's hardware can do: declared from data sheets, or known cheaply on this machine.

A worker is one GPU, or one process on some CPU cores. `parallel.machine_rates` measures.
"""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dist_dml.control_groups import allowance
from dist_dml.errors import UsageError

DtypeName = Literal["float32", "bfloat16"]
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Level:
    """One level of the memory hierarchy, the last being the memory itself.

    Attributes:
        capacity: bytes of a working set that stay in it, over all cores of the worker.
        read: bytes per second of reading.
        update: bytes per second, reads and writes together, of reading and writing back.
    """

    capacity: float
    read: float
    update: float


@dataclass(frozen=True)
class Link:
    """What connects two workers.

    Attributes:
        bandwidth: bytes per second that a worker sends, while it receives as many.
        latency: seconds of one message.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """The rates of one worker.

    Attributes:
        name: as given to `dist-dml estimate --machine`.
        device: kind of device.
        gemm: FLOP/s of the matrix products of tiles, by the operands' dtype (one multiplication and
            one addition are 2).
        exponentials: exponentials per second of numbers in the cache, reading and writing included.
        roundings: numbers per second that change from float32 to bfloat16 or back.
        fresh: bytes per second of memory that is written for the first time: on a CPU the system
            hands out pages one by one, on a GPU PyTorch keeps them.
        cache_bytes: cache of one core (CPU: L2), or of the device (GPU: L2).
        cores: cores that share the work, each with such a cache; 1 for a GPU.
        levels: from the cache to the memory.
        memory_bytes: memory of the worker.
        launch_seconds: of one operation on a tile, however small.
        inside: link between workers of a node.
        between: link between workers of two nodes.
        workers_per_node: workers that share a node.
        share: share of the data sheet's FLOP/s that `gemm` assumes; 1 for measured rates.
        source: where the numbers come from, one line.
    """

    name: str
    device: Literal["cpu", "cuda"]
    gemm: Mapping[str, float]
    exponentials: float
    roundings: float
    fresh: float
    cache_bytes: int
    cores: int
    levels: tuple[Level, ...]
    memory_bytes: int
    launch_seconds: float
    inside: Link
    between: Link
    workers_per_node: int
    share: float
    source: str

    @property
    def memory(self) -> Level:
        """The last level."""
        return self.levels[-1]

    def level_of(self, working_set: float) -> Level:
        """The fastest level that holds so many bytes."""
        return next((level for level in self.levels if working_set <= level.capacity), self.memory)

    def link(self, workers: int) -> Link:
        """The slowest link that a collective of so many workers uses."""
        return self.inside if workers <= self.workers_per_node else self.between

    def with_share(self, share: float) -> Machine:
        """The same machine whose matrix products reach another share of the data sheet."""
        gemm = {dtype: rate * share / self.share for dtype, rate in self.gemm.items()}
        source = self.source.replace(f"{self.share:.0%} of", f"{share:.0%} of")
        return replace(self, gemm=gemm, share=share, source=source)

    def with_split_products(self) -> Machine:
        """This machine where products of float32 are made of three of bfloat16."""
        rate = self.gemm["bfloat16"] / _SPLIT_COST
        return replace(self, gemm={**self.gemm, "float32": rate})


# Three products, but as one of three times the depth, at about 1.5 times the rate: a fit,
# see docs/estimate.md.
_SPLIT_COST = 2.0
# From here on split products are never slower than products of float32, whatever the rows and their
# logits are (2 cores with AMX; docs/LOG.md, 2026-11-21).
_SPLIT_CLASSES, _SPLIT_FEATURES = 2**15, 64


def split_pays(machine: Machine, num_classes: int, embedding_dim: int) -> bool:
    """Whether the native kernels make products of float32 of three of bfloat16 by themselves.

    Args:
        machine: its rates.
        num_classes: of a worker.
        embedding_dim: D.
    """
    if machine.device != "cpu" or machine.gemm["bfloat16"] <= 3 * machine.gemm["float32"]:
        return False
    return num_classes >= _SPLIT_CLASSES and embedding_dim >= _SPLIT_FEATURES


def _gpu(
    name: str,
    tensor: float,
    plain: float,
    share: float,
    bandwidth: float,
    reached: float,
    sms: int,
    clock: float,
    cache_mebibytes: float,
    memory_gibibytes: float,
    nvlink: float,
    network: float,
) -> Machine:
    """A GPU from its data sheet.

    Args:
        name: of the machine.
        tensor: dense bfloat16 FLOP/s of the data sheet.
        plain: float32 FLOP/s outside tensor cores: PyTorch does not use TF32 unless told to.
        share: of these that large matrix products reach.
        bandwidth: bytes/s of the memory, data sheet.
        reached: share of it that streaming reaches.
        sms: multiprocessors, each with 16 special-function results a clock.
        clock: Hz, the boost clock.
        cache_mebibytes: L2.
        memory_gibibytes: what CUDA reports.
        nvlink: bytes/s one way.
        network: bytes/s one way and GPU.
    """
    cache = int(cache_mebibytes * 2**20)
    stream = bandwidth * reached
    # No vendor states L2 bandwidths; microbenchmarks of A100 and H100 find 2 to 3 times the
    # memory's. Two is assumed.
    levels = (Level(cache, 2 * stream, 2 * stream), Level(float("inf"), stream, stream))
    return Machine(
        name=name,
        device="cuda",
        gemm={"bfloat16": tensor * share, "float32": plain * share},
        exponentials=16.0 * sms * clock,
        roundings=2 * stream / 6,
        fresh=stream,
        cache_bytes=cache,
        cores=1,
        levels=levels,
        memory_bytes=int(memory_gibibytes * GIBIBYTE),
        launch_seconds=4e-6,
        inside=Link(nvlink, 10e-6),
        between=Link(network, 20e-6),
        workers_per_node=8,
        share=share,
        source=f"data sheet; {share:.0%} of its FLOP/s and {reached:.0%} of its bandwidth assumed",
    )


# Dense rates: NVIDIA's data sheets print twice as much "with sparsity". SXM modules, and one
# network adapter a GPU, as in DGX and HGX. Shares: large bfloat16 products reach about 790 of 989
# TFLOP/s on Hopper (published: 690 to 790 per GPU, Liger's and quack's kernels), and streams 4.3 of
# 4.8 TB/s; the same shares are assumed of the others. `--share` of `dist-dml estimate` replaces it.
_SHARE, _REACHED = 0.80, 0.90
DECLARED: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        # H200 data sheet: bf16 989 TFLOP/s, fp32 67, 4.8 TB/s, NVLink 900 GB/s both ways; 132 SMs;
        # 141 GB, of which CUDA reports 139 GiB; L2 50 MB (GH100 white paper). NDR 400 Gb/s.
        _gpu("h200", 989e12, 67e12, _SHARE, 4.8e12, _REACHED, 132, 1.755e9, 48, 139, 450e9, 50e9),
        # H100 SXM data sheet: as H200 but 80 GB at 3.35 TB/s.
        _gpu("h100", 989e12, 67e12, _SHARE, 3.35e12, _REACHED, 132, 1.755e9, 48, 79, 450e9, 50e9),
        # A100 80 GB data sheet: bf16 312 TFLOP/s, fp32 19.5, 2.039 TB/s, NVLink 600 GB/s; 108 SMs
        # at 1.41 GHz, L2 40 MB. HDR 200 Gb/s.
        _gpu("a100", 312e12, 19.5e12, _SHARE, 2.039e12, _REACHED, 108, 1.41e9, 40, 79, 300e9, 25e9),
        # HGX B200 data sheet: bf16 2250 TFLOP/s, fp32 80, 8 TB/s, 180 GB, NVLink 1.8 TB/s; 148 SMs,
        # L2 126 MB, 1.85 GHz as published by reviewers, not by the data sheet. NDR 400 Gb/s.
        _gpu("b200", 2250e12, 80e12, _SHARE, 8e12, _REACHED, 148, 1.85e9, 120, 166, 900e9, 50e9),
        # V100 SXM2 32 GB data sheet: fp32 15.7 TFLOP/s and no bfloat16, which runs as float32; 900
        # GB/s, NVLink 300 GB/s; 80 SMs at 1.53 GHz, L2 6 MB. EDR 100 Gb/s.
        _gpu("v100", 15.7e12, 15.7e12, _SHARE, 0.9e12, _REACHED, 80, 1.53e9, 6, 31, 150e9, 12.5e9),
        # Sixteen server cores with AVX2 at 3 GHz: 32 FLOP a clock, of which 70%; bfloat16 without
        # units of its own runs at half of that. An exponential takes about 10 instructions on 8
        # lanes at two a clock. Eight memory channels shared with the other half of the socket.
        Machine(
            name="cpu",
            device="cpu",
            gemm={"float32": 16 * 3e9 * 32 * 0.7, "bfloat16": 16 * 3e9 * 32 * 0.35},
            exponentials=16 * 3e9 * 8 * 2 / 10,
            roundings=16 * 1.5e9,  # PyTorch's copies between the two were this slow on 2 CPUs.
            fresh=16 * 2.3e9,  # Measured on one core of a virtual machine, 2026-11.
            cache_bytes=2**20,
            cores=16,
            levels=(
                Level(16 * 2**20, 800e9, 800e9),
                Level(32 * 2**20, 400e9, 400e9),
                Level(float("inf"), 100e9, 100e9),
            ),
            memory_bytes=64 * GIBIBYTE,
            launch_seconds=4e-6,
            inside=Link(5e9, 50e-6),
            between=Link(3e9, 100e-6),  # 25 Gb/s Ethernet.
            workers_per_node=2,
            share=0.7,
            source="16 cores with AVX2 at 3 GHz; 70% of their FLOP/s assumed",
        ),
    )
}


def find_machine(name: str) -> Machine:
    """The declared machine of that name.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in DECLARED:
        near = difflib.get_close_matches(name, DECLARED, n=1)
        known = f"did you mean {near[0]}?" if near else f"use {', '.join((*DECLARED, 'measured'))}"
        raise UsageError(f"--machine={name} is unknown; {known}")
    return DECLARED[name]


def known_machine(device: torch.device, threads: int) -> Machine:
    """This machine as far as a training may ask: sizes of caches and memory are its own.

    Rates are declared ones, those of the GPU's name or of `threads` generic cores; nothing is
    timed, so that every worker and every run chooses the same sweeps and tiles.

    Args:
        device: of the class weights.
        threads: CPU threads of this worker.
    """
    if device.type != "cuda":
        cpu = _of_cores(DECLARED["cpu"], threads)
        return replace(cpu, memory_bytes=_host_memory())
    facts = torch.cuda.get_device_properties(device)
    named = (m for name, m in DECLARED.items() if name in facts.name.lower())
    machine = next(named, DECLARED["a100"])
    cache = int(getattr(facts, "L2_cache_size", 0)) or machine.cache_bytes
    first = replace(machine.levels[0], capacity=cache)
    return replace(
        machine,
        cache_bytes=cache,
        levels=(first, *machine.levels[1:]),
        memory_bytes=facts.total_memory,
    )


def _of_cores(machine: Machine, cores: int) -> Machine:
    """A generic CPU with so many cores, and this processor's caches and bfloat16 units."""
    factor = cores / machine.cores
    near, far = core_cache_bytes(2), core_cache_bytes(3)
    flags = cpu_flags()
    plain = machine.gemm["float32"] * factor * (2 if "avx512f" in flags else 1)
    # Thin products reach a quarter of what AMX's tiles do beyond AVX-512 (16 times).
    gains = {"amx_bf16": 4.0, "avx512_bf16": 1.5}
    gain = next((gain for flag, gain in gains.items() if flag in flags), 0.5)
    single = {"float32": plain, "bfloat16": plain * gain}
    speeds = [(level.read * factor, level.update * factor) for level in machine.levels]
    sizes = (near * cores, max(far, near * cores), float("inf"))
    levels = tuple(Level(size, *speed) for size, speed in zip(sizes, speeds, strict=True))
    return replace(
        machine,
        gemm=single,
        exponentials=machine.exponentials * factor,
        roundings=machine.roundings * factor,
        fresh=machine.fresh * factor,
        cache_bytes=near,
        cores=cores,
        levels=levels,
    )


def core_cache_bytes(level: int) -> int:
    """Bytes of a core's L2, or of the L3 that cores share; usual sizes where the system is silent.

    Args:
        level: 2 or 3.
    """
    usual = {2: 2**20, 3: 32 * 2**20}[level]
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((folder / "level").read_text()) == level:
                return int((folder / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue  # Another form of the file, or none: the next source.
    try:
        # glibc's numbers of _SC_LEVEL2_CACHE_SIZE and _SC_LEVEL3_CACHE_SIZE; Python has no names.
        found = os.sysconf({2: 194, 3: 197}[level]) if platform.libc_ver()[0] == "glibc" else 0
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else usual


def cpu_flags() -> frozenset[str]:
    """The processor's features, as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(next((x for x in text.splitlines() if x.startswith("flags")), "").split())


def _host_memory() -> int:
    import psutil

    total = psutil.virtual_memory().total
    return min(total, allowance().memory_bytes or total)
