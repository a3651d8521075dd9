"""Paper A's Table 3 as one command: every training loss against every distance at test time.

    python tools/paper_a_grid.py --config configs/paper_a/digits.yaml [--seeds 0 1 2]
        [--rows NAME ...] [--distances TEXT ...] [--out DIR] [section.key=value ...]

Each training row is a real run (`python -m dist_dml.train`) with its own loss, evaluated once at
its end, by all distances. A run that DIR holds finished is not repeated, an interrupted one goes
on. The table is printed, and written to DIR/grid.md and DIR/grid.json (an object a training row).

Distances without k or a are true metrics: k = K(p). The paper measured with a tiny a instead (k
nearly 1), which is a weak-metric; `--distances "metric(a=1e-6,p=0.1)"` measures with that.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Run by path: this folder is not a package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from dist_dml.command_line import run_command
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, differences, resolve
from dist_dml.errors import RunError, UsageError
from dist_dml.metric_parameters import MetricParameters, largest_metric_k, parse_metric
from dist_dml.tracking.recorder import read_metrics
from dist_dml.tracking.run_files import IDENTITY, last_status, read_json

ROOT = Path(__file__).resolve().parents[1]
SCORES = {
    "nmi": "NMI",
    "precision_at_1": "R@1",
    "f1_at_1": "F@1",
    "r_precision": "RP",
    "map_at_r": "MAP@R",
}
DISTANCES = (
    "l2",
    "probability_l2",
    "cosine",
    "metric(a=1e-6,p=1)",
    "metric(p=0.1)",
    "metric(p=0.01)",
    "metric(p=0.00001)",
    "metric(p=0.5)",
)
# Euclidean distances are metrics; 1 - cosine breaks the triangle inequality.
NAMED_TIERS = {"l2": "metric", "probability_l2": "metric", "cosine": "semi"}
WEAK = "weak"  # Any 0 < k <= 1 is a weak-metric through every label, see losses/metric_space.py.
# Keys whose values are the grid itself.
OWN_KEYS = ("run.name", "run.root", "run.seed", "run.resume", "checkpoint.best_metric")
OWN_KEYS += ("loss.name", "loss.p", "loss.k", "loss.a", "evaluation.distances", "evaluation.nmi")
_PLACE_KEYS = ("run.name", "run.root", "run.resume")
_OVERRIDE = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*=")


@dataclass(frozen=True)
class TrainingRow:
    """One loss of the grid; `parameters` is None for a loss outside the paper's family."""

    title: str
    loss: str
    parameters: MetricParameters | None

    @property
    def overrides(self) -> list[str]:
        """The loss as configuration."""
        if self.parameters is None:
            return [f"loss.name={self.loss}", "loss.p=1.0", "loss.k=null", "loss.a=null"]
        k, p = self.parameters.k, self.parameters.p
        return [f"loss.name={self.loss}", f"loss.p={p!r}", f"loss.k={k!r}", "loss.a=null"]

    @property
    def tier(self) -> str:
        """`metric`, `weak`, or - for a loss outside the family."""
        return tier_of(self.parameters) if self.parameters else "-"


def _offset(p: float, a: float) -> TrainingRow:
    title = f"p = {p:g}, a = {a:g}".replace("e-0", "e-")
    return TrainingRow(title, "l2", MetricParameters.of_offset(a, 1.0, p))


ROWS = {
    "p1": _offset(1.0, 1e-6),
    "p0.99": _offset(0.99, 1e-6),
    "p0.9": _offset(0.9, 1e-6),
    "p0.9_a3": _offset(0.9, 3.0),
    "p0.5_metric": TrainingRow(
        "p = 0.5, k = K(p)", "l2", MetricParameters(largest_metric_k(0.5), 0.5)
    ),
    "cross_entropy": TrainingRow("cross-entropy", "cross_entropy", None),
}
"""The four rows of Table 3, the same true metric in training and test, and what all start from."""


@dataclass(frozen=True)
class Run:
    """What one finished run measured, 0..1, at its end.

    Attributes:
        scores: by distance (its name) and score.
        accuracy: of the classifier on the held-out images; None where no certificate measured it.
        certified: share of certified samples by metric.
        seconds: training time without evaluations.
        finished: when, in Unix seconds.
        fingerprint: of the data set.
    """

    scores: Mapping[str, Mapping[str, float]]
    accuracy: float | None
    certified: Mapping[str, float]
    seconds: float
    finished: float
    fingerprint: str


