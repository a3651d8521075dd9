"""`dist-dml compare` as a user starts it: killed, resumed, repeated, with a method that fails; what
it leaves in MLflow, and what a person sees of that in a browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import (
    ROOT,
    finish,
    free_port,
    start_command,
    steps_trained,
    training_processes,
    wait_for_no_worker,
)

sys.path.insert(0, str(ROOT / "tools"))  # The modules of a tool lie beside it and are no package.

from mlflow_pages import METHOD_SCORE, Pages, pages, runs_of

from dist_dml.config import TrackingConfig
from dist_dml.tracking.run_files import last_status

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
METHODS = ["--method", "classes", "--method", "pairs"]


@dataclass(frozen=True)
class Compared:
    """A comparison that was killed when its first training had ended, and gone on with."""

    config_file: str
    root: Path
    code: int
    output: str
    tested_when_killed: list[Path]


@pytest.fixture(scope="module")
def compared(divided_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two methods that learn, and one that cannot."""
    folder = tmp_path_factory.mktemp("compared")
    path = folder / "methods.yaml"
    path.write_text(
        f"run: {{name: many, root: {folder / 'runs'}}}\n"
        f"data: {{path: {divided_data}, batch_size: 30, loader_processes: 0,\n"
        "  image: {size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}}\n"
        "model: {embedding_dim: 16, norm: batch}\n"
        "training: {epochs: 4}\n"
        "engine: {timeout_seconds: 60, threads: 1}\n"
        "tracking: {every_steps: 1, system_metrics: false}\n"
        "variants:\n"
        "  classes: {loss: {name: cross_entropy}}\n"
        "  pairs:\n"
        "    data: {order: balanced, samples_per_class: 6}\n"
        "    loss: {name: multi_similarity}\n"
        "  broken: {optimizer: {name: sgd, learning_rate: 1e+30, momentum: 0.0}}\n"
    )
    root = folder / "runs" / "many"
    killed = start(str(path), *METHODS)
    first = root / "classes" / "trial-0" / "fold-0"
    deadline = time.monotonic() + 180
    while last_status(first).get("status") != "FINISHED":
        assert time.monotonic() < deadline, "no trial has ended"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    wait_for_no_worker(root, 60)  # Mirrors send what they have first.
    tested = list(root.rglob("test.json"))
    code, output = finish(start(str(path), *METHODS), 400)
    return Compared(str(path), root, code, output, tested)


def start(config_file: str, *words: str) -> subprocess.Popen[str]:
    """Two folds, two trials of each method, two trainings at the same time."""
    trials = ["--trial", "optimizer.weight_decay=0", "--trial", "optimizer.weight_decay=0.01"]
    numbers = ["--folds", "2", "--parallel", "2"]
    return start_command("compare", config_file, *numbers, *trials, *words)


def comparison_of(compared: Compared) -> dict[str, Any]:
    return json.loads((compared.root / "comparison" / "comparison.json").read_text())


def test_killed_and_resumed_it_trains_nothing_twice_and_tests_only_what_was_chosen(
    compared: Compared,
) -> None:
    assert not compared.tested_when_killed
    assert compared.code == 0, compared.output
    root, comparison = compared.root, comparison_of(compared)
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
    assert set(steps_trained(root / "classes" / "trial-0" / "fold-0").values()) == {1}
    table = (root / "comparison" / "table.md").read_text()
    assert table in compared.output
    assert (root / "comparison" / "comparison.png").stat().st_size > 10_000
    assert "MLflow does not have" not in compared.output


def test_again_nothing_runs_and_other_settings_are_refused(compared: Compared) -> None:
    logs = {path: path.read_bytes() for path in compared.root.rglob("protocol.log")}
    code, output = finish(start(compared.config_file, *METHODS))
    assert code == 0, output
    assert "trials: 0 to run, 4 done before" in output
    assert "folds: 0 to run, 4 done before" in output
    assert logs == {path: path.read_bytes() for path in compared.root.rglob("protocol.log")}

    code, output = finish(start(compared.config_file, *METHODS, "training.epochs=5"))
    assert code == 2
    assert "training.epochs 4 -> 5" in output


