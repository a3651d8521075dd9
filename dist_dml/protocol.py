"""ENTRY: the fair protocol of "A Metric Learning Reality Check" and of paper C as one command.

Trains one model a class-disjoint fold, selects its best checkpoint by validation MAP@R, tests each
once, and writes one table: `dist-dml protocol configs/demo.yaml run.name=fair`. Run it again to go
on where it was stopped. See docs/protocol.md.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_dml.config import Config, ProtocolConfig
from dist_dml.config_loading import resolve
from dist_dml.data.index import Index
from dist_dml.errors import RunError, UsageError
from dist_dml.protocol_folds import (
    Fold,
    check_data,
    check_unchanged,
    finished_test,
    held_out_protocol,
    plan_folds,
)
from dist_dml.protocol_guard import GRACE_SECONDS
from dist_dml.protocol_jobs import Job, Stage, run_jobs
from dist_dml.protocol_measure import measure_arguments
from dist_dml.protocol_scores import concatenated_scores
from dist_dml.protocol_table import build_report, dataset_name, table_text
from dist_dml.reference_tables import lines_for
from dist_dml.whole_files import sync_folder, write_json


def protocol(arguments: argparse.Namespace) -> None:
    """Run what is missing of all folds, then score and write the table.

    Raises:
        UsageError: before anything starts, for what cannot work.
        RunError: a fold failed.
    """
    config = resolve(arguments.config, arguments.overrides).config
    num_folds = config.data.folds or 4 if arguments.folds is None else arguments.folds
    _check_numbers(arguments, num_folds)
    held_out = held_out_protocol(config)
    slots, threads = _slots(config, num_folds * arguments.repeats, arguments)
    folds = plan_folds(arguments.config, arguments.overrides, num_folds, arguments.repeats, threads)
    index = check_data(folds[0], held_out)
    folder = Path(config.run.root) / config.run.name / "protocol"
    with _lock(folder) as lock:
        for fold in folds:
            check_unchanged(fold)
        missing = [fold for fold in folds if finished_test(fold, held_out) is None]
        num_done = len(folds) - len(missing)
        print(
            f"{folder.parent}: {len(folds)} folds, {num_done} done before; "
            f"{min(len(slots), max(1, len(missing)))} at a time, {arguments.workers} worker(s) of "
            f"{folds[0].config.engine.threads} thread(s) each",
            file=sys.stderr,
            flush=True,
        )
        jobs = [_job(arguments, fold, held_out) for fold in missing]
        run_jobs(jobs, slots, num_done, lock)
        _write_table(folder, index, folds, held_out)


def _check_numbers(arguments: argparse.Namespace, num_folds: int) -> None:
    least = {"folds": 2, "workers": 1, "parallel": 0, "repeats": 1}
    given = {**vars(arguments), "folds": num_folds}
    for name, smallest in least.items():
        if given[name] < smallest:
            raise UsageError(f"--{name} {given[name]} is too few; give {smallest} or more")
    if any(key in os.environ for key in ("RANK", "WORLD_SIZE")):
        raise UsageError(
            "dist-dml protocol was started by a launcher (RANK or WORLD_SIZE is set); start it "
            "once and plainly: it launches its own workers, see --workers"
        )


def _slots(
    config: Config, num_runs: int, arguments: argparse.Namespace
) -> tuple[list[dict[str, str]], int]:
    """What each fold that runs at the same time adds to the environment, and threads a worker.

    With GPUs, each place has its own where there are enough, and shares them where
    `--parallel` asks for more.
    """
    import torch

    workers = arguments.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    devices = _visible_devices(torch.cuda.device_count() if config.engine.device != "cpu" else 0)
    room = max(1, len(devices or range(cores)) // workers)
    parallel = min(arguments.parallel or room, num_runs)
    threads = config.engine.threads or max(1, cores // (parallel * workers))
    slots = []
    for slot in range(parallel):
        environment = {"OMP_NUM_THREADS": str(threads)}
        if devices:
            places = max(1, len(devices) // workers)
            own = devices[slot % places * workers :][:workers]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        slots.append(environment)
    return slots, threads


def _visible_devices(count: int) -> list[str]:
    """The names of this process's GPUs, as `CUDA_VISIBLE_DEVICES` writes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def _job(arguments: argparse.Namespace, fold: Fold, held_out: ProtocolConfig) -> Job:
    """Training, then the one look at the test split, by the same number of workers."""
    launcher = [sys.executable]
    if arguments.workers > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(arguments.workers)]
    train = [*launcher, "-m", "dist_dml.train", "--config", arguments.config, *fold.overrides]
    test = [*launcher, "-m", "dist_dml.protocol_measure"]
    test += measure_arguments(fold.folder, held_out.query, held_out.gallery)
    log = fold.folder / "protocol.log"
    return Job(
        fold.name, (Stage("training", tuple(train), log), Stage("testing", tuple(test), log))
    )


@contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """The one right to run these folds; their processes hold on to it until the last has ended.

    Raises:
        UsageError: another command has it, longer than the folds of one that was killed may live.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + 2 * GRACE_SECONDS + 5
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{folder.parent} is being worked on by another dist-dml protocol; wait "
                        "for it, or choose another run.name"
                    ) from None
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _write_table(
    folder: Path, index: Index, folds: Sequence[Fold], held_out: ProtocolConfig
) -> None:
    """Score the concatenations, write `protocol.json` and `table.md`, print the table."""
    tests = [_finished(fold, held_out) for fold in folds]
    num_folds = folds[0].config.data.folds
    concatenated = []
    for start in range(0, len(folds), num_folds):
        part = slice(start, start + num_folds)
        began = time.monotonic()
        concatenated.append(concatenated_scores([fold.folder for fold in folds[part]], tests[part]))
        print(
            f"repeat {start // num_folds}: {num_folds} folds' embeddings concatenated and scored "
            f"in {time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )
    reference = lines_for(dataset_name(index), folds[0].config.loss.name)
    report = build_report(index, folds, tests, concatenated, reference)
    write_json(folder / "protocol.json", report)
    text = table_text(report)
    temporary = folder / f"table.md.{os.getpid()}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "table.md")
    sync_folder(folder)
    print(f"\n{text}\ntable:  {folder / 'table.md'} (every number: protocol.json)")


def _finished(fold: Fold, held_out: ProtocolConfig) -> Mapping[str, Any]:
    found = finished_test(fold, held_out)
    if found is None:
        raise RunError(f"{fold.folder} ended without a test; look at its protocol.log")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as of dist-dml train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--folds", type=int, metavar="N", help="class-disjoint folds (data.folds, or 4)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="workers of each fold (default 1)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="folds at the same time; 0 (default) takes GPUs, or else cores, over workers",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="seeds of each fold (default 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the protocol. Returns the exit code."""
    protocol(arguments)
    return 0