def tier_of(parameters: MetricParameters) -> str:
    """`metric` where the triangle inequality holds for all points (17), otherwise `weak`."""
    return "metric" if parameters.is_metric else WEAK


def distance_name(text: str) -> str:
    """What the scores of a distance are called."""
    return text if text in NAMED_TIERS else parse_metric(text).name


def distance_tier(text: str) -> str:
    """The tier of a distance at test time; the top-k variant is one of what is left."""
    if text in NAMED_TIERS:
        return NAMED_TIERS[text]
    spec = parse_metric(text)
    return tier_of(spec.parameters) + (f" of the top {spec.top}" if spec.top else "")


def read_run(folder: Path, protocol: str) -> Run:
    """The last scores of a finished run.

    Raises:
        UsageError: if it was never evaluated under that protocol.
    """
    curves = read_metrics(folder)
    last = {name: float(curve.value[-1]) for name, curve in curves.items()}
    scores: dict[str, dict[str, float]] = {}
    certified: dict[str, float] = {}
    accuracy: float | None = None
    for name, value in last.items():
        parts = name.split("/")
        if len(parts) == 4 and parts[1] == "certificate":
            if parts[3] == "certified_share":
                certified[parts[2]] = value
            elif parts[3] == "accuracy":
                accuracy = value
        elif len(parts) == 3 and parts[0] == protocol and parts[2] in SCORES:
            scores.setdefault(parts[1], {})[parts[2]] = value
    if not scores:
        raise UsageError(
            f"{folder} has no score of protocol {protocol!r} in metrics.jsonl; delete the folder "
            "and run the grid again"
        )
    loss = curves.get("train/loss")
    return Run(
        scores=scores,
        accuracy=accuracy,
        certified=certified,
        seconds=float(loss.seconds[-1]) if loss is not None else 0.0,
        finished=float(last_status(folder).get("time", 0.0)),
        fingerprint=str(read_json(folder / IDENTITY).get("dataset_fingerprint", "")),
    )


def is_finished(folder: Path, wanted: Config) -> bool:
    """Whether the folder holds this run to its end.

    Raises:
        UsageError: if it holds a run with other settings.
    """
    stored = folder / "config.yaml"
    if not stored.is_file():
        return False
    found = resolve(stored, []).config
    if config_hash(found) != config_hash(wanted):
        differing = [
            f"{key} {old!r} -> {new!r}"
            for key, old, new in differences(found, wanted)
            if key not in _PLACE_KEYS
        ]
        raise UsageError(
            f"{folder} holds a run with other settings ({'; '.join(differing[:3])}); choose "
            "another --out, repeat its settings or delete it"
        )
    return last_status(folder).get("status") == "FINISHED"


@dataclass(frozen=True)
class Grid:
    """What is asked for."""

    config: str
    out: Path
    rows: tuple[str, ...]
    distances: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]

    def folder(self, row: str, seed: int) -> Path:
        """The run folder of one training."""
        return self.out / f"{row}-seed{seed}"

    def settings(self, row: str, seed: int) -> list[str]:
        """All overrides of one training; the user's stand behind what may be changed."""
        return [
            # A checkpoint serves to go on after an interruption only.
            *("evaluation.every_epochs=0", "checkpoint.keep_last=1"),
            *self.overrides,
            *ROWS[row].overrides,
            f"run.root={json.dumps(str(self.out))}",
            f"run.name={self.folder(row, seed).name}",
            f"run.seed={seed}",
            f"evaluation.distances={json.dumps(self.distances)}",
            *("evaluation.nmi=true", "checkpoint.best_metric="),
        ]

    def wanted(self, row: str, seed: int) -> Config:
        """The configuration of one training."""
        return resolve(self.config, self.settings(row, seed)).config