@pytest.fixture(scope="module")
def runs(compared: Compared) -> dict[str, Any]:
    """All runs that MLflow has, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runs_of(compared.root.parent, TrackingConfig().experiment)


@pytest.fixture(scope="module")
def rows(compared: Compared, runs: dict[str, Any]) -> list[Any]:
    """What MLflow has of the methods: one run each."""
    chosen = [one["trial"] for one in comparison_of(compared)["methods"]]
    return [runs[f"many/{trial}/protocol"] for trial in chosen]


def test_in_mlflow_it_is_a_tree_with_scores_tags_and_tables(
    compared: Compared, runs: dict[str, Any], rows: list[Any]
) -> None:
    methods = comparison_of(compared)["methods"]
    folds = [f"many/{one['trial']}/fold-{i}" for one in methods for i in (0, 1)]
    tried = [f"many/{trial['trial']}/fold-0" for one in methods for trial in one["trials"]]
    assert set(runs) == {"many", *folds, *tried, *(run.info.run_name for run in rows)}
    top = runs["many"]
    assert top.data.tags["kind"] == "comparison"
    assert "| method |" in top.data.tags["mlflow.note.content"].replace("  ", " ")
    for name, run in runs.items():
        assert run.info.status == "FINISHED", name
        if name != "many":
            assert run.data.tags["mlflow.parentRunId"] == top.info.run_id
            assert run.data.tags["method"] == name.split("/")[1]
    for name in folds:
        metrics = runs[name].data.metrics
        assert {"test/cosine/map_at_r", "validation/cosine/map_at_r", "seconds"} <= set(metrics)
        assert runs[name].inputs.dataset_inputs
    for one, run in zip(methods, rows, strict=True):
        path = compared.root / one["trial"] / "protocol" / "protocol.json"
        report = json.loads(path.read_text())
        mean = report["over_repeats"]["separated"]["map_at_r"]["mean"]
        assert run.data.metrics[METHOD_SCORE] == pytest.approx(mean)
        assert run.data.params["loss.name"] == report["loss"]
        cost = report["over_runs"]["best_images_seen"]["mean"]
        assert run.data.metrics["images_seen"] == pytest.approx(cost, abs=0.5)


@pytest.fixture(scope="module")
def opened(compared: Compared) -> Iterator[Pages]:
    """What `dist-dml ui` serves, in a browser."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no chromium on the PATH, or no playwright")
    with pages(compared.root.parent, free_port(), CHROMIUM) as opened:
        yield opened


def test_the_list_of_runs_opens_into_the_tree(
    runs: dict[str, Any], rows: list[Any], opened: Pages
) -> None:
    opened.tree(runs["many"].info.experiment_id, "many")
    for run in rows:
        opened.page.get_by_text(run.info.run_name, exact=True).first.wait_for()


def test_methods_beside_each_other_show_scores_and_what_differs(
    rows: list[Any], opened: Pages
) -> None:
    opened.beside(rows, METHOD_SCORE)
    text = opened.page.inner_text("body")
    for run in rows:
        assert run.data.params["loss.name"] in text
        assert f"{run.data.metrics[METHOD_SCORE]:.3f}"[:-1] in text


def test_the_parent_shows_the_table(runs: dict[str, Any], opened: Pages) -> None:
    opened.described(runs["many"])
    opened.page.get_by_role("cell", name="pairs", exact=True).first.wait_for()


def test_all_runs_of_the_tree_are_drawn_together(runs: dict[str, Any], opened: Pages) -> None:
    opened.drawn(runs["many"].info.experiment_id, "many", "test/cosine/map_at_r")


def test_the_curves_of_a_fold_are_drawn(
    compared: Compared, runs: dict[str, Any], opened: Pages
) -> None:
    trial = comparison_of(compared)["methods"][0]["trial"]
    opened.curves(runs[f"many/{trial}/fold-0"], "validation/cosine/map_at_r")


def test_a_method_that_fails_is_named_and_the_others_have_their_table(compared: Compared) -> None:
    code, output = finish(start(compared.config_file, "--method", "broken", "--method", "classes"))
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("dist_dml: error: broken failed and is not in the table")
    assert "learning_rate" in last
    table = (compared.root / "comparison" / "table.md").read_text()
    assert "| classes" in table
    assert "broken/trial-1/fold-0 failed while training" in table
    assert not training_processes(compared.root)
