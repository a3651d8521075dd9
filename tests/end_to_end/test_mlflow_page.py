"""MLflow's pages after a comparison, in a browser: what a user finds there without any work."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import finish, free_port, kill_tree, start_command

from dist_dml.config import TrackingConfig
from dist_dml.tracking.destination import destination_of
from dist_dml.tracking.mlflow_run import connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome here"),
]


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


@pytest.fixture(scope="module")
def page(root: Path) -> Iterator[tuple[str, Any]]:
    """The address of `dist-dml ui`, and a browser's page."""
    api = pytest.importorskip("playwright.sync_api")
    port = free_port()
    process = start_command("ui", "--root", str(root), "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while not answers(url):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the UI did not come up"
            time.sleep(0.3)
        with api.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(60_000)
            yield url, page
            browser.close()
    finally:
        kill_tree(process.pid)
        process.communicate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_the_pages_show_the_tree_the_curves_and_the_methods_beside_each_other(
    runs: dict[str, Any], page: tuple[str, Any], tmp_path: Path
) -> None:
    url, browser = page
    experiment = runs["many"].info.experiment_id
    place = f"{url}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    browser.goto(place)
    browser.get_by_text("many", exact=True).first.wait_for()
    browser.goto(f"{place}&compareRunsMode=CHART")
    browser.get_by_text("protocol/separated/map_at_r").first.wait_for()
    chosen = [runs[f"many/{m}/trial-0/protocol"].info.run_id for m in ("classes", "pairs")]
    ids = json.dumps(chosen, separators=(",", ":"))
    browser.goto(f'{url}/#/compare-runs?runs={ids}&experiments=["{experiment}"]')
    browser.get_by_text("protocol/separated/map_at_r").first.wait_for()
    text = browser.inner_text("body")
    assert "multi_similarity" in text
    assert "cross_entropy" in text
    browser.goto(f"{url}/#/experiments/{experiment}/runs/{runs['many'].info.run_id}")
    browser.get_by_text("P@1").first.wait_for()  # The table, as the run's description.
    picture = tmp_path / "page.png"
    browser.screenshot(path=str(picture))
    assert picture.stat().st_size > 10_000
