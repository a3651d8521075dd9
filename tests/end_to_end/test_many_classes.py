"""Many classes: packed, trained on two workers, saved, gone on with on three, evaluated."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import BIN, ROOT, Launcher

from dist_dml.data.pack.synthetic import pack_synthetic
from dist_dml.data.pack.synthetic_splits import SyntheticCounts

pytestmark = pytest.mark.slow

CLASSES = 20_000
COUNTS = SyntheticCounts(
    CLASSES,
    train_per_class=2,
    frequent_classes=20,
    frequent_per_class=100,
    seen_classes=150,
    test_classes=150,
)
FIRST, LAST = 4, 8


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42,000 training images of 20,000 classes."""
    folder = tmp_path_factory.mktemp("many") / "packed"
    assert len(pack_synthetic(folder, COUNTS, shard_samples=10_000)) > 2 * CLASSES
    return folder


def settings_of(data: Path, root: Path) -> list[str]:
    """The config of the million, smaller; a constant rate, so that all runs have the same."""
    return [
        *("--config", "configs/million.yaml", f"data.path={data}", f"run.root={root}"),
        *("schedule={name: constant}", "optimizer.learning_rate=1e-3", "data.batch_size=128"),
        *("tracking.every_steps=1", "engine.timeout_seconds=60"),
    ]


def test_twenty_thousand_classes_go_on_with_three_workers_like_one(
    launcher: Launcher, many: Path
) -> None:
    settings = settings_of(many, launcher.root)

    def train(name: str, kind: str, workers: int, steps: int) -> str:
        arguments = [f"run.name={name}", f"training.max_steps={steps}", "--resume", "auto"]
        finished = launcher.run(kind, workers, *arguments, settings=settings)
        assert finished.exit_code == 0, finished.output
        return finished.output

    train("whole", "python", 1, LAST)
    train("moved", "by hand", 2, FIRST)
    shown = train("moved", "by hand", 3, LAST)
    assert f"from step {FIRST} of 128 images, {CLASSES} classes over 3 worker(s)" in shown
    whole, moved = launcher.losses("whole"), launcher.losses("moved")
    assert list(moved) == list(range(1, LAST + 1))
    for step, loss in whole.items():
        # float32; rounding is amplified by a batch norm and momentum from step to step.
        assert moved[step] == pytest.approx(loss, rel=2e-3), step

    newest = launcher.root / "moved" / "checkpoints" / f"step-{LAST:09d}"
    names = sorted(path.name for path in newest.glob("classes-*"))
    assert names == [f"classes-{rank:05d}-of-00003.safetensors" for rank in range(3)]
    expected, weights = (launcher.tensors(run)["classes/weight"] for run in ("whole", "moved"))
    assert weights.shape == (CLASSES, 128)
    assert (weights - expected).norm() < 2e-3 * expected.norm()

    command = [str(BIN / "dist-dml"), "evaluate", str(launcher.root / "moved"), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"checkpoint"')]
    (scores,) = json.loads(line)["scores"].values()
    for name in ("unseen", "seen"):
        assert 0.2 < scores[f"{name}/cosine/recall_at_1"] < 1  # Of 150 classes; chance is 0.005.
