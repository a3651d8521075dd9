"""Which goals `bench_head` finds reached: arithmetic on what was measured, one line a goal.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench_head_compare import Comparison
from bench_head_measure import Spread
from bench_head_peers import SAMPLED
from bench_head_scaling import Scaling, Workers
from bench_head_variants import COSFACE, DEFAULTS, IEEE, Variant

MEBIBYTE = 2**20
# Extra memory of so few bytes apart is the same: allocators and page tables round.
MEMORY_NOISE_BYTES = 4 * MEBIBYTE


@dataclass(frozen=True)
class Verdict:
    """One goal.

    Attributes:
        asked: the ratio to reach.
        at_least: whether more is better.
        reached: the measured ratio; None where it was not measured.
        resolved: the ratio below which the goal counts as missed by far; None: there is none.
        note: what a reader must know besides, or why nothing was measured.
    """

    what: str
    configuration: str
    against: str
    asked: float
    unit: str
    at_least: bool
    reached: Spread | None
    resolved: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the median reaches what is asked; None where nothing was measured."""
        if self.reached is None:
            return None
        median = self.reached.median
        return median >= self.asked if self.at_least else median <= self.asked

    def line(self) -> str:
        """Yes or no, reached, asked, what, where, against what."""
        asked = f"asked {'>=' if self.at_least else '<='} {self.asked:g}{self.unit}"
        what = f"{self.what} | {self.configuration} | against {self.against}"
        note = f" | {self.note}" if self.note else ""
        if self.reached is None:
            return f"{'-':4}{'not measured':30} {asked:17} | {what}{note}"
        value = self.reached
        text = f"{value.median:.2f}{self.unit} ({value.low:.2f} to {value.high:.2f})"
        far = self.resolved is not None and self.at_least and value.median < self.resolved
        note += f" | and below {self.resolved:g}{self.unit}" if far else ""
        return f"{'yes' if self.holds else 'NO':4}{text:30} {asked:17} | {what}{note}"


def inverse(ratio: Spread) -> Spread:
    """Of the inverse ratios."""
    return Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def cpu_verdicts(
    comparison: Comparison | None,
    scaling: Sequence[Scaling],
    workers: Sequence[Workers],
    has_bf16_units: bool,
) -> list[Verdict]:
    """The CPU rows of the table of goals. What was not measured says so."""
    return [
        *_against_peers(comparison, has_bf16_units),
        *_memory(comparison),
        *_bounds(comparison),
        *_scaling(scaling),
        *_workers(workers),
    ]


def _configuration(comparison: Comparison | None) -> str:
    return "-" if comparison is None else f"CPU, {comparison.size}, SGD momentum"


def _faster(comparison: Comparison | None, name: str, other: str | None) -> Spread | None:
    """How many times faster `name` is."""
    if comparison is None or other is None:
        return None
    if name not in comparison.times or other not in comparison.times:
        return None
    return comparison.over(other, name)


def _against_peers(comparison: Comparison | None, has_bf16_units: bool) -> list[Verdict]:
    fastest = None if comparison is None else comparison.fastest_peer()
    where, found = _configuration(comparison), []
    no_units = "" if has_bf16_units else "this processor has no AMX or AVX-512 bf16"
    goals: tuple[tuple[Variant, float, float | None, str], ...] = (
        (DEFAULTS["float32"], 3.0, 2.5, ""),
        (IEEE, 3.0, None, "for information: every product one of float32 numbers"),
        (DEFAULTS["bfloat16"], 6.0, 4.5, no_units),
    )
    for variant, asked, resolved, note in goals:
        name = variant.name
        reached = _faster(comparison, name, fastest)
        against = f"the fastest peer, {fastest}"
        note = note if reached else "this part was left out"
        found.append(
            Verdict(f"{name} faster", where, against, asked, "x", True, reached, resolved, note)
        )
    for variant, note in (
        (COSFACE["bfloat16"], "both CosFace"),
        (DEFAULTS["bfloat16"], "cross-entropy of inner products against CosFace"),
    ):
        reached = _faster(comparison, variant.name, SAMPLED)
        note = f"{note}; {no_units}".rstrip("; ") if reached else "this part was left out"
        what = f"{variant.name}, exact, faster"
        found.append(Verdict(what, where, SAMPLED, 1.7, "x", True, reached, None, note))
    return found