def train_missing(grid: Grid) -> dict[str, int]:
    """Train every run that is not finished. Returns the folders of those that failed, with codes.

    Raises:
        UsageError: if a run refuses its settings: the others would as well.
    """
    jobs = [(row, seed) for seed in grid.seeds for row in grid.rows]
    # All are checked before the first one trains.
    done = [is_finished(grid.folder(*job), grid.wanted(*job)) for job in jobs]
    failed: dict[str, int] = {}
    for number, (row, seed) in enumerate(jobs):
        head = f"[{number + 1}/{len(jobs)}] {row} ({ROWS[row].title}), seed {seed}"
        if done[number]:
            print(f"{head}: finished before, in {grid.folder(row, seed)}", flush=True)
            continue
        print(head, flush=True)
        command = [sys.executable, "-m", "dist_dml.train", "--config", grid.config]
        command += [*grid.settings(row, seed), "--resume", "auto"]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code == 2:
            raise UsageError(
                f"the training of {row} was refused (the reason is above); correct the "
                "configuration and run the same command again"
            )
        if code:
            failed[grid.folder(row, seed).name] = code
    return failed


def collect(grid: Grid, failed: Mapping[str, int]) -> dict[str, list[Run]]:
    """The finished runs of each row, one a seed.

    Raises:
        RunError: if no run has finished.
        UsageError: if they were trained on different data.
    """
    found: dict[str, list[Run]] = {}
    for row in grid.rows:
        folders = [grid.folder(row, seed) for seed in grid.seeds]
        protocol = grid.wanted(row, grid.seeds[0]).evaluation.protocols[0].name
        runs = [read_run(folder, protocol) for folder in folders if folder.name not in failed]
        if runs:
            found[row] = runs
    if not found:
        raise RunError(f"no training has finished: {', '.join(failed)}; the reasons are above")
    if len({run.fingerprint for runs in found.values() for run in runs}) > 1:
        raise UsageError(
            f"{grid.out} holds runs on different data (their run.json have different "
            "dataset_fingerprint); choose another --out, or delete the old runs"
        )
    return found


