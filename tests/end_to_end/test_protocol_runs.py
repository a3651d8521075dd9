"""`dist-dml protocol` as a user starts it: killed, resumed, repeated, with a fold that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from launching import finish, start_command, steps_trained, training_processes, wait_for_no_worker

pytestmark = pytest.mark.slow

SCORES = ("precision_at_1", "r_precision", "map_at_r")


@pytest.fixture
def config_file(divided_data: Path, tmp_path: Path) -> str:
    """20 epochs of 2 steps (5 classes, 60 images, batches of 30), a checkpoint an epoch."""
    path = tmp_path / "fair.yaml"
    path.write_text(
        f"run: {{name: whole, root: {tmp_path / 'runs'}}}\n"
        f"data: {{path: {divided_data}, batch_size: 30, loader_processes: 0,\n"
        "  image: {size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}}\n"
        "model: {embedding_dim: 16, norm: batch}\n"
        "training: {epochs: 20}\n"
        "engine: {timeout_seconds: 60}\n"
        "tracking: {mlflow: false, every_steps: 1}\n"
    )
    return str(path)


def start(config_file: str, *words: str) -> subprocess.Popen[str]:
    """The command, of 2 folds, both at the same time."""
    return start_command("protocol", config_file, "--folds", "2", "--parallel", "2", *words)


def newest_step(folder: Path) -> int:
    """Of the checkpoints that are complete."""
    names = [p.name for p in (folder / "checkpoints").glob("step-*") if p.suffix != ".tmp"]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def report_of(root: Path, name: str) -> dict:
    return json.loads((root / name / "protocol" / "protocol.json").read_text())


def brute_force(folders: list[Path]) -> list[float]:
    """P@1, R-precision and MAP@R of the folds' concatenated embeddings, in float64."""
    found = [np.load(folder / "embeddings-test.npz") for folder in folders]
    labels = found[0]["labels"]
    parts = [file["vectors"].astype(np.float64) for file in found]
    units = [part / np.linalg.norm(part, axis=1)[:, None] for part in parts]
    vectors = np.concatenate(units, axis=1)
    scores = []
    for i in range(len(labels)):
        order = [j for j in np.argsort(-(vectors @ vectors[i]), kind="stable") if j != i]
        hits = (labels[order] == labels[i]).astype(np.float64)
        total = int(hits.sum())
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        scores.append(
            [hits[0], hits[:total].sum() / total, (precision * hits)[:total].sum() / total]
        )
    return np.mean(scores, axis=0).tolist()


def test_killed_and_resumed_runs_nothing_twice_and_ends_with_the_same_table(
    config_file: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    code, output = finish(start(config_file))
    assert code == 0, output

    killed = start(config_file, "run.name=killed")
    folds = [root / "killed" / f"fold-{i}" for i in (0, 1)]
    deadline = time.monotonic() + 90
    while min(newest_step(fold) for fold in folds) < 6:
        assert time.monotonic() < deadline, "the folds did not get going"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    # The guards have lost their asker: nobody is left to tell them.
    wait_for_no_worker(root)
    saved = [newest_step(fold) for fold in folds]
    assert min(saved) < 40, "it was killed too late to show anything"
    assert not list((root / "killed").glob("fold-*/test.json"))

    code, output = finish(start(config_file, "run.name=killed"))
    assert code == 0, output
    for fold, step in zip(folds, saved, strict=True):
        trained = steps_trained(fold)
        assert set(trained) == set(range(1, 41))
        assert {trained[i] for i in range(1, step + 1)} == {1}
    ours, whole = report_of(root, "killed"), report_of(root, "whole")
    assert ours["over_repeats"] == whole["over_repeats"]
    assert [r["best_step"] for r in ours["runs"]] == [r["best_step"] for r in whole["runs"]]

    logs = {path: path.read_bytes() for path in root.glob("killed/*/protocol.log")}
    code, output = finish(start(config_file, "run.name=killed"))
    assert code == 0, output
    assert "2 folds, 2 done before" in output
    assert logs == {path: path.read_bytes() for path in root.glob("killed/*/protocol.log")}

    code, output = finish(start(config_file, "run.name=killed", "training.epochs=21"))
    assert code == 2
    assert "training.epochs 20 -> 21" in output


def test_two_workers_a_fold_make_the_table_from_the_folds_own_files(
    config_file: str, tmp_path: Path
) -> None:
    code, output = finish(start(config_file, "--workers", "2", "training.epochs=4"))
    assert code == 0, output
    folders = [tmp_path / "runs" / "whole" / f"fold-{i}" for i in (0, 1)]
    report = report_of(tmp_path / "runs", "whole")
    tests = [json.loads((folder / "test.json").read_text()) for folder in folders]
    together = report["repeats"][0]["concatenated"]
    assert [together[n] for n in SCORES] == pytest.approx(brute_force(folders), abs=1e-6)
    for name in SCORES:
        mean = np.mean([test["scores"][name] for test in tests])
        assert report["repeats"][0]["separated"][name] == pytest.approx(mean)
    for test, folder in zip(tests, folders, strict=True):
        assert test["workers"] == 2
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        names = {json.loads(line)["name"] for line in lines}
        measured = {name.split("/")[0] for name in names if name.endswith("/map_at_r")}
        assert measured == {"validation", "test"}
        records = [json.loads(line) for line in lines]
        # Training has measured validation and nothing else; the test came after it, once.
        tested = [i for i, r in enumerate(records) if r["name"].startswith("test/")]
        assert tested == list(range(len(records) - len(tested), len(records)))
        assert len({records[i]["name"] for i in tested}) == len(tested)
        one = next(r for r in records if r["name"] == "test/cosine/map_at_r")
        assert one["value"] == test["scores"]["map_at_r"]
        assert one["step"] == test["best_step"]
        best = max(r["value"] for r in records if r["name"] == "validation/cosine/map_at_r")
        assert test["validation_map_at_r"] == best
    table = (tmp_path / "runs" / "whole" / "protocol" / "table.md").read_text()
    assert table in output
    assert "concatenated (32-D)" in table


def test_a_worker_that_is_killed_ends_all_folds_with_the_name_of_its_own(
    config_file: str, tmp_path: Path
) -> None:
    process = start(config_file, "--workers", "2", "training.epochs=2000")
    folds = [tmp_path / "runs" / "whole" / f"fold-{i}" for i in (0, 1)]
    deadline = time.monotonic() + 90
    while min(newest_step(fold) for fold in folds) < 2:
        assert time.monotonic() < deadline, "the folds did not get going"
        time.sleep(0.05)
    victim = next(
        found
        for found in training_processes(tmp_path)
        if any("fold-1" in word for word in found.cmdline())
        and not {"dist_dml.protocol_guard", "torch.distributed.run"} & set(found.cmdline())
    )
    victim.kill()
    code, output = finish(process)
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("dist_dml: error: fold-1 failed while training")
    assert "was killed" in last or "Signal 9 (SIGKILL) received" in last
    assert str(folds[1] / "protocol.log") in last
    # Launchers and guards count as well.
    assert not training_processes(tmp_path)
