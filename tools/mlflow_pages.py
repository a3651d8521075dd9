"""MLflow's pages in a headless browser: for the pictures of docs/mlflow.md, and for its test.

    python tools/mlflow_pages.py --root runs --compared losses --searched tune tune \\
        --benchmarks runs/categories runs/scaling

Needs `make browser` and playwright. The addresses and labels are those of MLflow 3, which promises
none of them: after an update of MLflow, tests/end_to_end/test_comparison_run.py says what moved.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_dml.config import TrackingConfig
from dist_dml.tracking.destination import destination_of
from dist_dml.tracking.mlflow_run import connect

METHOD_SCORE = "protocol/separated/map_at_r"
BENCHMARKS = "benchmarks"
CURVES = {"categories": "step_seconds", "scaling": "step_seconds"}
"""The benchmarks that have a run, and what is shown of each."""
_WIDTH, _HEIGHT = 1500, 950
_WAIT_SECONDS = 90.0
_NO_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
_KIND = "workflowType=machine_learning"


class Pages:
    """A browser before a server of MLflow.

    Args:
        url: of the server.
        browser: of playwright.

    Attributes:
        page: that is open.
    """

    def __init__(self, url: str, browser: Any) -> None:
        self._url, self._browser = url, browser
        self.page: Any = None

    def _go(self, place: str) -> None:
        """Open a page that remembers nothing of others: which rows were open, for example."""
        if self.page is not None:
            self.page.context.close()
        self.page = self._browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
        self.page.set_default_timeout(1000 * _WAIT_SECONDS)
        # Its assistant takes a third of the page, and nobody here answers it.
        self.page.add_init_script(_NO_ASSISTANT)
        self.page.goto(f"{self._url}/#{place}")

    def tree(self, experiment: str, name: str) -> None:
        """The list of runs, with the row `name` opened."""
        self._go(f"/experiments/{experiment}/runs?{_KIND}")
        cell = self.page.get_by_text(name, exact=True).first
        cell.wait_for()
        row = self.page.locator(".ag-row", has=cell).first
        row.get_by_role("button").first.click()

    def beside(self, runs: Sequence[Any], metric: str) -> None:
        """Runs beside each other: parallel coordinates, parameters, metrics."""
        ids = json.dumps([run.info.run_id for run in runs], separators=(",", ":"))
        experiments = json.dumps([runs[0].info.experiment_id])
        self._go(f"/compare-runs?runs={ids}&experiments={experiments}&{_KIND}")
        self.page.get_by_text(metric, exact=True).last.wait_for()

    def described(self, run: Any) -> None:
        """A run's own page, with its whole description."""
        self._go(f"/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?{_KIND}")
        more = self.page.get_by_text("Show more").first
        more.wait_for()
        more.click()

    def curves(self, run: Any, metrics: str) -> None:
        """Some of a run's metrics, drawn."""
        place = f"/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        self._go(f"{place}/model-metrics?{_KIND}")
        self._search(metrics)

    def _search(self, metrics: str) -> None:
        self.page.get_by_placeholder("Search metric charts").fill(metrics)
        # Of a legend: "RUN (METRIC)".
        self.page.get_by_text(re.compile(rf"\(\S*{re.escape(metrics)}\S*\)")).first.wait_for()
        self.page.locator(".js-plotly-plot").first.wait_for()

    def drawn(self, experiment: str, name: str, metrics: str) -> None:
        """The list of runs as charts of some metrics, with the tree of `name` opened."""
        self.tree(experiment, name)
        self.page.locator("label", has=self.page.locator("input[value=CHART]")).click()
        self._search(metrics)

    def save(self, path: Path) -> None:
        """A picture of what is seen, when it has come to rest."""
        self.page.wait_for_timeout(3000)
        self.page.screenshot(path=str(path))
        print(path, flush=True)


@contextmanager
def pages(root: Path, port: int, chromium: str) -> Iterator[Pages]:
    """Serve the runs below `root` as `dist-dml ui` does, and open a browser before them."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "dist_dml.cli", "ui", "--root", str(root), "--port", str(port)]
    silent = subprocess.DEVNULL
    server = subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + _WAIT_SECONDS
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"`dist-dml ui --root {root}` does not answer at {url}")
            time.sleep(0.3)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            yield Pages(url, browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def runs_of(root: Path, experiment: str) -> dict[str, Any]:
    """All runs of an experiment below `root`, by name; {} if MLflow has no such experiment."""
    client = connect(destination_of(TrackingConfig(), root, ""))
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    return {str(run.info.run_name): run for run in client.search_runs([found.experiment_id])}


def run_of(root: Path, experiment: str, name: str) -> Any:
    """One run; without it the program ends and says which there are."""
    runs = runs_of(root, experiment)
    if name not in runs:
        raise SystemExit(
            f"error: MLflow has no run {name!r} in experiment {experiment!r} below {root}; "
            f"it has {', '.join(sorted(runs)) or 'none'}"
        )
    return runs[name]


def take_pictures(opened: Pages, root: Path, compared: str, out: Path) -> None:
    """The pictures of docs/mlflow.md that show a comparison."""
    parent = run_of(root, TrackingConfig().experiment, compared)
    runs = runs_of(root, TrackingConfig().experiment)
    wanted = {"mlflow.parentRunId": parent.info.run_id, "kind": "method"}
    methods = [run for run in runs.values() if wanted.items() <= run.data.tags.items()]
    opened.tree(parent.info.experiment_id, compared)
    opened.save(out / "mlflow_tree.png")
    opened.beside(methods, METHOD_SCORE)
    opened.page.get_by_text(METHOD_SCORE, exact=True).last.scroll_into_view_if_needed()
    opened.save(out / "mlflow_methods.png")
    opened.described(parent)
    opened.save(out / "mlflow_table.png")


def take_trials(opened: Pages, root: Path, experiment: str, searched: str, out: Path) -> None:
    """The picture of docs/mlflow.md that shows the trials of a search."""
    run = run_of(root, experiment, searched)
    opened.drawn(run.info.experiment_id, searched, "train/")
    opened.save(out / "mlflow_trials.png")


def take_curves(opened: Pages, root: Path, out: Path) -> None:
    """Pictures of the benchmarks that MLflow has below `root`."""
    runs = runs_of(root, BENCHMARKS)
    for name in sorted(CURVES.keys() & runs.keys()):
        opened.curves(runs[name], CURVES[name])
        opened.save(out / f"mlflow_{name}.png")


def main() -> int:
    """Take the pictures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--compared", metavar="NAME", help="run of a comparison")
    parser.add_argument(
        "--searched", nargs=2, metavar=("EXPERIMENT", "NAME"), help="run of a search"
    )
    parser.add_argument(
        "--benchmarks", type=Path, nargs="*", default=[], metavar="OUT", help="of tools, --mlflow"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for pictures")
    parser.add_argument("--port", type=int, default=5077)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error("no chromium on the PATH; `make browser` installs one")
    with pages(arguments.root, arguments.port, chromium) as opened:
        if arguments.compared:
            take_pictures(opened, arguments.root, arguments.compared, arguments.out)
        if arguments.searched:
            experiment, name = arguments.searched
            take_trials(opened, arguments.root, experiment, name, arguments.out)
    for root in arguments.benchmarks:
        with pages(root, arguments.port, chromium) as opened:
            take_curves(opened, root, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
