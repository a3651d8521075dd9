"""The run in MLflow that stands for a run folder: found or made, with params, tags and data set.

All calls go through an `MlflowClient` with an explicit address: nothing here reads or changes
MLflow's global state (active run, tracking URI).
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dist_dml.errors import UsageError
from dist_dml.tracking.destination import Destination
from dist_dml.tracking.run_files import CONFIG

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run
    from mlflow.tracking import MlflowClient

# Limits of MLflow 3.17 (mlflow/utils/validation.py), in characters and entries a call.
MOST_KEY = 250
MOST_PARAM = 6000
MOST_TAG = 5000
MOST_DIGEST = 36
MOST_PARAMS_A_CALL = 100

RUN_ID_TAG = "dist_dml.run_id"
PARENT_TAG = "mlflow.parentRunId"
"""By which MLflow's pages show runs below another."""


def connect(destination: Destination) -> MlflowClient:
    """A client of the destination's store. The first one creates and migrates a local database."""
    from mlflow.tracking import MlflowClient

    if destination.artifact_root is not None:
        destination.artifact_root.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=destination.address)


def mlflow_name(name: str) -> str:
    """`name` with what MLflow refuses in keys replaced: "sop@1//x" becomes "sop_1/x"."""
    allowed = re.sub(r"[^\w.\- :/]", "_", name, flags=re.ASCII)
    return posixpath.normpath(allowed).lstrip("./")[:MOST_KEY] or "_"


def experiment_id(client: MlflowClient, destination: Destination) -> str:
    """The id of the destination's experiment, which is made if there is none.

    Raises:
        UsageError: if the experiment lies in MLflow's bin, where nothing can be logged to it.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(destination.experiment)
    if found is None:
        location = destination.artifact_root
        try:
            return client.create_experiment(
                destination.experiment, location.as_uri() if location else None
            )
        except MlflowException as error:
            # Another run of the same moment may have made it between the two calls.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(destination.experiment)
    assert found is not None
    if found.lifecycle_stage != "active":
        raise UsageError(
            f"the MLflow experiment {destination.experiment!r} has been deleted; restore it, or "
            "name another with tracking.experiment"
        )
    return found.experiment_id


def find_run(
    client: MlflowClient, experiment: str, identity: dict[str, Any], known: str | None
) -> Run | None:
    """The run of this identity in the experiment: by its MLflow id if `known`, else by its tag.

    A deleted run, and one in another experiment, count as absent.
    """
    from mlflow.exceptions import MlflowException

    if known is not None:
        try:
            run = client.get_run(known)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment:
                return run
    found = _runs_of(client, experiment, identity)
    return max(found, key=lambda run: len(run.data.metrics), default=None)


def link_parent(client: MlflowClient, experiment: str, run: Run, parent: str) -> bool:
    """Put the run below the one of identity `parent`, if the store has that already.

    Args:
        client: of the store.
        experiment: both runs' experiment.
        run: the child.
        parent: `run_id` in the parent's run.json.
    """
    found = find_run(client, experiment, {"run_id": parent}, None)
    if found is None:
        return False
    if run.data.tags.get(PARENT_TAG) != found.info.run_id:
        client.set_tag(run.info.run_id, PARENT_TAG, found.info.run_id)
    return True


def remove_twins(
    client: MlflowClient, experiment: str, identity: dict[str, Any], run_id: str
) -> None:
    """Delete further runs of this identity that hold no records.

    They come from requests whose answer was lost or late: MLflow's client asks again, and the
    server makes a run each time.
    """
    for twin in _runs_of(client, experiment, identity):
        if twin.info.run_id != run_id and not twin.data.metrics:
            client.delete_run(twin.info.run_id)


def _runs_of(client: MlflowClient, experiment: str, identity: dict[str, Any]) -> list[Run]:
    rule = f"tags.`{RUN_ID_TAG}` = '{identity['run_id']}'"
    return list(client.search_runs([experiment], filter_string=rule))


def create_run(
    client: MlflowClient, experiment: str, identity: dict[str, Any], run_name: str
) -> Run:
    """A new run that carries the identity's `run_id` as a tag and began when the folder did."""
    return client.create_run(
        experiment,
        start_time=int(1000 * identity["started_at"]),
        tags={RUN_ID_TAG: identity["run_id"]},
        run_name=run_name,
    )


def flatten_config(content: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; lists and other values as JSON, strings as they are.

    >>> flatten_config({"loss": {"bias": True, "name": "x"}, "a": [1, 2]})
    {'loss.bias': 'true', 'loss.name': 'x', 'a': '[1, 2]'}
    """
    if isinstance(content, dict):
        flat: dict[str, str] = {}
        for key, value in content.items():
            flat |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {
        prefix: content
        if isinstance(content, str)
        else json.dumps(content, default=str, sort_keys=True)
    }


def log_config(client: MlflowClient, run: Run, folder: Path) -> None:
    """Log `config.yaml` as an artifact and its values as params.

    Params cannot change in MLflow. Values that differ from those logged at first, as of a run
    resumed with another config, become tags `config_changed.KEY`.
    """
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    client.log_artifact(run_id, str(folder / CONFIG))
    content = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    flat = flatten_config(content) if isinstance(content, dict) else {}
    before = run.data.params
    params, tags = [], []
    for key, value in flat.items():
        key, value = mlflow_name(key), value[:MOST_PARAM]
        if key not in before:
            params.append(Param(key, value))
        elif before[key] != value:
            tags.append(RunTag(f"config_changed.{key}"[:MOST_KEY], value[:MOST_TAG]))
    for start in range(0, len(params), MOST_PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + MOST_PARAMS_A_CALL])
    for start in range(0, len(tags), MOST_PARAMS_A_CALL):
        client.log_batch(run_id, tags=tags[start : start + MOST_PARAMS_A_CALL])


def log_facts(
    client: MlflowClient, run: Run, identity: dict[str, Any], config: dict[str, Any]
) -> None:
    """Log the facts of `run.json` as tags, and the data set as the run's training input."""
    from mlflow.entities import RunTag

    facts = {k: v for k, v in identity.items() if isinstance(v, str) and k != "run_id"}
    own = (config.get("tracking") or {}).get("tags")
    facts |= {str(key): str(value) for key, value in (own if isinstance(own, dict) else {}).items()}
    if "git_commit" in facts:
        facts["mlflow.source.git.commit"] = facts["git_commit"]  # The UI's "version" column.
    tags = [
        RunTag(mlflow_name(key), value[:MOST_TAG])
        for key, value in facts.items()
        if run.data.tags.get(mlflow_name(key)) != value[:MOST_TAG]
    ]
    for start in range(0, len(tags), MOST_PARAMS_A_CALL):
        client.log_batch(run.info.run_id, tags=tags[start : start + MOST_PARAMS_A_CALL])
    if "dataset_fingerprint" in facts:
        digest = facts["dataset_fingerprint"][:MOST_DIGEST]
        logged = run.inputs.dataset_inputs if run.inputs else []
        if digest not in [entry.dataset.digest for entry in logged]:
            client.log_inputs(run.info.run_id, datasets=[_dataset_input(digest, config)])


def _dataset_input(digest: str, config: dict[str, Any]) -> DatasetInput:
    """The data set as MLflow knows it: name, digest and place. Nothing of it is read.

    Built from entities, as `mlflow.data.MetaDataset` would import pandas and offers no digest.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = config.get("data") or {}
    path = str(data.get("path", ""))
    dataset = Dataset(
        name=Path(path).name[:500] or "dataset",
        digest=digest,
        source_type="local",
        source=json.dumps({"uri": path}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", str(data.get("split", "train")))])
