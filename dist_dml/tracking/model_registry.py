"""An exported model in MLflow: logged beside its run with signature and input example, registered.

All calls go through an `MlflowClient` with an explicit address, as in `mlflow_run`: MLflow's global
state (active run, tracking URI) stays as it is.

Dimensions: n images, S = `data.image.size`, C channels, D features of an embedding.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from dist_dml.credentials import redact
from dist_dml.errors import RunError, UsageError
from dist_dml.models.export_formats import FILES, read_onnx
from dist_dml.tracking.destination import Destination, destination_of, root_of, stored_config

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

_REFUSALS = ("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED")
_EXTRA_FILES = ("README.md", "config.json", "preprocessing.json", "embed_images.py")


@dataclass(frozen=True)
class Registered:
    """Where a model is now.

    Attributes:
        name: of the registered model.
        version: the number that this one has got.
        store: the tracking server or database, without secrets.
        run_id: MLflow's id of the run that it stands beside.
    """

    name: str
    version: int
    store: str
    run_id: str


def check_registry() -> None:
    """Refuse, before any work, if MLflow is absent.

    Raises:
        UsageError: says how to install it.
    """
    # Before MLflow is imported, which reads them.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    try:
        import mlflow  # noqa: F401
    except ImportError:
        raise UsageError(
            "--mlflow-register needs mlflow, which is not installed; run "
            "`pip install 'dist_dml[mlflow]'`"
        ) from None


def register_model(
    run_folder: Path,
    exported: Path,
    name: str,
    example: UInt8[np.ndarray, "n S S C"],
    step: int,
) -> Registered:
    """Log an export's ONNX model beside its run, which is mirrored first, and register it.

    Call `check_registry` before: it tells MLflow how long to wait for a server.

    The store is the run's own (`tracking.mlflow_uri`, by default the database in the run's root).
    `mlflow.pyfunc.load_model("models:/NAME/VERSION").predict(images)` then gives
    `{"embeddings": (n, D)}`.

    Args:
        run_folder: of the run.
        exported: folder with `model.onnx` and the files about it.
        name: of the registered model; made where there is none.
        example: a few images, stored as the input example.
        step: of the checkpoint.

    Raises:
        UsageError: MLflow does not take this name.
        RunError: the store does not answer. The run may then have a logged model that no version
            names; the next call makes its own.
    """
    config = stored_config(run_folder)
    destination = destination_of(
        config.tracking, root_of(run_folder, config.run.name), config.run.name
    )
    try:
        with warnings.catch_warnings():
            # MLflow uses what SQLAlchemy and others have deprecated.
            warnings.simplefilter("ignore")
            return _register(run_folder, destination, exported, name, example, step)
    except (UsageError, RunError):
        raise
    except Exception as error:
        reason = " ".join(redact(str(error)).split())[:300]
        if getattr(error, "error_code", "") in _REFUSALS:
            raise UsageError(f"MLflow refuses the model {name!r}: {reason}") from None
        raise RunError(
            f"MLflow at {destination.shown} did not take the model ({reason}); the export is "
            f"complete in {exported}; repeat with another --out when it answers"
        ) from None


def _register(
    run_folder: Path,
    destination: Destination,
    exported: Path,
    name: str,
    example: np.ndarray,
    step: int,
) -> Registered:
    from mlflow.entities import LoggedModelOutput

    from dist_dml.tracking.mlflow_mirror import mirror_once
    from dist_dml.tracking.mlflow_run import connect

    run_id = mirror_once(run_folder, destination)
    client = connect(destination)
    _ensure_registered(client, name)  # First: a name that is refused leaves nothing behind.
    experiment = client.get_run(run_id).info.experiment_id
    facts = json.loads((exported / "config.json").read_text("utf-8"))
    logged = client.create_logged_model(
        experiment, name=f"embedder-step-{step}", source_run_id=run_id, model_type="embedder"
    )
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            _save_as_mlflow(folder, exported, facts, example, logged.model_id, run_id)
            client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
    # By its place: a database looks `models:/ID` up in the store of MLflow's global state.
    made = client.create_model_version(
        name, logged.artifact_location, run_id, model_id=logged.model_id
    )
    return Registered(name, int(made.version), destination.shown, run_id)


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _save_as_mlflow(
    folder: Path,
    exported: Path,
    facts: Mapping[str, Any],
    example: np.ndarray,
    model_id: str,
    run_id: str,
) -> None:
    """MLflow's own layout of an ONNX model, and the export's other files beside it."""
    from mlflow.models import Model
    from mlflow.onnx import save_model

    packages = ("mlflow", "numpy", "onnx", "onnxruntime")
    save_model(
        read_onnx(exported / FILES["onnx"]),
        str(folder),
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        signature=_signature(facts),
        input_example=example,
        # Named here: MLflow would start a process to find them out.
        pip_requirements=[f"{package}=={version(package)}" for package in packages],
        onnx_execution_providers=["CUDAExecutionProvider", "CPUExecutionProvider"],
        # As in the export: a protobuf ends at 2 GiB.
        save_as_external_data=(exported / f"{FILES['onnx']}.data").exists(),
    )
    for file in _EXTRA_FILES:
        source = exported / file
        if source.exists():
            (folder / "export").mkdir(exist_ok=True)
            (folder / "export" / file).write_bytes(source.read_bytes())


def _signature(facts: Mapping[str, Any]) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    image = facts["image"]
    shape = (-1, image["size"], image["size"], image["channels"])
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape, "images")]),
        outputs=Schema(
            [TensorSpec(np.dtype(np.float32), (-1, facts["embedding_dim"]), "embeddings")]
        ),
    )
