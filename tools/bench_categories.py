"""Time and memory of every objective over the number of categories, and time to a score.

    python tools/bench_categories.py --out runs/categories            all; aims at 40 min, 2 cores
    python tools/bench_categories.py --out runs/categories --quick    small, to see that it works
    python tools/bench_categories.py --out runs/categories --parts report --mlflow

- steps: for C = 10^2 .. 10^7 and every objective, a training step (embedder included), the head
  alone, an epoch (calculated), and memory. Each point is a process with fresh memory; processes
  take turns. Images and labels are drawn at random: the time of a step depends on neither.
- scores: real trainings to a retrieval score on classes that were never trained on: synthetic data
  of the same number of images divided into more and more categories, and glyphs.
- report: tables, figures and verdicts from the ledger, in --out.

A point that --out holds is not measured again. What does not fit the memory or the time limit of a
point is a row that says so. docs/categories.md says how to read the tables.

Dimensions: C classes, D features, R rows of a batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Run by path: this folder holds the other modules of the benchmark.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from bench_categories_child import Request
from bench_categories_figures import write_figures
from bench_categories_ledger import Ledger, key_of
from bench_categories_objectives import OBJECTIVES, step_config
from bench_categories_report import document
from bench_categories_scores import METRICS, Asked, train_to
from bench_categories_steps import measure_classes, point_of
from bench_categories_tracking import Benchmark, Point, Record, publish
from bench_head_measure import clock, report_progress
from bench_head_report import load_warning, machine, machine_line

from dist_dml.errors import RunError, UsageError
from dist_dml.whole_files import write_text

PARTS = ("steps", "scores", "report")
CATEGORIES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
SCORE_DATA = ("synthetic-100", "synthetic-1000", "synthetic-5000", "glyphs")


def requests_of(arguments: argparse.Namespace, num_classes: int) -> list[Request]:
    """The points of one number of classes."""
    sizes = (num_classes, arguments.rows, arguments.dim, arguments.threads)
    return [Request(name, *sizes) for name in arguments.objectives]


def asked_of(arguments: argparse.Namespace, data: str) -> Asked:
    """What the trainings on one data set are asked for."""
    synthetic = data.startswith("synthetic-")
    return Asked(
        data,
        arguments.score_images,
        arguments.rows,
        arguments.dim,
        arguments.threads,
        arguments.metric,
        tuple(sorted(arguments.targets if synthetic else arguments.glyph_targets)),
        arguments.score_steps,
        arguments.score_seconds,
    )


def measure_steps(arguments: argparse.Namespace, ledger: Ledger, where: str) -> None:
    """All points of `steps` that are missing."""
    each = arguments.images_per_class
    counts = sorted(arguments.categories)
    started = time.perf_counter()
    for number, count in enumerate(counts):
        missing = [
            request
            for request in requests_of(arguments, count)
            if not ledger.has(point_of(request, each)["key"], arguments.retry)
        ]
        spent = clock(time.perf_counter() - started)
        report_progress(
            f"  steps {number + 1} of {len(counts)}: C = {count:,}, {len(missing)} points to "
            f"measure, after {spent}"
        )

        def keep(row: dict[str, Any]) -> None:
            ledger.add(row | {"machine": where})
            report_progress(f"    {row['variant']}: {row['error'] or _milliseconds(row)}")

        measure_classes(missing, each, arguments.repeats, arguments.point_seconds, keep)


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{row['seconds_median'] * 1e3:.1f} ms a step"


def measure_scores(arguments: argparse.Namespace, ledger: Ledger, where: str) -> None:
    """All trainings that are missing; of the same data, one after the other."""
    jobs = [
        (asked_of(arguments, data), name)
        for data in arguments.score_data
        for name in arguments.objectives
    ]
    started, done = time.perf_counter(), 0
    for number, (asked, name) in enumerate(jobs):
        key = key_of_score(name, asked)
        if ledger.has(key, arguments.retry):
            continue
        row = train_to(name, asked, arguments.out.resolve())
        assert row["key"] == key
        ledger.add(row | {"machine": where})
        done += 1
        spent = time.perf_counter() - started
        left = spent / done * (len(jobs) - number - 1)
        said = row["error"] or (
            f"{asked.targets[-1]:g} after {row['seconds_median']:.1f} s"
            if row["seconds_median"] is not None
            else f"{row['best']:.3f} is the best within {asked.limit_steps} steps"
        )
        report_progress(
            f"  scores {number + 1} of {len(jobs)}: {name} on {asked.data}: {said}; after "
            f"{clock(spent)}, at most about {clock(left)} left"
        )


def key_of_score(name: str, asked: Asked) -> str:
    """The key of a training's row."""
    return key_of("score", name, asked.settings())


