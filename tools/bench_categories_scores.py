"""Time to reach a retrieval score: real trainings, each ended when it is there or out of time.

Trainings are `python -m dist_dml.train` with overrides; this reads their `metrics.jsonl` while they
run. Synthetic data have the same number of images whatever the number of classes, and the same
classes that are never trained on: the target means the same everywhere, and an epoch takes the same
number of steps. Only the number of categories differs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_categories_ledger import point
from bench_categories_objectives import OBJECTIVES, SAMPLES_PER_CLASS

from dist_dml.errors import RunError, UsageError
from dist_dml.tracking.recorder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = "unseen"
METRICS = ("recall_at_1", "map_at_r")
# Classes that are never trained on, and images of each: what the target is measured on.
UNSEEN_CLASSES, UNSEEN_IMAGES = 500, 4
# Training classes of which images are held out, for a second curve.
SEEN_CLASSES = 100
_LOOK_SECONDS = 0.5
# Wall-clock time that a training has beside its time limit: start, evaluations, checkpoints.
_START_SECONDS, _WALL_FACTOR = 120.0, 4.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """What a training is asked for.

    Attributes:
        data: `glyphs`, or the number of synthetic classes in words, `synthetic-1000`.
        num_images: training images of synthetic data.
        rows: of a batch.
        dim: D.
        threads: of the process; 0 for all cores.
        metric: of the target.
        targets: ascending; the training ends when the last one is reached.
        limit_steps: after which a training ends without the target.
        limit_seconds: likewise, of training time, evaluations not counted.
        seed: of the training.
    """

    data: str
    num_images: int
    rows: int
    dim: int
    threads: int
    metric: str
    targets: tuple[float, ...]
    limit_steps: int
    limit_seconds: float
    seed: int = 0

    @property
    def synthetic_classes(self) -> int:
        """C of synthetic data; 0 for others."""
        kind, _, count = self.data.partition("-")
        return int(count) if kind == "synthetic" else 0

    @property
    def images_per_class(self) -> int:
        """Of synthetic data."""
        return max(2, self.num_images // max(1, self.synthetic_classes))

    def settings(self) -> dict[str, Any]:
        """The `config` of a point. Targets below the last change nothing in the training."""
        return {
            "data": self.data,
            "num_images": self.num_images if self.synthetic_classes else None,
            "rows": self.rows,
            "dim": self.dim,
            "threads": self.threads,
            "metric": f"{PROTOCOL}/cosine/{self.metric}",
            "target": self.targets[-1],
            "limit_steps": self.limit_steps,
            "limit_seconds": self.limit_seconds,
            "seed": self.seed,
        }


def pack_command(asked: Asked, folder: Path) -> list[str]:
    """`dist-dml pack ...` of the data."""
    command = [sys.executable, "-m", "dist_dml.cli", "pack"]
    if not asked.synthetic_classes:
        return [*command, asked.data, str(folder)]
    options = {
        "--classes": asked.synthetic_classes,
        "--train-per-class": asked.images_per_class,
        "--frequent-classes": 0,
        "--seen-classes": min(SEEN_CLASSES, asked.synthetic_classes),
        "--test-classes": UNSEEN_CLASSES,
        "--test-per-class": UNSEEN_IMAGES,
        "--seed": 0,
    }
    return [*command, "synthetic", str(folder), *(str(x) for pair in options.items() for x in pair)]


def packed(asked: Asked, root: Path) -> Path:
    """The data set, packed if it is not there.

    Raises:
        RunError: if packing fails.
    """
    images = f"-{asked.images_per_class}" if asked.synthetic_classes else ""
    folder = root / f"{asked.data}{images}"
    if not (folder / "dataset.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # What an interrupted packing has left.
        done = subprocess.run(
            pack_command(asked, folder), env=_environment(), stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise RunError(f"packing {asked.data} into {folder} failed; the reason is above")
    return folder


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def training_overrides(name: str, asked: Asked, data: Path, run: Path) -> list[str]:
    """The configuration of a training.

    The rate stays where it is after the warm-up: a schedule that ends with the time limit would
    make the time to a score depend on the limit.
    """
    objective = OBJECTIVES[name]
    size = 16 if asked.synthetic_classes else 32
    found = [
        f"run.name={run.name}",
        f"run.root={json.dumps(str(run.parent))}",
        f"run.seed={asked.seed}",
        f"data.path={json.dumps(str(data))}",
        f"data.batch_size={asked.rows}",
        "data.loader_processes=0",
        f"data.image={{size: {size}, channels: 1, resize: 0, mean: [0.5], std: [0.25]}}",
        f"model.embedding_dim={asked.dim}",
        "model.norm=batch",
        "optimizer.name=adamw",
        f"optimizer.learning_rate={objective.learning_rate}",
        "optimizer.weight_decay=0.02",
        "schedule.name=constant",
        "schedule.warmup_steps=50",
        "training.epochs=100000",
        f"training.max_steps={asked.limit_steps}",
        f"training.max_seconds={asked.limit_seconds}",
        f"engine.threads={asked.threads}",
        "checkpoint.keep_last=1",
        "checkpoint.every_epochs=0",
        f"checkpoint.best_metric={PROTOCOL}/cosine/map_at_r" * (objective.family == "proxies")
        or "checkpoint.best_metric=",
        "tracking.mlflow=false",
        "tracking.every_steps=50",
        "tracking.diagnostics=false",
        "evaluation.nmi=false",
        "evaluation.distances=[cosine]",
        f"evaluation.every_epochs={int(objective.family != 'proxies')}",
        "evaluation.recall_at=[1]",
        f"evaluation.protocols=[{{name: {PROTOCOL}, query: test}}, {{name: seen, query: seen}}]",
        *objective.overrides,
        *objective.training,
    ]
    if size == 32:  # As configs/glyphs.yaml.
        found.append(
            "data.augment={rotation_degrees: 10, zoom: [0.85, 1.15], shift: 0.06, contrast: 0.3, "
            "noise: 6}"
        )
    if objective.of_pairs:
        most = asked.images_per_class if asked.synthetic_classes else SAMPLES_PER_CLASS
        each = min(SAMPLES_PER_CLASS, most)
        found += ["data.order=balanced", f"data.samples_per_class={each}"]
    return found


def time_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Training seconds at the first evaluation that reaches the target; None if none does.

    Args:
        curve: (step, images seen, seconds, score) of each evaluation.
        target: the score.
    """
    return next((point[2] for point in curve if point[3] >= target), None)


