"""What a comparison leaves in MLflow: a tree of runs with scores, tags and tables."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from launching import finish, start_command

from dist_dml.config import TrackingConfig
from dist_dml.tracking.destination import destination_of
from dist_dml.tracking.mlflow_run import connect

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(divided_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two methods over two folds, as a user runs it."""
    folder = tmp_path_factory.mktemp("compared")
    path = folder / "methods.yaml"
    path.write_text(
        f"run: {{name: many, root: {folder / 'runs'}}}\n"
        f"data: {{path: {divided_data}, batch_size: 30, loader_processes: 0,\n"
        "  image: {size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}}\n"
        "model: {embedding_dim: 16, norm: batch}\n"
        "training: {epochs: 6}\n"
        "engine: {timeout_seconds: 60, threads: 1}\n"
        "tracking: {every_steps: 1, system_metrics: false}\n"
        "variants:\n"
        "  classes: {loss: {name: cross_entropy}}\n"
        "  pairs:\n"
        "    data: {order: balanced, samples_per_class: 6}\n"
        "    loss: {name: multi_similarity}\n"
    )
    code, output = finish(start_command("compare", str(path), "--folds", "2", "--parallel", "2"))
    assert code == 0, output
    assert "MLflow does not have" not in output
    return folder / "runs"


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    """All runs that MLflow has, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        destination = destination_of(TrackingConfig(), root, "many")
        client = connect(destination)
        experiment = client.get_experiment_by_name(destination.experiment)
        assert experiment is not None
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_a_comparison_is_a_tree_with_scores_tags_and_tables(runs: dict[str, Any]) -> None:
    parts = [f"many/{m}/trial-0" for m in ("classes", "pairs")]
    folds = [f"{part}/fold-{i}" for part in parts for i in (0, 1)]
    methods = [f"{part}/protocol" for part in parts]
    assert set(runs) == {"many", *folds, *methods}
    top = runs["many"]
    assert top.data.tags["kind"] == "comparison"
    assert "| method |" in top.data.tags["mlflow.note.content"].replace("  ", " ")
    for name in (*folds, *methods):
        assert runs[name].data.tags["mlflow.parentRunId"] == top.info.run_id
        assert runs[name].data.tags["method"] == name.split("/")[1]
        assert runs[name].info.status == "FINISHED"
    for name in folds:
        metrics = runs[name].data.metrics
        assert {"test/cosine/map_at_r", "validation/cosine/map_at_r", "seconds"} <= set(metrics)
        assert runs[name].inputs.dataset_inputs
    for name, part in zip(methods, parts, strict=True):
        report = json.loads((Path(top_root(runs)) / part / "protocol/protocol.json").read_text())
        mean = report["over_repeats"]["separated"]["map_at_r"]["mean"]
        assert runs[name].data.metrics["protocol/separated/map_at_r"] == pytest.approx(mean)
        assert runs[name].data.params["loss.name"] == report["loss"]


def top_root(runs: dict[str, Any]) -> str:
    return runs["many"].data.params["run.root"]
