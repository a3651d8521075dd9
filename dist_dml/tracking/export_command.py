"""`dist-dml track export FOLDER ... --out FOLDER`: runs and their curves as two tables.

For whoever draws own pictures, or has no MLflow. Read from the run folders alone, so that the
tables are complete whatever a server has received.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import yaml

from dist_dml.errors import UsageError
from dist_dml.tracking import run_files
from dist_dml.tracking.mlflow_run import flatten_config
from dist_dml.tracking.recorder import read_metrics
from dist_dml.whole_files import replaced

RUNS = "runs"
METRICS = "metrics"
_SCHEMA = pyarrow.schema(
    [
        ("run_id", pyarrow.string()),
        ("name", pyarrow.string()),
        ("step", pyarrow.int64()),
        ("images_seen", pyarrow.int64()),
        ("seconds", pyarrow.float64()),
        ("value", pyarrow.float64()),
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml track export`."""
    parser.add_argument(
        "folder", type=Path, nargs="+", metavar="FOLDER", help="runs, or folders of runs"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the tables")
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet")


def run(arguments: argparse.Namespace) -> int:
    """Write `runs` and `metrics`, and say how much is in them.

    Raises:
        UsageError: there is no run, or the tables cannot be written.
    """
    folders = run_files.runs_below(arguments.folder)
    ending = arguments.format
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        points = write_metrics(folders, arguments.out / f"{METRICS}.{ending}")
        write_runs(folders, arguments.out / f"{RUNS}.{ending}")
    except OSError as error:
        raise UsageError(
            f"--out {arguments.out} cannot be written ({error.strerror}); name a folder that can"
        ) from None
    print(
        f"{len(folders)} runs: {arguments.out / RUNS}.{ending}\n"
        f"{points:,} values: {arguments.out / METRICS}.{ending}"
    )
    return 0


def write_metrics(folders: Sequence[Path], path: Path) -> int:
    """Every value of every run, a row each, in steps' order within a name. Returns the rows.

    Columns: run_id, name, step, images_seen, seconds (of training), value. One run is in memory at
    a time. Of a step that a resumed run has repeated, the last value.
    """
    rows = 0
    with ExitStack() as stack:
        stream = stack.enter_context(replaced(path))
        kind = pyarrow.csv.CSVWriter if path.suffix == ".csv" else pyarrow.parquet.ParquetWriter
        writer: Any = stack.enter_context(kind(stream, _SCHEMA))
        for number, folder in enumerate(folders, 1):
            run_id = run_files.read_json(folder / run_files.IDENTITY).get("run_id", "")
            for source in (run_files.METRICS, *run_files.system_files(folder)):
                for name, curve in sorted(read_metrics(folder, source).items()):
                    count = len(curve.step)
                    columns = [[run_id] * count, [name] * count]
                    arrays = [curve.step, curve.images_seen, curve.seconds, curve.value]
                    writer.write_table(pyarrow.table([*columns, *arrays], schema=_SCHEMA))
                    rows += count
            if sys.stderr.isatty():
                print(f"\r{number} of {len(folders)} runs", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def write_runs(folders: Sequence[Path], path: Path) -> None:
    """A row a run: what it is, how it ended, its configuration, the last value of each metric.

    Columns: folder, run_id, status, started_at (UTC), the facts of run.json, `config.KEY` as text,
    `last.NAME` as numbers. A run lacks what others have: null.
    """
    rows = [_row(folder) for folder in folders]
    names = list(dict.fromkeys(name for row in rows for name in row))
    first = [name for name in names if "." not in name]
    rest = sorted(set(names) - set(first))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in [*first, *rest]})
    with replaced(path) as stream:
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, stream)
        else:
            pyarrow.parquet.write_table(table, stream)


def _row(folder: Path) -> dict[str, Any]:
    identity = dict(run_files.read_json(folder / run_files.IDENTITY))
    started = float(identity.pop("started_at", 0.0))
    row: dict[str, Any] = {
        "folder": str(folder),
        "run_id": identity.pop("run_id", ""),
        "status": run_files.last_status(folder).get("status", ""),
        "started_at": datetime.fromtimestamp(started, UTC),
    }
    # Facts may carry any name; with a point, they would stand among the others' columns.
    row |= {key.replace(".", "_"): str(value) for key, value in sorted(identity.items())}
    config = folder / run_files.CONFIG
    if config.is_file():
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        row |= {f"config.{key}": value for key, value in flatten_config(content or {}).items()}
    curves = read_metrics(folder)
    return row | {f"last.{name}": float(curve.value[-1]) for name, curve in curves.items()}
