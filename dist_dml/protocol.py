"""ENTRY: the fair protocol of "A Metric Learning Reality Check" and of paper C as one command.

Trains one model a class-disjoint fold, selects its best checkpoint by validation MAP@R, tests each
once, and writes one table: `dist-dml protocol configs/demo.yaml run.name=fair`. Run it again to go
on where it was stopped. See docs/protocol.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_dml.config_loading import resolve
from dist_dml.data.index import Index
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.protocol_folds import (
    Fold,
    check_data,
    check_unchanged,
    finished_test,
    held_out_protocol,
    plan_folds,
)
from dist_dml.protocol_jobs import Job, run_jobs
from dist_dml.protocol_launch import (
    check_launcher,
    divide_machine,
    only_command,
    testing_stage,
    training_stage,
)
from dist_dml.protocol_scores import combination_scores, concatenated_scores
from dist_dml.protocol_table import (
    build_report,
    dataset_name,
    mean_cost,
    summary_values,
    table_text,
)
from dist_dml.reference_tables import lines_for
from dist_dml.tracking.parent_run import parent_run, sync_below
from dist_dml.whole_files import write_json, write_text

FOLDER = "protocol"
"""Below `runs/NAME`: the result of all folds together."""
RESULTS = ("protocol.json", "table.md")
"""The files there: every number, and the table."""


def protocol(arguments: argparse.Namespace) -> None:
    """Run what is missing of all folds, then score and write the table.

    Raises:
        UsageError: before anything starts, for what cannot work.
        RunError: a fold failed.
    """
    config = resolve(arguments.config, arguments.overrides).config
    if arguments.all_combinations and arguments.repeats == 1:
        raise UsageError(
            "--all-combinations takes folds from different repeats, and there is one; give "
            "--repeats 3, as paper C does"
        )
    num_folds = config.data.folds or 4 if arguments.folds is None else arguments.folds
    check_numbers(arguments, num_folds)
    check_launcher("protocol")
    held_out = held_out_protocol(config)
    slots, threads = divide_machine(
        config, num_folds * arguments.repeats, arguments.workers, arguments.parallel
    )
    folds = plan_folds(arguments.config, arguments.overrides, num_folds, arguments.repeats, threads)
    index = check_data(folds[0], held_out)
    folder = Path(config.run.root) / config.run.name / FOLDER
    with only_command(folder, "protocol") as lock, ExitStack() as started:
        for fold in folds:
            check_unchanged(fold)
        missing = [fold for fold in folds if finished_test(fold, held_out) is None]
        num_done = len(folds) - len(missing)
        fingerprint = index.fingerprint
        parent = started.enter_context(
            parent_run(folder.parent, config, "protocol", dataset_fingerprint=fingerprint)
        )
        print(
            f"{folder.parent}: {len(folds)} folds, {num_done} done before; "
            f"{min(len(slots), max(1, len(missing)))} at a time, {arguments.workers} worker(s) of "
            f"{folds[0].config.engine.threads} thread(s) each",
            file=sys.stderr,
            flush=True,
        )
        jobs = []
        for fold in missing:
            tags = {"protocol": config.run.name, "fold": fold.number, "repeat": fold.repeat}
            below = parent.words_of_child(config, tags)
            trains = training_stage([arguments.config], fold, arguments.workers, below)
            jobs.append(Job(fold.name, (trains, testing_stage(fold, held_out, arguments.workers))))
        run_jobs(jobs, slots, num_done, lock)
        every = arguments.all_combinations
        report = write_report(folder, index, folds, held_out, every)
        parent.recorder.record(len(folds), *mean_cost(report), summary_values(report))
        for name in RESULTS:
            parent.recorder.note_artifact(folder / name, "report")
        text = table_text(report)
        parent.describe(text)
    # The folds' mirrors ended with their training, before the test.
    if config.tracking.mlflow and (trouble := sync_below(folder.parent, len(folds))):
        print(f"note: {trouble}", file=sys.stderr)
    print(f"\n{text}\ntable:  {folder / 'table.md'} (every number: protocol.json)")


def check_numbers(arguments: argparse.Namespace, num_folds: int) -> None:
    """Refuse numbers of folds, workers, folds at the same time or repeats that are too small."""
    least = {"folds": 2, "workers": 1, "parallel": 0, "repeats": 1}
    given = {**vars(arguments), "folds": num_folds}
    for name, smallest in least.items():
        if given[name] < smallest:
            raise UsageError(f"--{name} {given[name]} is too few; give {smallest} or more")


def write_report(
    folder: Path,
    index: Index,
    folds: Sequence[Fold],
    held_out: ProtocolConfig,
    all_combinations: bool = False,
) -> dict[str, Any]:
    """Score the concatenations, write `protocol.json` and `table.md`, return what the first holds.

    Args:
        folder: made where it is missing.
        index: of the whole data set.
        folds: all of all repeats, tested.
        held_out: what they were tested on.
        all_combinations: concatenate folds of different repeats as well.

    Raises:
        RunError: a fold has no test.
    """
    tests = [_finished(fold, held_out) for fold in folds]
    num_folds = folds[0].config.data.folds
    concatenated = []
    for start in range(0, len(folds), num_folds):
        part = slice(start, start + num_folds)
        began = time.monotonic()
        concatenated.append(concatenated_scores([fold.folder for fold in folds[part]], tests[part]))
        print(
            f"{folder.parent}: repeat {start // num_folds}: {num_folds} folds' embeddings "
            f"concatenated and scored in {time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )
    combined = []
    if all_combinations:
        combined = combination_scores([fold.folder for fold in folds], tests, num_folds)
    reference = lines_for(dataset_name(index), folds[0].config.loss.name)
    report = build_report(index, folds, tests, concatenated, reference, combined)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS[0], report)
    write_text(folder / RESULTS[1], table_text(report))
    return report


def _finished(fold: Fold, held_out: ProtocolConfig) -> Mapping[str, Any]:
    found = finished_test(fold, held_out)
    if found is None:
        raise RunError(f"{fold.folder} ended without a test; look at its protocol.log")
    return found


def add_numbers(parser: argparse.ArgumentParser) -> None:
    """Declare folds, workers, how many at the same time, and repeats."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as of dist-dml train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_numbers(parser)
    parser.add_argument(
        "--all-combinations",
        action="store_true",
        help="also concatenate folds of different repeats in all combinations, as paper C does",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the protocol. Returns the exit code."""
    protocol(arguments)
    return 0