def _memory(comparison: Comparison | None) -> list[Verdict]:
    found = []
    for variant in (DEFAULTS["float32"], IEEE, DEFAULTS["bfloat16"]):
        count = None if comparison is None else comparison.extra.get(variant.name)
        reached, note = None, "this part was left out"
        if comparison is not None and count is not None:
            value = count / MEBIBYTE
            fastest = comparison.fastest_peer()
            theirs = None if fastest is None else comparison.extra.get(fastest)
            reached = Spread(value, value, value)
            note = "" if theirs is None else f"{fastest}: {theirs / MEBIBYTE:,.0f} MiB"
        found.append(
            Verdict(
                f"{variant.name}, extra memory",
                _configuration(comparison),
                "weights and state alone",
                64.0,
                " MiB",
                False,
                reached,
                note=note,
            )
        )
    return found


def _bounds(comparison: Comparison | None) -> list[Verdict]:
    against = "GEMM time of 8RCD + 2RC exponentials at this run's rates"
    found = []
    for variant in (DEFAULTS["float32"], IEEE, DEFAULTS["bfloat16"]):
        measured = comparison is not None and variant.name in comparison.times
        reached = comparison.over_bound(variant.name) if comparison and measured else None
        note = "" if measured else "this part was left out"
        where = _configuration(comparison)
        what = f"{variant.name}, time over the bound"
        found.append(Verdict(what, where, against, 1.5, "x", False, reached, note=note))
    return found


def _scaling(scaling: Sequence[Scaling]) -> list[Verdict]:
    by_name = {one.name: one for one in scaling}
    found = []
    for variant in DEFAULTS.values():
        one = by_name.get(variant.name)
        where, time, memory, note = "CPU, over C", None, None, "this part was left out"
        if one is not None:
            counts = [size.num_classes for size in one.sizes]
            where = f"CPU, C from {counts[0]:,} to {counts[-1]:,}"
            time, note = one.unevenness(), ""
            memory = memory_ratio(one.extra)
        what = f"{variant.name}, time per class, largest over smallest"
        found.append(Verdict(what, where, "itself", 1.15, "x", False, time, note=note))
        if one is not None and memory is not None:
            note = ", ".join(f"{(b or 0) / MEBIBYTE:.0f}" for b in one.extra) + " MiB"
        elif one is not None:
            note = "this system does not tell"
        what = f"{variant.name}, extra memory, largest over smallest"
        found.append(Verdict(what, where, "itself", 1.15, "x", False, memory, note=note))
    return found


def memory_ratio(extra: Sequence[int | None]) -> Spread | None:
    """Largest over smallest, or 1 where they differ by less than what allocators round."""
    known = [count for count in extra if count is not None]
    if len(known) < len(extra) or not known:
        return None
    low, high = min(known), max(known)
    value = 1.0 if high - low <= MEMORY_NOISE_BYTES else high / max(low, 1)
    return Spread(value, value, value)


def _workers(workers: Sequence[Workers]) -> list[Verdict]:
    by_name = {one.name: one for one in workers}
    found = []
    for variant in DEFAULTS.values():
        one = by_name.get(variant.name)
        where = "CPU" if one is None else f"CPU, {one.size} split over {one.num_workers} workers"
        count = 2 if one is None else one.num_workers
        found.append(
            Verdict(
                f"{variant.name}, {count} workers x 1 thread, time over that of one",
                where,
                f"1 worker x {count} threads",
                1.15,
                "x",
                False,
                None if one is None else one.ratio(),
                note="this part was left out" if one is None else "",
            )
        )
    return found
