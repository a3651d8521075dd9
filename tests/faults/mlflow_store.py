"""A real MLflow server on the loopback, and what it holds of a run beside what it should hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from launching import BIN, free_port

from dist_dml.tracking import run_files
from dist_dml.tracking.mlflow_run import mlflow_name

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass
class Store:
    """A real MLflow server: its port, and where its artifacts lie."""

    port: int
    artifacts: Path


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Store]:
    """A server over a database in `folder`, until the block ends. It answers after seconds."""
    store = Store(free_port(), folder / "artifacts")
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(store.port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(store.artifacts)]
    calm = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | calm, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield store
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def client_of(store: Store) -> MlflowClient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow uses what its own libraries have deprecated.
        from mlflow.tracking import MlflowClient

        return MlflowClient(f"http://127.0.0.1:{store.port}")


def contents(store: Store, experiment: str) -> dict[str, Any]:
    """Everything that MLflow holds of the one run of an experiment."""
    return held_by(client_of(store), experiment, store.artifacts)


def held_by(client: MlflowClient, experiment: str, artifacts: Path) -> dict[str, Any]:
    """`contents` of a client's store; `artifacts` is where a server has them."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    metrics = {
        name: [
            (m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
    }
    folder = artifacts / found.experiment_id / run.info.run_id / "artifacts"
    if run.info.artifact_uri.startswith("file:"):  # A database without a server.
        folder = Path(unquote(urlsplit(run.info.artifact_uri).path))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "metrics": {name: sorted(map(repr, history)) for name, history in metrics.items()},
        "points": {
            name: sorted((step, repr(value)) for step, _, value in history)
            for name, history in metrics.items()
        },
        "params": run.data.params,
        "tags": run.data.tags,
        "status": run.info.status,
        "data": [entry.dataset.digest for entry in run.inputs.dataset_inputs],
        "artifacts": {str(path.relative_to(folder)): path.read_bytes() for path in files},
    }


def expected_points(folder: Path, file: str) -> dict[str, list[tuple[int, str]]]:
    """What the records of a run folder are in MLflow: each once."""
    records = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    points: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        name = mlflow_name(record["name"])
        points.setdefault(name, []).append((record["step"], repr(float(record["value"]))))
    if file == run_files.METRICS:
        progress = {r["step"]: (r["images_seen"], r["seconds"]) for r in records}
        points["images_seen"] = [(s, repr(float(images))) for s, (images, _) in progress.items()]
        points["seconds"] = [(s, repr(float(seconds))) for s, (_, seconds) in progress.items()]
    return {name: sorted(each) for name, each in points.items()}


def records_of(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """`expected_points` of all records of a run folder, those of the machine's load included."""
    expected = expected_points(folder, run_files.METRICS)
    if (folder / run_files.SYSTEM).exists():
        expected |= expected_points(folder, run_files.SYSTEM)
    return expected
