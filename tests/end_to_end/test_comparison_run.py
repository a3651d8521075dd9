"""`dist-dml compare` as a user starts it: killed, resumed, repeated, with a method that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import finish, start_command, steps_trained, training_processes

from dist_dml.tracking.run_files import last_status

pytestmark = pytest.mark.slow


@pytest.fixture
def config_file(divided_data: Path, tmp_path: Path) -> str:
    """Two methods that learn, and one that cannot."""
    path = tmp_path / "methods.yaml"
    path.write_text(
        f"run: {{name: many, root: {tmp_path / 'runs'}}}\n"
        f"data: {{path: {divided_data}, batch_size: 30, loader_processes: 0,\n"
        "  image: {size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}}\n"
        "model: {embedding_dim: 16, norm: batch}\n"
        "training: {epochs: 4}\n"
        "engine: {timeout_seconds: 60, threads: 1}\n"
        "tracking: {mlflow: false, every_steps: 1}\n"
        "variants:\n"
        "  classes: {loss: {name: cross_entropy}}\n"
        "  pairs:\n"
        "    data: {order: balanced, samples_per_class: 6}\n"
        "    loss: {name: multi_similarity}\n"
        "  broken: {optimizer: {name: sgd, learning_rate: 1e+30, momentum: 0.0}}\n"
    )
    return str(path)


def start(config_file: str, *words: str) -> subprocess.Popen[str]:
    """Two folds, two trials of each method, two trainings at the same time."""
    trials = ["--trial", "optimizer.weight_decay=0", "--trial", "optimizer.weight_decay=0.01"]
    numbers = ["--folds", "2", "--parallel", "2"]
    return start_command("compare", config_file, *numbers, *trials, *words)


def test_killed_and_resumed_it_trains_nothing_twice_and_tests_only_what_was_chosen(
    config_file: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs" / "many"
    methods = ["--method", "classes", "--method", "pairs"]
    killed = start(config_file, *methods)
    first = root / "classes" / "trial-0" / "fold-0"
    deadline = time.monotonic() + 90
    while last_status(first).get("status") != "FINISHED":
        assert time.monotonic() < deadline, "no trial has ended"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    deadline = time.monotonic() + 20
    while training_processes(root):
        assert time.monotonic() < deadline, "a worker was left behind"
        time.sleep(0.1)
    assert not list(root.rglob("test.json"))

    code, output = finish(start(config_file, *methods))
    assert code == 0, output
    comparison = json.loads((root / "comparison" / "comparison.json").read_text())
    assert [one["method"] for one in comparison["methods"]] == ["classes", "pairs"]
    for one in comparison["methods"]:
        scores = {trial["trial"]: trial["validation_map_at_r"] for trial in one["trials"]}
        assert scores[one["trial"]] == max(scores.values())
        other = next(name for name in scores if name != one["trial"])
        # What was not chosen has one fold, and was never tested.
        assert [path.name for path in sorted((root / other).iterdir())] == ["fold-0"]
        assert not (root / other / "fold-0" / "test.json").exists()
        for number, run in enumerate(one["runs"]):
            folder = root / one["trial"] / f"fold-{number}"
            assert run["run"] == str(folder)
            tested = json.loads((folder / "test.json").read_text())
            assert run["scores"] == tested["scores"]
            assert set(steps_trained(folder)) == set(range(1, run["total_steps"] + 1))
        # The trial is the first fold: it was trained once.
        assert one["runs"][0]["validation_map_at_r"] == scores[one["trial"]]
    assert set(steps_trained(first).values()) == {1}
    table = (root / "comparison" / "table.md").read_text()
    assert table in output
    assert (root / "comparison" / "comparison.png").stat().st_size > 10_000

    logs = {path: path.read_bytes() for path in root.rglob("protocol.log")}
    code, output = finish(start(config_file, *methods))
    assert code == 0, output
    assert "trials: 0 to run, 4 done before" in output
    assert "folds: 0 to run, 4 done before" in output
    assert logs == {path: path.read_bytes() for path in root.rglob("protocol.log")}

    code, output = finish(start(config_file, *methods, "training.epochs=5"))
    assert code == 2
    assert "training.epochs 4 -> 5" in output


def test_a_method_that_fails_is_named_and_the_others_have_their_table(
    config_file: str, tmp_path: Path
) -> None:
    code, output = finish(start(config_file, "--method", "broken", "--method", "classes"))
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("dist_dml: error: broken failed and is not in the table")
    assert "learning_rate" in last
    table = (tmp_path / "runs" / "many" / "comparison" / "table.md").read_text()
    assert "| classes" in table
    assert "broken/trial-1/fold-0 failed while training" in table
    assert not training_processes(tmp_path)
