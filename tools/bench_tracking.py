"""What tracking costs a training: processor time and speed, with MLflow and without.

The same training runs in turns with and without the mirror to MLflow. Of each: the processor
seconds that the training's own thread spends in recording, those of the mirror's process (its
start, which is the import of MLflow, and all after it), and the images per second.

    dist-dml pack digits datasets/digits
    python tools/bench_tracking.py datasets/digits              about 10 minutes
    python tools/bench_tracking.py datasets/digits --seconds 30 --pairs 1 model.backbone=small_conv
    python tools/bench_tracking.py datasets/digits --json tracking.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_head_report import load_warning, machine, machine_line

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.01
START_SECONDS = 15.0
"""After so long the mirror has started: imports are over and the run is in MLflow."""
WATCH_SECONDS = 0.2
# The worst case is a small network: many short steps, each of which is recorded.
SETTINGS = (
    "data.image={size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
    "data.batch_size=128",
    "data.loader_processes=0",
    "training.epochs=1000000",
    "checkpoint.every_epochs=0",
    "evaluation={every_epochs: 0, nmi: false, protocols: [{name: seen, query: seen}]}",
    "checkpoint.best_metric=seen/cosine/map_at_r",
    "schedule.name=constant",
)


def main() -> int:
    """Time both in turns, print shares and the verdict. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="packed data set")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training, a run")
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    if given.seconds < 2 * START_SECONDS:
        parser.error(
            f"--seconds {given.seconds:g} is too short; give {2 * START_SECONDS:g} or more"
        )
    here = machine(torch.device("cpu"))
    print("\n".join(filter(None, (machine_line(here), load_warning(here)))), flush=True)
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(given.pairs):
        for mlflow in (number % 2 == 0, number % 2 == 1):
            runs[mlflow].append(measure(given, mlflow))
            said = "with" if mlflow else "without"
            speed = runs[mlflow][-1]["images_per_second"]
            print(f"{number + 1}/{given.pairs} {said} MLflow: {speed:,.0f} images/s", flush=True)
    row = row_of(runs, given) | here
    print(text_of(row))
    if given.json is not None:
        given.json.write_text(json.dumps(row) + "\n")
    return 0


def measure(given: argparse.Namespace, mlflow: bool) -> dict[str, float]:
    """One training: its speed, and the processor seconds of its parts."""
    with tempfile.TemporaryDirectory(prefix="bench_tracking_") as folder:
        words = [*SETTINGS, f"data.path={Path(given.data).absolute()}", f"run.root={folder}"]
        words += [f"training.max_seconds={given.seconds}", f"tracking.mlflow={str(mlflow).lower()}"]
        out = Path(folder) / "costs.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(out)]
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *words, *given.overrides], cwd=ROOT, stdout=output, stderr=output
            )
        mirror = MirrorWatch(process.pid)
        mirror.start()
        code = process.wait()
        mirror.join()
        if code:
            sys.exit(f"the training ended with {code}:\n{log.read_text()[-2000:]}")
        costs = json.loads(out.read_text())
        records = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(records[-1])
        costs["images_per_second"] = last["images_seen"] / last["seconds"]
        costs["records"] = len(records)
        return costs | mirror.seconds()


class MirrorWatch(threading.Thread):
    """Follows the processor time of a training's mirror process, as long as it lives."""

    def __init__(self, trainer: int) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self._points: list[tuple[float, float]] = []

    def run(self) -> None:
        """Until the trainer has ended."""
        while psutil.pid_exists(self._trainer):
            with contextlib.suppress(psutil.Error):
                trainer = psutil.Process(self._trainer)
                if trainer.status() == psutil.STATUS_ZOMBIE:
                    return
                for child in trainer.children():
                    if "dist_dml.tracking.mirror_process" in child.cmdline():
                        spent = child.cpu_times()
                        age = time.time() - child.create_time()
                        self._points.append((age, spent.user + spent.system))
            time.sleep(WATCH_SECONDS)

    def seconds(self) -> dict[str, float]:
        """Processor seconds of its start, and after it a second of its life; 0 without one."""
        late = [point for point in self._points if point[0] >= START_SECONDS]
        if len(late) < 2:
            return {"mirror_start": 0.0, "mirror_share": 0.0}
        (began, start), (ended, end) = late[0], late[-1]
        return {"mirror_start": start, "mirror_share": (end - start) / (ended - began)}


def child(out: Path, words: list[str]) -> int:
    """Train in this process, with a clock around each call that records."""
    sys.path.insert(0, str(ROOT))
    from dist_dml.tracking import recorder
    from dist_dml.train import main as train

    spent = {"recording": 0.0, "calls": 0.0}
    record = recorder.Recorder.record

    def timed(*arguments: Any, **named: Any) -> None:
        before = time.thread_time()
        record(*arguments, **named)
        spent["recording"] += time.thread_time() - before
        spent["calls"] += 1

    recorder.Recorder.record = timed
    started = time.monotonic(), time.process_time()
    code = train(words)
    spent["wall"] = time.monotonic() - started[0]
    spent["training"] = time.process_time() - started[1]
    out.write_text(json.dumps(spent))
    return code


def row_of(runs: dict[bool, list[dict[str, float]]], given: argparse.Namespace) -> dict[str, Any]:
    """One object of the JSON file; medians. Ratios are of runs that followed each other."""

    def median(name: str) -> float:
        return statistics.median(run[name] for run in runs[True])

    pairs = zip(runs[True], runs[False], strict=True)
    return {
        "name": "tracking",
        "config": {"data": given.data, "seconds": given.seconds, "overrides": given.overrides},
        "recording_share": statistics.median(r["recording"] / r["training"] for r in runs[True]),
        "recording_microseconds": 1e6 * median("recording") / median("calls"),
        "records_per_second": median("records") / median("wall"),
        "mirror_start_seconds": median("mirror_start"),
        "mirror_share_of_a_core": median("mirror_share"),
        "mirror_share_of_training": statistics.median(
            r["mirror_share"] * r["wall"] / r["training"] for r in runs[True]
        ),
        "speed_ratios": [one["images_per_second"] / two["images_per_second"] for one, two in pairs],
        "images_per_second": [run["images_per_second"] for run in runs[True]],
    }


def text_of(row: dict[str, Any]) -> str:
    """The row for people, with the verdict."""
    ratio = statistics.median(row["speed_ratios"])
    ratios = ", ".join(f"{value:.3f}" for value in row["speed_ratios"])
    share = row["recording_share"] + row["mirror_share_of_training"]
    return (
        f"recording: {100 * row['recording_share']:.3f}% of the training's processor seconds "
        f"({row['recording_microseconds']:.0f} us a call, {row['records_per_second']:,.0f} records "
        "a second)\n"
        f"mirror:    {row['mirror_start_seconds']:.1f} s of a core to start, then "
        f"{100 * row['mirror_share_of_a_core']:.2f}% of one: "
        f"{100 * row['mirror_share_of_training']:.2f}% of the training's seconds\n"
        f"together:  {100 * share:.2f}% after the start; "
        f"{'yes' if share <= GOAL else 'NO'}: asked <= {100 * GOAL:g}%\n"
        f"speed:     x {ratio:.3f} of the training without MLflow ({ratios})"
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