def summary(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, spread (standard deviation between seeds; None for one) and the values themselves."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "spread": spread, "values": known}


def as_rows(grid: Grid, found: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """One object a training row, for `grid.json` and for the table."""
    rows = []
    for name, runs in found.items():
        row = ROWS[name]
        seconds = summary(run.seconds for run in runs)
        assert seconds is not None
        certified = sorted({metric for run in runs for metric in run.certified})
        rows.append(
            {
                "name": "paper_a_grid",
                "variant": name,
                "title": row.title,
                "config": {
                    "file": grid.config,
                    "overrides": list(grid.overrides),
                    "loss": row.loss,
                    "parameters": asdict(row.parameters) if row.parameters else None,
                    "tier": row.tier,
                    "seeds": list(grid.seeds),
                },
                "scores": {
                    text: {
                        score: summary(
                            run.scores.get(distance_name(text), {}).get(score) for run in runs
                        )
                        for score in SCORES
                    }
                    for text in grid.distances
                },
                "accuracy": summary(run.accuracy for run in runs),
                "certified_share": {
                    metric: summary(run.certified.get(metric) for run in runs)
                    for metric in certified
                },
                "num_runs": len(runs),
                "seconds_median": statistics.median(seconds["values"]),
                "seconds_spread": seconds["spread"],
                "dataset_fingerprint": runs[0].fingerprint,
                "machine": machine(),
                "date": datetime.fromtimestamp(max(r.finished for r in runs), UTC).isoformat(
                    timespec="seconds"
                ),
            }
        )
    return rows


def percent(value: Mapping[str, Any] | None, best: str = "") -> str:
    """`84.06`, or `84.06 ± 0.12` over several seeds; bold where the mean reads as `best`."""
    if value is None:
        return "-"
    text = mean = f"{100 * value['mean']:.2f}"
    if value["spread"] is not None:
        text += f" ± {100 * value['spread']:.2f}"
    return f"**{text}**" if mean == best else text


def tables(rows: Sequence[Mapping[str, Any]], distances: Sequence[str]) -> str:
    """The training runs, and the grid: training row x test distance, the best of a column bold."""
    metrics = sorted({metric for row in rows for metric in row["certified_share"]})
    heads = [f"certified ({metric.removeprefix('metric_')})" for metric in metrics]
    lines = _head(["trained with", "tier", "accuracy", *heads, "seconds", "runs"], left=2)
    for row in rows:
        shares = [percent(row["certified_share"].get(metric)) for metric in metrics]
        cells = [row["title"], row["config"]["tier"], percent(row["accuracy"]), *shares]
        lines.append(_line([*cells, f"{row['seconds_median']:.0f}", str(row["num_runs"])]))
    lines.append("")
    lines += _head(["trained with", "test distance", "tier", *SCORES.values()], left=3)
    best = {}
    for score in SCORES:
        means = [row["scores"][text][score] for row in rows for text in distances]
        known = [value["mean"] for value in means if value is not None]
        best[score] = f"{100 * max(known):.2f}" if known else ""
    for row in rows:
        for number, text in enumerate(distances):
            cells = [percent(row["scores"][text][score], best[score]) for score in SCORES]
            title = row["title"] if number == 0 else ""
            lines.append(_line([title, f"`{text}`", distance_tier(text), *cells]))
    return "\n".join(lines)


def _head(names: Sequence[str], left: int) -> list[str]:
    rule = ["---" if number < left else "---:" for number in range(len(names))]
    return [_line(names), _line(rule)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def report(grid: Grid, rows: Sequence[Mapping[str, Any]], failed: Iterable[str]) -> str:
    """The content of `grid.md`."""
    seeds = ", ".join(map(str, grid.seeds))
    text = (
        f"{' '.join([grid.config, *grid.overrides])}; seeds {seeds}; {rows[0]['machine']}; "
        f"{max(row['date'] for row in rows)}. Percent; mean ± standard deviation where there are "
        "several seeds; the best of each column in bold.\n\n"
        f"{tables(rows, grid.distances)}\n"
    )
    names = ", ".join(failed)
    return text + (f"\nFailed, and left out: {names}.\n" if names else "")


def machine() -> str:
    """Processor, cores, and the GPU where there is one."""
    import torch

    text = f"{platform.machine()}, {os.cpu_count()} cores"
    return text + (f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of a closed-set training")
    parser.add_argument("--out", default="", metavar="DIR", help="default: RUN.ROOT/grid_CONFIG")
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), metavar="NAME", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument("--distances", nargs="+", default=list(DISTANCES), metavar="TEXT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _grid(arguments: argparse.Namespace) -> Grid:
    """What the arguments ask for, checked."""
    for name in arguments.rows:
        if name not in ROWS:
            raise UsageError(f"--rows {name}: no such row; choose of {', '.join(ROWS)}")
    for text in arguments.distances:
        distance_name(text)
    for text in arguments.overrides:
        key = text.partition("=")[0]
        if key in OWN_KEYS:
            raise UsageError(
                f"{text}: the grid sets {key} itself; use --rows, --distances, --seeds and --out"
            )
    base = resolve(arguments.config, arguments.overrides).config
    default = Path(base.run.root) / f"grid_{Path(arguments.config).stem}"
    return Grid(
        config=arguments.config,
        out=Path(arguments.out) if arguments.out else default,
        rows=tuple(dict.fromkeys(arguments.rows)),
        distances=tuple(dict.fromkeys(arguments.distances)),
        seeds=tuple(dict.fromkeys(arguments.seeds)),
        overrides=tuple(arguments.overrides),
    )


def run(arguments: argparse.Namespace) -> int:
    """Train what is missing, print and write the table. Returns 1 if a training failed."""
    grid = _grid(arguments)
    failed = train_missing(grid)
    rows = as_rows(grid, collect(grid, failed))
    text = report(grid, rows, failed)
    (grid.out / "grid.md").write_text(text, encoding="utf-8")
    (grid.out / "grid.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}\ngrid: {grid.out}/grid.md, {grid.out}/grid.json")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a training failed, 2 bad usage, 130 Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    # Overrides first: behind `--rows A B` argparse would take them for rows.
    overrides = [text for text in given if _OVERRIDE.match(text)]
    options = [text for text in given if not _OVERRIDE.match(text)]
    return run_command("paper_a_grid", sys.modules[__name__], [*overrides, *options])


if __name__ == "__main__":
    sys.exit(main())
