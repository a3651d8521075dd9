"""ENTRY: methods against each other under the fair protocol, or finished runs side by side.

    dist-dml compare configs/glyphs.yaml --trial optimizer.learning_rate=1e-3 \\
        --trial optimizer.learning_rate=8e-3
    dist-dml compare runs/one runs/other

Of runs: tables, curves, settings and significance on one page, see docs/report.md. Nothing is
trained. Of a file, the methods are its variants. Each trial is trained on the first fold; the one
with the best validation MAP@R runs on all folds as `dist-dml protocol` does, and is tested once a
fold. Run the command again to go on where it was stopped. See docs/protocol.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_dml.comparison_picture import comparison_picture
from dist_dml.comparison_plan import Trial, best_score, chosen_trial, method_names, plan_trials
from dist_dml.comparison_table import build_comparison, comparison_text
from dist_dml.config_loading import resolve
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.protocol import FOLDER, RESULTS, add_numbers, check_numbers, write_report
from dist_dml.protocol_folds import (
    Fold,
    check_data,
    check_unchanged,
    finished_test,
    held_out_protocol,
)
from dist_dml.protocol_jobs import Job, Stage, run_jobs
from dist_dml.protocol_launch import (
    check_launcher,
    divide_machine,
    only_command,
    testing_stage,
    training_stage,
)
from dist_dml.protocol_table import mean_cost, summary_values, table_text
from dist_dml.report.run_comparison import compare_runs
from dist_dml.tracking.parent_run import ParentRun, parent_run, sync_below, write_child
from dist_dml.tracking.plots import save_figure
from dist_dml.whole_files import write_json, write_text


def compare(arguments: argparse.Namespace) -> None:
    """Try, choose, run and test; then write the table and the picture.

    Raises:
        UsageError: before anything starts, for what cannot work.
        RunError: a method is missing from the table, or all are.
    """
    check_launcher("compare")
    methods = method_names(arguments.config, arguments.method)
    first = resolve(f"{arguments.config}:{methods[0]}", arguments.overrides).config
    num_folds = first.data.folds or 4 if arguments.folds is None else arguments.folds
    check_numbers(arguments, num_folds)
    num_runs = len(methods) * num_folds * arguments.repeats
    slots, threads = divide_machine(first, num_runs, arguments.workers, arguments.parallel)
    planned = plan_trials(
        arguments.config,
        methods,
        arguments.trial,
        arguments.overrides,
        num_folds,
        arguments.repeats,
        threads,
    )
    every = {m: resolve(f"{arguments.config}:{m}", arguments.overrides).config for m in methods}
    tests = {method: held_out_protocol(config) for method, config in every.items()}
    held_out = tests[methods[0]]
    _check_alike(planned, tests)
    index = check_data(planned[methods[0]][0].folds[0], held_out)
    folder = Path(first.run.root) / first.run.name / "comparison"
    with only_command(folder, "compare") as lock, ExitStack() as started:
        for trial in _all(planned):
            for fold in trial.folds:
                check_unchanged(fold)
        shared = resolve(arguments.config, arguments.overrides).config
        parent = started.enter_context(
            parent_run(folder.parent, shared, "comparison", dataset_fingerprint=index.fingerprint)
        )
        work = _Work(arguments.config, arguments.workers, slots, held_out, parent)
        failures = work.try_out(planned, lock) if len(planned[methods[0]]) > 1 else {}
        chosen = {method: chosen_trial(trials) for method, trials in planned.items()}
        failures |= work.finish([trial for trial in chosen.values() if trial is not None], lock)
        reports: dict[str, Mapping[str, Any]] = {}
        for method, trial in chosen.items():
            if trial is None or any(finished_test(fold, held_out) is None for fold in trial.folds):
                continue
            place = trial.folds[0].folder.parent / FOLDER
            reports[method] = write_report(place, index, trial.folds, held_out)
            _write_method(place, trial, reports[method], parent)
        if not reports:
            raise RunError(f"no method has finished: {'; '.join(failures.values())}")
        comparison = build_comparison(planned, chosen, reports, failures)
        write_json(folder / "comparison.json", comparison)
        text = comparison_text(comparison)
        write_text(folder / "table.md", text)
        save_figure(comparison_picture(comparison), folder / "comparison.png")
        parent.describe(text)
        for name in ("comparison.json", "table.md", "comparison.png"):
            parent.recorder.note_artifact(folder / name, "report")
    if first.tracking.mlflow and (trouble := sync_below(folder.parent, num_runs)):
        print(f"note: {trouble}", file=sys.stderr)
    print(f"\n{text}\ntable:    {folder / 'table.md'} (every number: comparison.json)")
    print(f"picture:  {folder / 'comparison.png'}")
    missing = [method for method in methods if method not in reports]
    if missing:
        raise RunError(
            f"{', '.join(missing)} failed and {'is' if len(missing) == 1 else 'are'} not in the "
            f"table ({'; '.join(failures.values())}); mend the reason and run the same command "
            "again: what has finished stays"
        )


def _write_method(place: Path, trial: Trial, report: Mapping[str, Any], parent: ParentRun) -> None:
    """A method's row in MLflow, beside its folds: the chosen trial's settings and the result."""
    config = trial.folds[0].config
    run = config.run.model_copy(update={"name": f"{_root_name(trial)}/{trial.name}/{FOLDER}"})
    tags = {**config.tracking.tags, "comparison": _root_name(trial), "method": trial.method}
    tracking = config.tracking.model_copy(update={"parent": parent.run_id, "tags": tags})
    shown = config.model_copy(update={"run": run, "tracking": tracking})
    values, steps = summary_values(report), len(trial.folds)
    facts = {"trial": trial.name, "setting": trial.setting}
    text, cost = table_text(report), mean_cost(report)
    write_child(place, shown, "method", values, steps, cost, text, RESULTS, **facts)


def _all(planned: Mapping[str, Sequence[Trial]]) -> Iterable[Trial]:
    return (trial for trials in planned.values() for trial in trials)


def _check_alike(
    planned: Mapping[str, Sequence[Trial]], tests: Mapping[str, ProtocolConfig]
) -> None:
    """Refuse methods that differ in what must be the same for all.

    Raises:
        UsageError: with the first method that differs, and in what.
    """
    first = next(iter(planned.values()))[0]
    ours = first.folds[0].config
    for trial in _all(planned):
        theirs = trial.folds[0].config
        for key, one, other in (
            ("run.name", _root_name(first), _root_name(trial)),
            ("run.root", ours.run.root, theirs.run.root),
            ("data.path", ours.data.path, theirs.data.path),
            ("data.split", ours.data.split, theirs.data.split),
            ("training.max_seconds", ours.training.max_seconds, theirs.training.max_seconds),
            ("training.epochs", ours.training.epochs, theirs.training.epochs),
            ("training.max_steps", ours.training.max_steps, theirs.training.max_steps),
            ("the tested splits", tests[first.method], tests[trial.method]),
            ("the distance", ours.evaluation.distances, theirs.evaluation.distances),
        ):
            if one != other:
                raise UsageError(
                    f"{trial.name} has {key} {other!r} and {first.name} has {one!r}: a comparison "
                    "has one for all; move it out of variants and trials"
                )


def _root_name(trial: Trial) -> str:
    return str(Path(trial.folds[0].config.run.name).parents[2])


class _Work:
    """Runs trials and folds that are missing."""

    def __init__(
        self,
        path: str,
        workers: int,
        slots: Sequence[Mapping[str, str]],
        held_out: ProtocolConfig,
        parent: ParentRun,
    ) -> None:
        self._path, self._workers, self._slots, self._held_out = path, workers, slots, held_out
        self._parent = parent

    def try_out(self, planned: Mapping[str, Sequence[Trial]], lock: int) -> dict[str, str]:
        """Train every trial on the first fold. Returns what failed, by name."""
        jobs, num_done = [], 0
        for trial in _all(planned):
            fold = trial.folds[0]
            if best_score(fold) is None:
                jobs.append(Job(f"{trial.name}/{fold.name}", (self._training(trial, fold),)))
            else:
                num_done += 1
        return self._run(jobs, num_done, "trials", lock)

    def finish(self, trials: Sequence[Trial], lock: int) -> dict[str, str]:
        """Train and test every fold of the chosen trials. Returns what failed, by name."""
        jobs, num_done = [], 0
        for trial in trials:
            for fold in trial.folds:
                if finished_test(fold, self._held_out) is not None:
                    num_done += 1
                    continue
                stages = [testing_stage(fold, self._held_out, self._workers)]
                if best_score(fold) is None:
                    stages.insert(0, self._training(trial, fold))
                jobs.append(Job(f"{trial.name}/{fold.name}", tuple(stages)))
        return self._run(jobs, num_done, "folds", lock)

    def _training(self, trial: Trial, fold: Fold) -> Stage:
        tags = {
            "comparison": _root_name(trial),
            "method": trial.method,
            "trial": trial.name.rpartition("-")[2],
            "fold": fold.number,
            "repeat": fold.repeat,
        }
        below = self._parent.words_of_child(fold.config, tags)
        return training_stage([f"{self._path}:{trial.method}"], fold, self._workers, below)

    def _run(self, jobs: Sequence[Job], num_done: int, what: str, lock: int) -> dict[str, str]:
        print(
            f"{what}: {len(jobs)} to run, {num_done} done before; {len(self._slots)} at a time, "
            f"{self._workers} worker(s) each",
            file=sys.stderr,
            flush=True,
        )
        return run_jobs(jobs, self._slots, num_done, lock, keep_going=True, what=what)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "config", metavar="CONFIG|RUN", help="YAML file whose variants are the methods, or a run"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value|RUN", help="of a file; or further runs"
    )
    parser.add_argument(
        "--out", default="", metavar="FOLDER", help="of runs: where compare.html goes"
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="a variant; give several (default: all)",
    )
    parser.add_argument(
        "--trial",
        action="append",
        default=[],
        metavar="'KEY=VALUE ...'",
        help="settings that every method is tried with on the first fold; give several",
    )
    add_numbers(parser)


def run_folders(arguments: argparse.Namespace) -> list[Path]:
    """The runs to set side by side; none where a file's methods are meant.

    Raises:
        UsageError: for runs mixed with anything else, or options of the other form.
    """
    words = [arguments.config, *arguments.overrides]
    runs = [Path(word) for word in words if (Path(word) / "config.yaml").is_file()]
    if not runs:
        if Path(arguments.config).is_dir():
            raise UsageError(
                f"{arguments.config} is no run (it has no config.yaml); give run folders, or the "
                "YAML file whose variants are to be compared"
            )
        if arguments.out:
            raise UsageError("--out is for runs; a file's methods go to RUN.ROOT/NAME/comparison")
        return []
    others = [word for word in words if not (Path(word) / "config.yaml").is_file()]
    if others:
        raise UsageError(
            f"compare got the run {runs[0]} and {others[0]!r}, which is none (it has no "
            "config.yaml); give either run folders alone, or one YAML file with its settings"
        )
    if arguments.method or arguments.trial:
        raise UsageError("--method and --trial are for a file's methods; runs are what they are")
    return runs


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison. Returns the exit code."""
    if runs := run_folders(arguments):
        text, page = compare_runs(runs, Path(arguments.out) if arguments.out else None)
        print(f"{text}\n\npage:     {page}")
    else:
        compare(arguments)
    return 0
