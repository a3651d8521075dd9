"""Replaying a run folder into MLflow: each call sends what the store does not have yet.

The folder is the source of truth and MLflow a copy: calls may be interrupted anywhere, repeated,
and directed to several stores. What a store has received is kept in `mlflow.json`; each metric's
timestamp follows from the record alone, so that a record that is sent twice, because the process
died before it could note the first time, is the same row of the store's table.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dist_dml.errors import RunError
from dist_dml.tracking import mlflow_run, run_files
from dist_dml.tracking.destination import Destination
from dist_dml.tracking.received import Received, description_of, load_received, save_received

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

MOST_METRICS_A_CALL = 1000
LOCK_SECONDS = 30.0


def mirror_once(folder: Path, destination: Destination) -> str:
    """Send what is new in `folder` to the destination. Returns MLflow's id of the run.

    Creates the run if the store has none of this identity. Metrics travel up to 1000 a call, with
    `images_seen` and `seconds` as metrics of their own. A step that a resumed run repeats is not
    sent again: the curves keep its first values.

    Raises:
        UsageError: if the experiment has been deleted.
        RunError: if another process mirrors this folder and does not finish.
        Exception: whatever MLflow raises when the store does not answer. All that was sent up to
            then is noted, and the next call goes on there.
    """
    with _one_at_a_time(folder):
        identity = run_files.identify_run(folder, {})
        client = mlflow_run.connect(destination)
        received = load_received(folder, destination)
        experiment = mlflow_run.experiment_id(client, destination)
        run = mlflow_run.find_run(client, experiment, identity, received.run_id)
        if run is None:
            run = mlflow_run.create_run(client, experiment, identity, destination.run_name)
        if run.info.run_id != received.run_id:
            last_step = _last_steps(client, run.info.run_id, list(run.data.metrics))
            received = Received(run_id=run.info.run_id, last_step=last_step)
            save_received(folder, destination, received)
        if not received.has_parent:
            # Nothing waits for it: a parent that comes later is found by a later call.
            parent = str((_config(folder).get("tracking") or {}).get("parent") or "")
            received.has_parent = not parent or mlflow_run.link_parent(
                client, experiment, run, parent
            )
            save_received(folder, destination, received)
        description = description_of(folder)
        if received.described != description:
            config = _config(folder)
            if config:
                mlflow_run.log_config(client, run, folder)
            mlflow_run.log_facts(client, run, identity, config)
            received.described = description
            save_received(folder, destination, received)
        for name in (run_files.METRICS, *run_files.system_files(folder)):
            _send_metrics(client, folder, destination, received, name, identity["started_at"])
        _send_artifacts(client, folder, destination, received)
        # At its begin and at its end: a request that was late may have come to effect meanwhile.
        if received.status != run_files.last_status(folder):
            mlflow_run.remove_twins(client, experiment, identity, run.info.run_id)
        _send_status(client, folder, destination, received)
        return run.info.run_id


def _send_metrics(
    client: MlflowClient,
    folder: Path,
    destination: Destination,
    received: Received,
    name: str,
    started_at: float,
) -> None:
    """Send the new lines of one JSONL file, noting after each call what has arrived."""
    assert received.run_id is not None
    while True:
        offset = received.offsets.get(name, 0)
        lines, following = run_files.complete_lines(folder / name, offset)
        if following == offset:
            return
        if name == run_files.METRICS:
            lines = list(_with_progress(lines))
        metrics = _fresh(lines, received.last_step, started_at)
        for start in range(0, len(metrics), MOST_METRICS_A_CALL):
            chunk = metrics[start : start + MOST_METRICS_A_CALL]
            client.log_batch(received.run_id, metrics=chunk)
            received.last_step |= {metric.key: metric.step for metric in chunk}
            save_received(folder, destination, received)
        received.offsets[name] = following
        save_received(folder, destination, received)


def _with_progress(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines, and at each new step the images seen and the seconds as figures of their own."""
    step = None
    for line in lines:
        if line["step"] != step:
            step = line["step"]
            yield line | {"name": "images_seen", "value": line["images_seen"]}
            yield line | {"name": "seconds", "value": line["seconds"]}
        yield line


def _fresh(
    lines: list[dict[str, Any]], last_step: dict[str, int], started_at: float
) -> list[Metric]:
    """The records beyond each name's last step. Timestamps are milliseconds of the Unix epoch."""
    from mlflow.entities import Metric

    newest = dict(last_step)
    metrics = []
    for line in lines:
        key = mlflow_run.mlflow_name(line["name"])
        if line["step"] > newest.get(key, -1):
            newest[key] = line["step"]
            timestamp = int(1000 * (started_at + line["seconds"]))
            metrics.append(Metric(key, float(line["value"]), timestamp, line["step"]))
    return metrics


def _last_steps(client: MlflowClient, run_id: str, names: list[str]) -> dict[str, int]:
    """The last step of each metric as the store itself has it, for a folder without state."""
    histories = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: max(entry.step for entry in h) for name, h in histories.items() if h}


def _send_artifacts(
    client: MlflowClient, folder: Path, destination: Destination, received: Received
) -> None:
    """Upload the files that were noted. One that is gone meanwhile is passed over.

    So is one outside the run folder: a folder that comes from elsewhere must not send this
    machine's files to a server.
    """
    assert received.run_id is not None
    name = run_files.EVENTS
    while True:
        offset = received.offsets.get(name, 0)
        lines, following = run_files.complete_lines(folder / name, offset)
        if following == offset:
            return
        for path, target in {(e["path"], e.get("folder")): None for e in lines if "path" in e}:
            if not (folder / path).resolve().is_relative_to(folder.resolve()):
                run_files.note_problem(folder, f"{path} lies outside the run folder; not uploaded")
            elif (folder / path).is_file():
                client.log_artifact(received.run_id, str(folder / path), target or None)
            else:
                run_files.note_problem(folder, f"{path} is not there any more; not uploaded")
        received.offsets[name] = following
        save_received(folder, destination, received)


def _send_status(
    client: MlflowClient, folder: Path, destination: Destination, received: Received
) -> None:
    """Give the run in MLflow the status of the folder's last status event."""
    assert received.run_id is not None
    status = run_files.last_status(folder)
    if not status or status == received.status:
        return
    if status["status"] == "RUNNING":
        client.update_run(received.run_id, status="RUNNING")
    else:
        client.set_terminated(received.run_id, status["status"], int(1000 * status["time"]))
    received.status = status
    save_received(folder, destination, received)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / run_files.CONFIG
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes do not create the run twice.

    The kernel frees the lock when its holder dies. File systems without locks go without.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    with (folder / "mlflow.lock").open("w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"another process is mirroring {folder} to MLflow; try again when it ends"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break
        yield