def read_curve(folder: Path, name: str) -> list[list[float]]:
    """(step, images seen, seconds, score) of each evaluation so far."""
    curve = read_metrics(folder).get(name)
    if curve is None:
        return []
    columns = (curve.step, curve.images_seen, curve.seconds, curve.value)
    return [[float(number) for number in one] for one in zip(*columns, strict=True)]


def train_to(name: str, asked: Asked, root: Path) -> dict[str, Any]:
    """One training. Returns its row."""
    row = point("categories", "score", name, asked.settings())
    run = root / "runs" / f"{asked.data}-{name}-{row['key']}"
    shutil.rmtree(run, ignore_errors=True)  # An interrupted one starts again: its clock counts.
    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = packed(asked, root / "datasets")
        command = [sys.executable, "-m", "dist_dml.train"]
        command += training_overrides(name, asked, data, run)
        log = run.parent / f"{run.name}.log"
        code, seconds = _watched(command, log, run, asked)
    except (RunError, UsageError) as error:
        return row | {"error": str(error)}
    curve = read_curve(run, f"{PROTOCOL}/cosine/{asked.metric}")
    reached = {f"{target:g}": time_to(curve, target) for target in asked.targets}
    error = None
    if code not in (0, 75) or not curve:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        error = f"the training ended with status {code}: {said[-1] if said else 'no word'}"[:400]
    found = {
        "curve": curve,
        "seen_curve": read_curve(run, f"seen/cosine/{asked.metric}"),
        "seconds_to": reached,
        "seconds_median": reached[f"{asked.targets[-1]:g}"],
        "best": max((one[3] for one in curve), default=None),
        "wall_seconds": seconds,
        "error": error,
    }
    rates = read_metrics(run).get("train/images_per_second")
    if rates is not None:
        found["images_per_second"] = sorted(rates.value.tolist())[len(rates.value) // 2]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return row | found


def _watched(command: list[str], log: Path, run: Path, asked: Asked) -> tuple[int, float]:
    """Run a training until the last target, its time limit or that of the wall clock.

    Returns:
        Its exit code, and the seconds that it took in all.
    """
    name = f"{PROTOCOL}/cosine/{asked.metric}"
    started = time.monotonic()
    wall = _START_SECONDS + _WALL_FACTOR * asked.limit_seconds
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, env=_environment(), stdout=stream, stderr=stream)
        try:
            while process.poll() is None:
                time.sleep(_LOOK_SECONDS)
                curve = read_curve(run, name)
                done = time_to(curve, asked.targets[-1]) is not None
                out = bool(curve) and curve[-1][2] >= asked.limit_seconds
                if done or out or time.monotonic() - started > wall:
                    process.send_signal(signal.SIGTERM)  # It saves, and ends with 75.
                    process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return process.returncode, time.monotonic() - started
