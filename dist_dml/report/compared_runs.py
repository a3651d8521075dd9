"""Finished runs as they lie on the disk, to be set side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.config import Config
from dist_dml.config_loading import flatten, resolve
from dist_dml.credentials import redact
from dist_dml.errors import UsageError
from dist_dml.report.query_scores import FILE as QUERIES_FILE
from dist_dml.report.query_scores import QueryFile, read_query_scores
from dist_dml.retrieval.report import COLUMN_NAMES
from dist_dml.tracking.recorder import Curve, read_metrics
from dist_dml.tracking.run_files import CONFIG, IDENTITY, read_json

_PLACES = {"run.name", "run.root"}
_LESS_IS_BETTER = {"equal_error_rate"}


@dataclass(frozen=True)
class ComparedRun:
    """One run."""

    name: str
    folder: Path
    config: Config
    scores: dict[str, float]
    """As `protocol/distance/score`."""
    source: str
    """Where the scores are from, in words."""
    metrics: dict[str, Curve]
    queries: QueryFile | None
    """None where the run has not been evaluated since it exists."""
    fingerprint: str
    """Of the data it was trained on; empty if unknown."""

    @property
    def seconds(self) -> float:
        """Training time; 0 if there is no record."""
        return max((float(curve.seconds[-1]) for curve in self.metrics.values()), default=0.0)


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs, in the given order.

    Raises:
        UsageError: for fewer than two, one that is given twice, or one without any score.
    """
    if len(folders) < 2:
        raise UsageError(
            f"compare got one run, {folders[0]}; give two or more (or a YAML file to compare its "
            "methods)"
        )
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        twice = next(one for i, one in enumerate(folders) if places.index(places[i]) < i)
        raise UsageError(f"compare got {twice} twice; give each run once")
    configs = [resolve(str(folder / CONFIG), []).config for folder in folders]
    names = [config.run.name for config in configs]
    runs = []
    for folder, config, name in zip(folders, configs, names, strict=True):
        unique = name if names.count(name) == 1 else str(folder)
        runs.append(_read(folder, config, unique))
    return runs


def _read(folder: Path, config: Config, name: str) -> ComparedRun:
    metrics = read_metrics(folder)
    scores, source = _stored_scores(folder)
    if not scores:
        scores, source = _recorded_scores(metrics)
    if not scores:
        raise UsageError(
            f"{folder} has no scores, neither in report/scores.json nor in metrics.jsonl; run "
            f"`dist-dml evaluate {folder}` first"
        )
    path = folder / "report" / QUERIES_FILE
    queries = read_query_scores(path) if path.is_file() else None
    fingerprint = str(read_json(folder / IDENTITY).get("dataset_fingerprint", ""))
    return ComparedRun(name, folder, config, scores, source, metrics, queries, fingerprint)


def _stored_scores(folder: Path) -> tuple[dict[str, float], str]:
    """Of the last evaluation: the last row is the checkpoint's, the others are baselines."""
    stored = read_json(folder / "report" / "scores.json")
    rows = stored.get("scores")
    if not isinstance(rows, dict) or not rows:
        return {}, ""
    last = list(rows.values())[-1]
    found = {
        name: float(value)
        for name, value in (last.items() if isinstance(last, dict) else ())
        if isinstance(value, (int, float)) and math.isfinite(value) and name.count("/") == 2
    }
    return found, f"dist-dml evaluate, {stored.get('checkpoint', 'checkpoint unknown')}"


def _recorded_scores(metrics: Mapping[str, Curve]) -> tuple[dict[str, float], str]:
    """The last value of everything that is named like a score."""
    found = {
        name: curve
        for name, curve in metrics.items()
        if name.count("/") == 2 and is_score(name.rsplit("/", 1)[1])
    }
    if not found:
        return {}, ""
    step = max(int(curve.step[-1]) for curve in found.values())
    return {
        name: float(curve.value[-1]) for name, curve in found.items()
    }, f"last evaluation of the training, step {step}"


def is_score(name: str) -> bool:
    """Whether it is the name of a score that tables show."""
    return name in COLUMN_NAMES or name.startswith("recall_at_")


def measurements(runs: Sequence[ComparedRun]) -> list[tuple[str, str]]:
    """Every (protocol, distance) that any run has scores of, in the order of the runs."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for name in run.scores:
            protocol, distance, score = name.split("/")
            if is_score(score):
                found[protocol, distance] = None
    return list(found)


def score_rows(
    runs: Sequence[ComparedRun], protocol: str, distance: str
) -> tuple[list[str], list[list[float | None]]]:
    """The names of the scores, and each run's values; None where it has none."""
    prefix = f"{protocol}/{distance}/"
    names = list(
        dict.fromkeys(
            name.removeprefix(prefix)
            for run in runs
            for name in run.scores
            if name.startswith(prefix) and is_score(name.removeprefix(prefix))
        )
    )
    recalls = sorted(
        (name for name in names if name.startswith("recall_at_")),
        key=lambda name: int(name.removeprefix("recall_at_")),
    )
    columns = recalls + [name for name in COLUMN_NAMES if name in names]
    return columns, [[run.scores.get(prefix + name) for name in columns] for run in runs]


def best_places(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Which cells hold the best value of their column; none in a column of equal values.

    The largest is the best, of an error rate the smallest.
    """
    grid = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    grid *= [-1.0 if name in _LESS_IS_BETTER else 1.0 for name in names]
    filled = np.where(np.isnan(grid), -np.inf, grid)
    known = np.where(np.isnan(grid), np.inf, grid)
    differs = filled.max(axis=0) > known.min(axis=0)
    return (filled == filled.max(axis=0)) & differs


def config_differences(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) wherever two of the configurations differ; places left out."""
    leaves = [dict(flatten(run.config.model_dump(mode="json"))) for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in leaves for key in one):
        values = [one.get(key, _MISSING) for one in leaves]
        if key not in _PLACES and any(value != values[0] for value in values):
            rows.append((key, [_inline(value) for value in values]))
    return rows


_MISSING = object()


def _inline(value: Any) -> str:
    return "\u2013" if value is _MISSING else redact("" if value is None else str(value))