def asked_rows(arguments: argparse.Namespace, ledger: Ledger) -> list[dict[str, Any]]:
    """The rows of what is asked for, in its order: the ledger may hold more."""
    keys = [
        point_of(request, arguments.images_per_class)["key"]
        for count in sorted(arguments.categories)
        for request in requests_of(arguments, count)
    ]
    keys += [
        key_of_score(name, asked_of(arguments, data))
        for data in arguments.score_data
        for name in arguments.objectives
    ]
    return [ledger.rows[key] for key in keys if key in ledger.rows]


def write_report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> list[Path]:
    """`categories.md`, `categories.json` and the figures. Returns the files."""
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    text = document(rows, "  \n".join(machines))
    print(text)
    tables, content = arguments.out / "categories.md", arguments.out / "categories.json"
    write_text(tables, text)
    write_text(content, json.dumps(rows, indent=1) + "\n")
    return [tables, content, *write_figures(rows, arguments.figures or arguments.out)]


def benchmark_of(
    arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], files: Sequence[Path]
) -> Benchmark:
    """The rows as runs of MLflow."""
    curves: dict[int, dict[str, float]] = {}
    points = []
    for row in rows:
        one = point_in_mlflow(arguments, row)
        points.append(one)
        if row["error"] or row["kind"] != "step":
            continue
        values = curves.setdefault(row["config"]["num_classes"], {})
        for name, key in (
            ("step_seconds", "seconds_median"),
            ("head_seconds", "head_seconds_median"),
            ("epoch_seconds", "epoch_seconds"),
        ):
            values[f"{name}/{row['variant']}"] = row[key]
    whole = [Record(count, 0, 0.0, values) for count, values in sorted(curves.items())]
    tags = {"benchmark": "categories"}
    return Benchmark("categories", arguments.out, tags, points, whole, files)


def point_in_mlflow(arguments: argparse.Namespace, row: dict[str, Any]) -> Point:
    """One row: the turns of a step, or the training that it stands for."""
    config, name = row["config"], row["variant"]
    tags = {"objective": name, "family": OBJECTIVES[name].family, "kind": row["kind"]}
    if row["kind"] == "score":
        folder = arguments.out.resolve() / "runs" / f"{config['data']}-{name}-{row['key']}"
        tags |= {"data": config["data"], "target": f"{config['metric']} {config['target']:g}"}
        records = []
        if row["seconds_median"] is not None:
            last = row["curve"][-1]
            value = {"seconds_to_target": row["seconds_median"]}
            records = [Record(int(last[0]), int(last[1]), last[2], value)]
        there = folder if (folder / "config.yaml").is_file() else None
        return Point(folder.name, tags, None, records, there, bool(row["error"]))
    count, rows, dim = config["num_classes"], config["rows"], config["dim"]
    tags |= {"num_classes": str(count)}
    records, seconds, images = [], 0.0, 0
    for turn, (whole, head) in enumerate(
        zip(row.get("seconds", ()), row.get("head_seconds", ()), strict=True)
    ):
        seconds, images = seconds + whole, images + rows
        values = {"step_seconds": whole, "head_seconds": head}
        if turn + 1 == len(row["seconds"]):
            values |= {"epoch_seconds": row["epoch_seconds"], "num_classes": float(count)}
            if row["extra_bytes"] is not None:
                values["extra_mebibytes"] = row["extra_bytes"] / 2**20
        records.append(Record(turn + 1, images, seconds, values))
    asked = step_config(name, count, rows, dim, config["threads"])
    return Point(f"{name}-{count}", tags, asked, records, failed=bool(row["error"]))


