"""Paper B's appendix as one command: cross-entropy and SPCE trained side by side on digits.

Each training is a real run (`python -m dist_dml.train --config configs/paper_b/digits.yaml`); those
that have finished are not run again. Draws the training losses and the accuracy of the nearest
training image (Recall@1 of held-out digits) over the steps, and prints a table.

    dist-dml pack digits datasets/digits
    python tools/spce_curves.py [--out FOLDER] [--seeds 0 1 2] [a.b=value ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_dml.tracking.plots import BLUE, ORANGE, save_figure
from dist_dml.tracking.recorder import Curve, read_metrics

CONFIG = "configs/paper_b/digits.yaml"
LOSSES = {"cross_entropy": ("cross-entropy", BLUE), "spce": ("SPCE, no class weights", ORANGE)}
PANELS = {
    "train/loss": "training loss of a batch, nats",
    "seen/cosine/recall_at_1": "Recall@1 of held-out digits",
}
# Batches that a point of the loss is the mean of: an epoch.
SMOOTHED = 7


def train(out: Path, loss: str, seed: int, overrides: Sequence[str]) -> dict[str, Curve]:
    """The curves of one training, run if it has not finished."""
    name = f"{loss}-{seed}"
    settings = [f"run.root={out}", f"run.name={name}", f"run.seed={seed}", "run.resume=auto"]
    settings += [f"loss.name={loss}", "tracking.mlflow=false", *overrides]
    command = [sys.executable, "-m", "dist_dml.train", "--config", CONFIG, *settings]
    print(f"{name} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"spce_curves: {name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return read_metrics(out / name)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over an epoch; the first ones over what there is."""
    sums = np.cumsum(np.insert(values.astype(float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHED, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(found: dict[str, list[dict[str, Curve]]], path: Path) -> None:
    """Two panels: a thin line a seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.9), dpi=120, layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for loss, (label, colour) in LOSSES.items():
            curves = [run[metric] for run in found[loss]]
            values = [np.asarray(curve.value) for curve in curves]
            if metric == "train/loss":
                values = [smoothed(one) for one in values]
                axes.set_yscale("log")
            for one in values:
                axes.plot(curves[0].step, one, color=colour, alpha=0.35, linewidth=0.9)
            axes.plot(curves[0].step, np.mean(values, 0), color=colour, linewidth=2.2, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, path)


def table(found: dict[str, list[dict[str, Curve]]]) -> str:
    """Markdown: last losses and accuracies, mean and deviation over seeds."""
    lines = ["| loss | last epoch's loss | Recall@1 | MAP@R |", "|---|---:|---:|---:|"]
    for loss, runs in found.items():
        cells = []
        for metric, factor in (
            ("train/loss", 1.0),
            ("seen/cosine/recall_at_1", 100.0),
            ("seen/cosine/map_at_r", 100.0),
        ):
            last = [smoothed(run[metric].value)[-1] for run in runs]
            if metric != "train/loss":
                last = [run[metric].value[-1] for run in runs]
            deviation = float(np.std(last, ddof=1)) if len(last) > 1 else 0.0
            cells.append(f"{factor * np.mean(last):.3g} ± {factor * deviation:.2g}")
        lines.append(f"| {LOSSES[loss][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, draw and print. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/spce_curves"), help="folder of runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    arguments = parser.parse_args(argv)
    found = {
        loss: [train(arguments.out, loss, seed, arguments.overrides) for seed in arguments.seeds]
        for loss in LOSSES
    }
    path = arguments.out / "spce.png"
    draw(found, path)
    print(f"\n{table(found)}\n\npicture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
