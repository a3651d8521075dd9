"""How a training step grows with the number of workers: measured, and as the cost model says.

    python tools/bench_scaling.py --out runs/scaling                      1, 2, 4 workers: 5 minutes
    python tools/bench_scaling.py --out runs/scaling --quick              small, to see it work
    python tools/bench_scaling.py --out runs/scaling --workers 1 2 --mlflow

Each worker is a process of its own with its own threads; they meet over gloo on this machine. Three
ways to grow: `strong` (classes and batch fixed), `weak` (classes and batch grow with the workers)
and `weak_classes` (classes grow, the batch does not). Crews of different sizes take turns. Beside
each figure stands what `dist-dml estimate` predicts from rates that are measured in the run. Bytes
on links are counted at the process group and at the sockets. More workers than cores share them.

A point that --out holds is not measured again. docs/scaling.md says how to read the table.

Dimensions: W workers, C classes, D features, R rows of the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Run by path: this folder holds the other modules of the benchmark.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from bench_categories_ledger import Ledger, point, summary
from bench_categories_tracking import Benchmark, Point, Record, publish
from bench_head_measure import clock, report_progress
from bench_head_report import load_warning, machine, machine_line
from bench_scaling_predict import measured_embedder, measured_machine, predict
from bench_scaling_report import TITLES, draw, table
from bench_scaling_worker import Crew, Size, config_of, work

from dist_dml.errors import RunError, UsageError
from dist_dml.whole_files import write_text

MODES = tuple(TITLES)


def sizes_of(arguments: argparse.Namespace, mode: str) -> list[Size]:
    """The points of a mode, by ascending W."""
    found = []
    for workers in sorted(arguments.workers):
        classes = workers if mode != "strong" else 1
        rows = workers if mode == "weak" else 1
        found.append(
            Size(
                workers,
                arguments.classes * classes,
                arguments.rows * rows,
                arguments.dim,
                arguments.threads,
                arguments.image,
            )
        )
    return found


def point_of(mode: str, size: Size) -> dict[str, Any]:
    """The row of a point without figures."""
    return point("scaling", mode, mode, asdict(size))


def measure_mode(arguments: argparse.Namespace, mode: str, ledger: Ledger, where: str) -> None:
    """The missing points of a mode, in turns."""
    missing = [
        size
        for size in sizes_of(arguments, mode)
        if not ledger.has(point_of(mode, size)["key"], arguments.retry)
    ]
    report_progress(f"  {mode}: {len(missing)} points to measure")
    if not missing:
        return
    try:
        found = _turns(missing, arguments.repeats, mode)
    except RunError as error:
        for size in missing:
            ledger.add(point_of(mode, size) | {"error": str(error), "machine": where})
        return
    # The crews are gone: the rates are those of a worker that has its cores to itself.
    embedder = measured_embedder(missing[0])
    for size, (times, links) in zip(missing, found, strict=True):
        told = predict(size, measured_machine(size), embedder)
        row = point_of(mode, size) | summary([one["whole"] for one in times])
        for prefix, name in (("head_", "head"), ("head_cpu_", "head_cpu"), ("cpu_", "whole_cpu")):
            own = summary([one[name] for one in times])
            row |= {f"{prefix}{key}": value for key, value in own.items()}
        row |= {
            "seconds": [one["whole"] for one in times],
            "head_seconds": [one["head"] for one in times],
            "predicted": told,
            "links": links,
            "machine": where,
        }
        ledger.add(row)


def _turns(
    sizes: Sequence[Size], repeats: int, mode: str
) -> list[tuple[list[dict[str, float]], dict[str, Any]]]:
    """Times and links of each size."""
    with ExitStack() as stack:
        crews = [stack.enter_context(Crew(size)) for size in sizes]
        times: list[list[dict[str, float]]] = [[] for _ in crews]
        started = time.perf_counter()
        for turn in range(repeats):
            order = [(turn + number) % len(crews) for number in range(len(crews))]
            for number in order:
                times[number].append(crews[number].turn())
            spent = time.perf_counter() - started
            left = spent / (turn + 1) * (repeats - turn - 1)
            report_progress(
                f"    {mode}: turn {turn + 1} of {repeats} after {clock(spent)}, about "
                f"{clock(left)} left"
            )
        return [(own, links_of(crew.links)) for own, crew in zip(times, crews, strict=True)]


def links_of(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worker that receives most: bytes of head and step, and of the step by collective."""
    found: dict[str, Any] = {}
    for kind, name in (("head", "head"), ("whole", "step")):
        sums = [sum(answer[kind]["received"].values()) for answer in answers]
        sockets = [answer[kind]["socket"] for answer in answers]
        found[f"{name}_group"] = max(sums)
        found[f"{name}_socket"] = None if None in sockets else max(sockets)
    found["by_collective"] = answers[0]["whole"]["received"]
    return found


