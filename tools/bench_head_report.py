"""What `bench_head` prints and writes: the machine, tables, rows of JSON.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_head_compare import RATES, Comparison, dtype_of
from bench_head_measure import Spread
from bench_head_peers import PEERS, SAMPLED
from bench_head_scaling import Scaling, Workers
from bench_head_variants import MOMENTUM, TILE_MEBIBYTES
from bench_head_verdicts import Verdict

# What decides about the rates of the processors that this was written for.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, threads, versions, load and date."""
    fields = _processor()
    found: dict[str, Any] = {
        "processor": fields.get("model name", platform.machine()),
        "flags": [flag for flag in FLAGS if flag in fields.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> dict[str, str]:
    """Linux's first processor, empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in first)
    return {name.strip(): value.strip() for name, _, value in pairs}


def has_bf16_units(found: dict[str, Any]) -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    return bool({"amx_bf16", "avx512_bf16"} & set(found["flags"]))


def machine_line(found: dict[str, Any]) -> str:
    """In one line."""
    parts = [found["processor"], f"{found['cores']} cores, {found['threads']} threads"]
    parts += [found["gpu"]] if "gpu" in found else []
    parts += [" ".join(found["flags"]), f"torch {found['torch']}", found["date"]]
    load = [] if found["load"] is None else [f"load {found['load']:.1f} at the start"]
    return "; ".join(part for part in (*parts, *load) if part)


def load_warning(found: dict[str, Any]) -> str:
    """What to say where others use the machine; empty where it is quiet or unknown."""
    load = found["load"]
    if load is None or load < 0.25 * (found["cores"] or 1):
        return ""
    return (
        f"WARNING: load {load:.1f} on {found['cores']} cores at the start: other processes "
        "compete, and hurt steps of many small parallel pieces most. Ratios are not to be trusted."
    )


def rates_line(comparison: Comparison) -> str:
    """The machine's rates, as medians of what was measured between the variants."""
    unit = {"float32": "GFLOP/s", "bfloat16": "GFLOP/s", "exponentials": "G/s"}
    texts = []
    for kind in RATES:
        value = 1e-9 / Spread.of(v for v in comparison.rates[kind] if v is not None).median
        shape = comparison.work[kind].get("best_shape")
        where = "" if shape is None else f" at {'x'.join(map(str, shape))}"
        texts.append(f"{kind} {value:,.3g} {unit[kind]}{where}")
    bounds = (
        f"{dtype} {Spread.of(v for v in comparison.bounds(dtype) if v is not None).median:.3f} s"
        for dtype in ("float32", "IEEE float32", "bfloat16")
    )
    return f"rates: {', '.join(texts)}; bound: {', '.join(bounds)}"


def table(comparison: Comparison) -> str:
    """One comparison as a Markdown table."""
    fastest = comparison.fastest_peer()
    update = "fused" if comparison.fused else "default"
    lines = [
        f"{comparison.size} {comparison.device.type}, SGD momentum {MOMENTUM} (peers: the faster "
        f"of PyTorch's, {update}), tiles within "
        f"{TILE_MEBIBYTES[comparison.device.type]:g} MiB",
        rates_line(comparison),
        f"fastest peer: {fastest}",
        "",
        "| variant | ms a step (quartiles) | times | x fastest peer | x PFC 0.1 | over bound "
        "| GEMM share | extra MiB | error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, values in comparison.times.items():
        seconds = comparison.seconds(name)
        share = comparison.gemm_share(name).median
        extra = comparison.extra.get(name)
        errors = comparison.errors.get(name)
        cells = [
            name,
            f"{seconds.median * 1e3:.4g} ({seconds.low * 1e3:.4g} to {seconds.high * 1e3:.4g})",
            str(sum(value is not None for value in values)),
            _ratio(comparison, fastest, name),
            _ratio(comparison, SAMPLED, name),
            f"{comparison.over_bound(name).median:.2f}",
            f"{share:.0%}",
            "-" if extra is None else f"{extra / 2**20:,.0f}",
            "-" if errors is None else f"{max(errors.values()):.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    chosen = {name: what for name, what in comparison.runs.items() if what and "dist_dml," in name}
    lines += ["", *(f"{name} runs {what}" for name, what in chosen.items())] if chosen else []
    lines += [f"\n{name}: not measured: {why}" for name, why in comparison.refused.items()]
    return "\n".join(lines)


def _ratio(comparison: Comparison, other: str | None, name: str) -> str:
    """How many times faster than `other`."""
    if other is None or other not in comparison.times:
        return "-"
    return f"{comparison.over(other, name).median:.2f}"


def rows_of(comparison: Comparison, where: dict[str, Any]) -> list[dict[str, Any]]:
    """One JSON object a variant."""
    fastest = comparison.fastest_peer()
    found = []
    for name, values in comparison.times.items():
        seconds = comparison.seconds(name)
        errors = comparison.errors.get(name)
        ratios = {"bound": comparison.over_bound(name)}
        for key, other in (("fastest_peer", fastest), ("partial_fc_0.1", SAMPLED)):
            if other is not None and other in comparison.times:
                ratios[key] = comparison.over(name, other)
        found.append(
            {
                "name": "head",
                "variant": name,
                "kind": "peer" if name in PEERS else "project",
                "config": asdict(comparison.size)
                | {
                    "dtype": dtype_of(name),
                    "device": comparison.device.type,
                    "torch": torch.__version__,
                    "repeats": sum(value is not None for value in values),
                    "runs": comparison.runs[name],
                    "fused_sgd": comparison.fused,
                    "tile_mebibytes": TILE_MEBIBYTES[comparison.device.type],
                },
                "seconds": values,
                "seconds_median": seconds.median,
                "seconds_spread": seconds.high - seconds.low,
                "fastest_peer": fastest,
                "time_over": {key: asdict(value) for key, value in ratios.items()},
                "gemm_share": asdict(comparison.gemm_share(name)),
                "extra_bytes": comparison.extra.get(name),
                "errors": errors,
                "error": None if errors is None else max(errors.values()),
                "machine": machine_line(where),
                "date": where["date"],
            }
        )
    return found


def rates_of(comparison: Comparison) -> dict[str, Any]:
    """The machine's rates of a comparison, for JSON."""
    found: dict[str, Any] = {"config": asdict(comparison.size), "refused": comparison.refused}
    for kind in RATES:
        values = comparison.rates[kind]
        found[kind] = comparison.work[kind] | {"seconds_of_one": values}
    return found


def scaling_table(scaling: Sequence[Scaling]) -> str:
    """Time per class and extra memory over C."""
    lines = [
        "| variant | C | ns a class (quartiles) | extra MiB |",
        "|---|---:|---:|---:|",
    ]
    for one in scaling:
        for size, spread, extra in zip(one.sizes, one.per_class(), one.extra, strict=True):
            low, high = spread.low * 1e9, spread.high * 1e9
            memory = "-" if extra is None else f"{extra / 2**20:.0f}"
            lines.append(
                f"| {one.name} | {size.num_classes:,} "
                f"| {spread.median * 1e9:.0f} ({low:.0f} to {high:.0f}) | {memory} |"
            )
    return "\n".join(lines)


def workers_table(workers: Sequence[Workers]) -> str:
    """One worker against several."""
    lines = [
        "| variant | 1 worker, ms | workers x 1 thread, ms | ratio (quartiles) |",
        "|---|---:|---:|---:|",
    ]
    for one in workers:
        ratio = one.ratio()
        first, many = Spread.of(one.one).median * 1e3, Spread.of(one.many).median * 1e3
        lines.append(
            f"| {one.name}, {one.size} | {first:.4g} | {one.num_workers}: {many:.4g} "
            f"| {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
        )
    return "\n".join(lines)


def verdict_lines(verdicts: Sequence[Verdict]) -> str:
    """All verdicts, one a line."""
    return "\n".join(verdict.line() for verdict in verdicts)


def verdict_objects(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts]
