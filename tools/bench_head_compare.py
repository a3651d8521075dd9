"""One comparison of `bench_head`: all variants at one size, in one memory, in turns.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_head_measure import (
    Spread,
    Times,
    available_bytes,
    errors_of,
    extra_bytes,
    extra_bytes_in_own_process,
    needed_bytes,
    paired,
    report_progress,
    step_of,
    take_turns,
    timed,
)
from bench_head_peers import PEERS, fused_is_faster, peer_heads
from bench_head_rates import bound_seconds, rate_measures
from bench_head_variants import Head, Size, Variant, batch, every_variant, project_head
from torch import nn

from dist_dml.errors import RunError, UsageError

RATES = ("float32", "bfloat16", "exponentials")


@dataclass
class Comparison:
    """What was measured at one size.

    Attributes:
        times: seconds of a step by variant and repetition.
        rates: seconds of one operation (or exponential) by kind and repetition.
        work: what was timed for `rates`.
        extra: bytes of a step beyond weights and state.
        errors: of loss, rows' and weights' gradient against float64.
        refused: why a variant was not measured.
        runs: which backend, sweep and tiles a variant chose.
        fused: whether the peers' SGD was the fused one.
    """

    size: Size
    device: torch.device
    times: Times
    rates: Times
    work: dict[str, dict[str, Any]]
    fused: bool
    extra: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> Spread:
        """Of a step."""
        return Spread.of(value for value in self.times[name] if value is not None)

    def over(self, name: str, other: str) -> Spread:
        """How many times as long `name` takes as `other`."""
        return paired(self.times[name], self.times[other])

    def over_bound(self, name: str) -> Spread:
        """How many times as long `name` takes as the machine's rates allow."""
        return paired(self.times[name], self.bounds(dtype_of(name)))

    def bounds(self, dtype: str) -> list[float | None]:
        """The bound of each repetition at its own rates."""
        pairs = zip(self.gemm_seconds(dtype), self.rates["exponentials"], strict=True)
        return [
            None if gemm is None or exponential is None
            else bound_seconds(self.size, gemm, exponential)
            for gemm, exponential in pairs
        ]  # fmt: skip

    def gemm_seconds(self, dtype: str) -> list[float | None]:
        """Seconds of one operation in each repetition; split operands take three products.

        `float32` of this project is the faster of both ways on a CPU.
        """
        if dtype in ("bfloat16", "IEEE float32"):
            return self.rates[dtype.removeprefix("IEEE ")]
        single = self.rates["float32"]
        if self.device.type != "cpu":
            return single
        pairs = zip(single, self.rates["bfloat16"], strict=True)
        return [one if one is None or half is None else min(one, 3 * half) for one, half in pairs]

    def gemm_share(self, name: str) -> Spread:
        """Share of the GEMM rate, counting the 6RCD operations that a step cannot do without."""
        size, share = self.size, share_of(name)
        operations = 6.0 * size.rows * size.num_classes * size.embedding_dim * share
        ideal = [None if s is None else s * operations for s in self.gemm_seconds(dtype_of(name))]
        return paired(ideal, self.times[name])

    def fastest_peer(self) -> str | None:
        """The peer that verdicts compare with: exact, float32, smallest median."""
        names = [
            name
            for name, peer in PEERS.items()
            if name in self.times and peer.exact and peer.dtype == "float32"
        ]
        return min(names, key=lambda name: self.seconds(name).median, default=None)


def share_of(name: str) -> float:
    """Of the classes that take part."""
    if name in PEERS:
        return 1.0 if PEERS[name].exact else 0.1
    return every_variant()[name].sample


def dtype_of(name: str) -> str:
    """Of a variant's matrix products, as `gemm_seconds` knows it."""
    found = PEERS[name].dtype if name in PEERS else every_variant()[name].operand
    ieee = found == "float32_ieee" or (name in PEERS and found == "float32")
    return "IEEE float32" if ieee else found


def compare(
    names: Sequence[str], size: Size, device: torch.device, repeats: int, rate_seconds: float = 0.2
) -> Comparison:
    """Time all variants in turns.

    Raises:
        RunError: if the memory does not suffice.
    """
    needed, available = needed_bytes(size, names), available_bytes(device)
    if needed > available and device.type == "cpu":  # A GPU says so by itself, variant by variant.
        raise RunError(
            f"{size} with {len(names)} variants needs about {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free; choose fewer --classes or --only small peers"
        )
    heads, refused, fused = shared_heads(names, size, device)
    rows, labels = batch(size, device)
    measures = {}
    for name, head in heads.items():
        one = timed(step_of(head, rows, labels), device)
        reason = _refusal(one)
        if reason is None:
            measures[name] = one
        else:
            refused[name] = reason
    rates, work = rate_measures(size, device, rate_seconds)
    everything = measures | {f"rate of {kind}": rates[kind] for kind in RATES}
    times = take_turns(everything, repeats, str(size))
    rate_times = {kind: times.pop(f"rate of {kind}") for kind in RATES}
    runs = {name: heads[name].runs() for name in measures}
    return Comparison(size, device, times, rate_times, work, fused, refused=refused, runs=runs)


def shared_heads(
    names: Sequence[str], size: Size, device: torch.device
) -> tuple[dict[str, Head], dict[str, str], bool]:
    """Heads over one set of weights and of state for each optimizer and dtype.

    Returns:
        The heads by name, why others are missing, and whether the peers' SGD is the fused one.
    """
    owners: dict[tuple[str, str], Head] = {}
    heads: dict[str, Head] = {}
    refused: dict[str, str] = {}
    for name in (name for name in names if name not in PEERS):
        variant = every_variant()[name]
        kind = (variant.optimizer, variant.weight_dtype)
        try:
            heads[name] = project_head(variant, size, device, owner=owners.get(kind))
        except UsageError as error:
            refused[name] = str(error)
            continue
        owners.setdefault(kind, heads[name])
    peers = [name for name in names if name in PEERS]
    if not peers:
        return heads, refused, False
    kind = (Variant().optimizer, Variant().weight_dtype)
    if kind in owners:
        owner = owners[kind]
        weight = nn.Parameter(owner.weight.detach())
        momentum = owner.state().get("weight|momentum_buffer")
    else:
        weight = nn.Parameter(torch.randn(size.num_classes, size.embedding_dim, device=device))
        momentum = None
    fused = fused_is_faster(weight)
    heads = peer_heads(peers, weight, fused, momentum) | heads
    return heads, refused, fused


def _refusal(one: Any) -> str | None:
    """Why a variant cannot do a step here, or None; the step also warms it up."""
    try:
        one()
    except UsageError as error:
        return str(error)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    return None


def measure_memory(comparison: Comparison, together: bool) -> None:
    """Fill `comparison.extra`.

    Args:
        together: on a CPU, all variants in one process instead of one each: faster, and off by what
            the allocator keeps.
    """
    names = list(comparison.times)
    if comparison.device.type == "cuda":
        device = comparison.device
        comparison.extra = {name: extra_bytes(name, comparison.size, device) for name in names}
        return
    for group in [names] if together else [[name] for name in names]:
        for name, extra in extra_bytes_in_own_process(group, [comparison.size]).items():
            comparison.extra[name] = extra[0]
            report_progress(f"  memory: {name} takes {mebibytes(extra[0])}")


def measure_errors(comparison: Comparison) -> None:
    """Fill `comparison.errors`."""
    for name in comparison.times:
        comparison.errors[name] = errors_of(name, comparison.size, comparison.device)
    report_progress("  errors: done")


def mebibytes(count: int | None) -> str:
    """Of bytes."""
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"
