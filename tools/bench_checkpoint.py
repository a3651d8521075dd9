"""What checkpoints cost: the wall time of a training that saves, over that of one that does not.

Trains configs/million.yaml (10^6 classes of 128 features with momentum) under torchrun in turns
with and without saves, and times the same steps of each by the clock on the wall: saves, their
copies and what the training waits for included. The window begins after the first steps and ends
well after the last save of it has been written.

    dist-dml pack synthetic datasets/million --classes 1000000
    python tools/bench_checkpoint.py                    twice each, about 20 minutes
    python tools/bench_checkpoint.py --repeats 1 --foreground
    python tools/bench_checkpoint.py --json checkpoint.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_head_report import load_warning, machine, machine_line

ROOT = Path(__file__).resolve().parents[1]
GOAL = 1.05
# Records come every so many steps, and the window begins and ends with one.
RECORD_STEPS, FIRST = 10, 40


def main() -> int:
    """Time all variants in turns, print ratios and the verdict. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/million.yaml")
    parser.add_argument("--data", default="", help="data.path, where it is not the config's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=200, help="steps between two saves")
    parser.add_argument("--saves", type=int, default=2, help="saves in the window")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--foreground", action="store_true", help="also without a copy, waiting")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_args()
    here = machine(torch.device("cpu"))
    print("\n".join(filter(None, (machine_line(here), load_warning(here)))), flush=True)
    variants = {
        "none": ["checkpoint.every_steps=0"],
        "background": [f"checkpoint.every_steps={given.every}"],
    }
    if given.foreground:
        variants["foreground"] = [*variants["background"], "checkpoint.background=false"]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    saves: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(given.repeats):
        for name, words in variants.items():
            taken, found = time_run(given, words)
            seconds[name].append(taken)
            saves[name] += found
            print(f"{number + 1}/{given.repeats} {name}: {taken:.1f} s", flush=True)
    rows = [row_of(name, seconds, saves, given) for name in variants]
    for row in rows:
        print(text_of(row))
    if given.json is not None:
        given.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def time_run(given: argparse.Namespace, words: list[str]) -> tuple[float, list[dict[str, float]]]:
    """Seconds of the window, and what each save in it said of itself."""
    steps = FIRST + given.every * given.saves
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
        command += [str(given.workers), "--standalone", "dist_dml/train.py"]
        command += ["--config", given.config, f"run.root={folder}", "run.name=run"]
        command += [f"data.path={given.data}"] * bool(given.data)
        command += [f"training.max_steps={steps + 5}", f"tracking.every_steps={RECORD_STEPS}"]
        command += ["tracking.diagnostics=false", "checkpoint.every_epochs=0"]
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *words, *given.overrides], cwd=ROOT, stdout=output, stderr=output
            )
        metrics = Path(folder) / "run" / "metrics.jsonl"
        try:
            begun = wait_for(metrics, FIRST, process, log)
            ended = wait_for(metrics, steps, process, log)
        finally:
            process.terminate()
            process.wait()
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        inside = [r for r in records if FIRST < r["step"] <= steps and r["name"].startswith("chec")]
        by_step: dict[int, dict[str, float]] = {}
        for record in inside:
            by_step.setdefault(record["step"], {})[record["name"]] = record["value"]
        return ended - begun, list(by_step.values())


def wait_for(metrics: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> float:
    """When the record of a step appears. Looks for it 50 times a second."""
    mark = f'{{"step": {step}, '.encode()
    while True:
        if metrics.exists() and mark in metrics.read_bytes()[-4000:]:
            return time.monotonic()
        if process.poll() is not None:
            sys.exit(f"the training ended before step {step}:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)


def row_of(
    name: str,
    seconds: dict[str, list[float]],
    saves: dict[str, list[dict[str, float]]],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """One object of the JSON file. Ratios are of runs that followed each other."""
    pairs = zip(seconds[name], seconds["none"], strict=True)
    blocked = [save["checkpoint/blocked_seconds"] for save in saves[name]]
    written = [save["checkpoint/seconds"] for save in saves[name]]
    return {
        "name": "checkpoint",
        "variant": name,
        "config": {"config": given.config, "every": given.every, "workers": given.workers},
        "seconds_median": statistics.median(seconds[name]),
        "seconds_spread": max(seconds[name]) - min(seconds[name]),
        "ratios": [ours / theirs for ours, theirs in pairs],
        "save_seconds": written,
        "blocked_seconds": blocked,
        "extra_bytes": None,
        "error": None,
        **machine(torch.device("cpu")),
    }


def text_of(row: dict[str, Any]) -> str:
    """A row for people, with the verdict."""
    text = f"{row['variant']:12s} {row['seconds_median']:8.1f} s +- {row['seconds_spread'] / 2:.1f}"
    if row["variant"] == "none":
        return text
    ratio = statistics.median(row["ratios"])
    said = "yes" if ratio <= GOAL else "NO"
    text += f"   x {ratio:.3f} of none ({', '.join(f'{r:.3f}' for r in row['ratios'])})"
    if row["save_seconds"]:
        text += f"; a save takes {statistics.median(row['save_seconds']):.1f} s, of which the "
        text += f"training waits {statistics.median(row['blocked_seconds']):.2f} s"
    return text + f"; {said}: asked <= {GOAL}"


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