def run(arguments: argparse.Namespace) -> int:
    """Measure part by part; the report comes from the ledger."""
    torch.set_num_threads(arguments.threads)
    ledger = Ledger(arguments.out)
    found = machine(torch.device("cpu"))
    where = machine_line(found)
    report_progress(where)
    if warning := load_warning(found):
        report_progress(warning)
    if "steps" in arguments.parts:
        measure_steps(arguments, ledger, where)
    if "scores" in arguments.parts:
        measure_scores(arguments, ledger, where)
    rows = asked_rows(arguments, ledger)
    if "report" in arguments.parts and rows:
        files = write_report(arguments, rows)
        report_progress(f"wrote {', '.join(map(str, files))}")
        if arguments.mlflow is not None:
            place = publish(benchmark_of(arguments, rows, files), arguments.mlflow)
            report_progress(f"in MLflow: {place}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, help="folder of ledger, trainings and report")
    found.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--objectives", nargs="+", choices=tuple(OBJECTIVES), default=[*OBJECTIVES])
    found.add_argument("--categories", nargs="+", type=int, default=list(CATEGORIES), metavar="C")
    found.add_argument("--rows", type=int, default=128, help="R (128)")
    found.add_argument("--dim", type=int, default=128, help="D (128)")
    found.add_argument("--images-per-class", type=int, default=10, help="of an epoch (10)")
    found.add_argument("--repeats", type=int, default=9, help="turns of a point (9)")
    found.add_argument(
        "--point-seconds", type=float, default=120.0, help="most that building may take (120)"
    )
    found.add_argument("--threads", type=int, default=0, help="of a process (all cores)")
    found.add_argument("--score-data", nargs="*", default=list(SCORE_DATA), metavar="NAME")
    found.add_argument("--score-images", type=int, default=10_000, help="synthetic (10,000)")
    found.add_argument("--score-steps", type=int, default=800, help="most of a training (800)")
    found.add_argument("--score-seconds", type=float, default=40.0, help="likewise (40)")
    found.add_argument("--metric", choices=METRICS, default="recall_at_1")
    found.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.65], help="synthetic")
    found.add_argument("--glyph-targets", nargs="+", type=float, default=[0.4], help="glyphs")
    found.add_argument("--figures", type=Path, metavar="FOLDER", help="instead of --out")
    found.add_argument("--retry", action="store_true", help="measure failed points again")
    found.add_argument("--quick", action="store_true", help="C up to 1,000 and short trainings")
    found.add_argument(
        "--mlflow", nargs="?", const="", metavar="URI", help="also to MLflow (sqlite in --out)"
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. Exit codes: 0 done, 1 failed, 2 bad usage, 130 Ctrl-C."""
    found = parser()
    arguments = found.parse_args(argv)
    check(found, arguments)
    try:
        return run(arguments)
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


def check(found: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, and fill in what depends on the machine."""
    if arguments.out is None:
        found.error("--out: give the folder of the benchmark; a later call goes on there")
    for name, least in (("rows", 8), ("dim", 1), ("images_per_class", 1), ("repeats", 1)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            found.error(f"--{option}={getattr(arguments, name)}: must be {least} or more")
    if arguments.rows % 4:
        found.error(f"--rows={arguments.rows}: must be a multiple of 4, the images of a class")
    if min(arguments.categories) < 2:
        found.error(f"--categories {min(arguments.categories)}: must be 2 or more")
    for data in arguments.score_data:
        kind, _, count = data.partition("-")
        if data != "glyphs" and not (kind == "synthetic" and count.isdigit() and int(count) > 1):
            found.error(
                f"--score-data {data}: give glyphs or synthetic-C, for example synthetic-1000"
            )
    arguments.threads = arguments.threads or torch.get_num_threads()
    if arguments.quick:
        arguments.categories = [count for count in arguments.categories if count <= 1000] or [100]
        arguments.score_data = arguments.score_data[:1]
        arguments.score_steps = min(arguments.score_steps, 160)
        arguments.repeats = min(arguments.repeats, 3)


if __name__ == "__main__":
    sys.exit(main())