def asked_rows(arguments: argparse.Namespace, ledger: Ledger) -> list[dict[str, Any]]:
    """The rows of what is asked for."""
    keys = [
        point_of(mode, size)["key"]
        for mode in arguments.modes
        for size in sizes_of(arguments, mode)
    ]
    return [ledger.rows[key] for key in keys if key in ledger.rows]


def benchmark_of(
    arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], files: Sequence[Path]
) -> Benchmark:
    """The rows as runs of MLflow."""
    curves: dict[int, dict[str, float]] = {}
    points = []
    for row in rows:
        workers, mode = row["config"]["num_workers"], row["variant"]
        tags = {"mode": mode, "num_workers": str(workers)}
        tags |= {"num_classes": str(row["config"]["num_classes"])}
        records, seconds = [], 0.0
        if not row["error"]:
            told, links = row["predicted"], row["links"]
            facts = {
                "predicted_head_seconds": told["head_seconds"],
                "predicted_step_seconds": told["step_seconds"],
                "link_kibibytes": links["step_group"] / 1024,
                "num_workers": float(workers),
            }
            for turn, (whole, head) in enumerate(
                zip(row["seconds"], row["head_seconds"], strict=True)
            ):
                seconds += whole
                values = {"step_seconds": whole, "head_seconds": head}
                values |= facts if turn == 0 else {}
                records.append(Record(turn + 1, 0, seconds, values))
            curves.setdefault(workers, {}).update(
                {
                    f"step_seconds/{mode}": row["seconds_median"],
                    f"predicted_step_seconds/{mode}": told["step_seconds"],
                    f"head_seconds/{mode}": row["head_seconds_median"],
                    f"predicted_head_seconds/{mode}": told["head_seconds"],
                }
            )
        config = config_of(Size(**row["config"]))
        points.append(Point(f"{mode}-{workers}", tags, config, records, failed=bool(row["error"])))
    whole = [Record(workers, 0, 0.0, values) for workers, values in sorted(curves.items())]
    return Benchmark("scaling", arguments.out, {"benchmark": "scaling"}, points, whole, files)


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing, print the table, write table, rows and figure."""
    ledger = Ledger(arguments.out)
    found = machine(torch.device("cpu"))
    where = machine_line(found | {"threads": arguments.threads})
    print(where, load_warning(found), sep="\n", flush=True)
    for mode in arguments.modes:
        measure_mode(arguments, mode, ledger, where)
    rows = asked_rows(arguments, ledger)
    text = table(rows)
    print(text)
    files = [arguments.out / "scaling.md", arguments.out / "scaling.json"]
    write_text(files[0], text + "\n")
    write_text(files[1], json.dumps(rows, indent=1) + "\n")
    if any(not row["error"] for row in rows):
        figure = (arguments.figures or arguments.out) / "scaling.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, figure)
        files.append(figure)
    report_progress(f"wrote {', '.join(map(str, files))}")
    if arguments.mlflow is not None:
        place = publish(benchmark_of(arguments, rows, files), arguments.mlflow)
        report_progress(f"in MLflow: {place}")
    return 0 if rows and not any(row["error"] for row in rows) else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, help="folder of ledger, table and figure")
    found.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], metavar="W")
    found.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    found.add_argument("--classes", type=int, default=200_000, help="C of one worker (200,000)")
    found.add_argument("--rows", type=int, default=128, help="R of one worker (128)")
    found.add_argument("--dim", type=int, default=128, help="D (128)")
    found.add_argument("--image", type=int, default=32, help="pixels of a side (32)")
    found.add_argument("--threads", type=int, default=1, help="of a worker (1)")
    found.add_argument("--repeats", type=int, default=9, help="turns (9)")
    found.add_argument("--figures", type=Path, metavar="FOLDER", help="instead of --out")
    found.add_argument("--retry", action="store_true", help="measure failed points again")
    found.add_argument("--quick", action="store_true", help="C = 5,000 and 3 turns")
    found.add_argument(
        "--mlflow", nargs="?", const="", metavar="URI", help="also to MLflow (sqlite in --out)"
    )
    found.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. Exit codes: 0 done, 1 failed, 2 bad usage, 130 Ctrl-C."""
    found = parser()
    arguments = found.parse_args(argv)
    if arguments.child:
        return work(arguments.child)
    if arguments.out is None:
        found.error("--out: give the folder of the benchmark; a later call goes on there")
    for name in ("classes", "rows", "dim", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            found.error(f"--{name}={getattr(arguments, name)}: must be 1 or more")
    if min(arguments.workers) < 1 or max(arguments.workers) > arguments.rows:
        found.error(f"--workers {arguments.workers}: give 1 to --rows={arguments.rows}")
    if arguments.quick:
        arguments.classes, arguments.repeats = 5_000, min(arguments.repeats, 3)
    if max(arguments.workers) * arguments.threads > (os.cpu_count() or 1):
        report_progress("more threads than cores in some crews: they share them")
    try:
        return run(arguments)
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
