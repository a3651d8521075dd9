"""Where a run is mirrored to: the store, the experiment, the run's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from dist_dml.config import Config, TrackingConfig
from dist_dml.credentials import check_values, expand, redact, refuse_secret
from dist_dml.errors import UsageError
from dist_dml.tracking.run_files import CONFIG

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow_artifacts"


@dataclass(frozen=True)
class Destination:
    """An MLflow experiment, and the name that the run has there.

    Attributes:
        uri: a tracking server (http, https, databricks) or a database (sqlite, postgresql, ...), as
            configured: `${NAME}` stands for a password.
        artifact_root: folder for the artifacts of an experiment created here; None where a server
            decides.
    """

    uri: str
    experiment: str
    run_name: str
    artifact_root: Path | None

    @property
    def address(self) -> str:
        """What MLflow is to connect to, with its secrets: never to be shown or stored.

        Raises:
            UsageError: an environment variable is not set.
        """
        return expand(self.uri, "tracking.mlflow_uri")

    @property
    def shown(self) -> str:
        """The URI for messages and files."""
        return redact(self.uri)


def destination_of(tracking: TrackingConfig, run_root: Path, run_name: str) -> Destination:
    """The destination that a config asks for; by default `run_root/mlflow.db`.

    Raises:
        UsageError: for a folder or `file:` URI. MLflow gave its file store up (it refuses it since
            3.13, and runs in it are not seen by the UI); for one that holds a secret itself, or
            whose environment variables are not set.
    """
    uri = tracking.mlflow_uri or f"sqlite:///{(run_root / DATABASE).resolve()}"
    refuse_secret(uri, "tracking.mlflow_uri")
    # A folder of this name may hold `${`; only what the user gave is expanded.
    scheme = urlsplit(expand(tracking.mlflow_uri, "tracking.mlflow_uri") or uri).scheme
    if scheme in ("", "file"):
        raise UsageError(
            f"tracking.mlflow_uri={uri!r} is a folder, which MLflow no longer accepts as a store; "
            "give http://HOST:PORT or sqlite:///PATH/mlflow.db, or leave it empty"
        )
    served = scheme in ("http", "https", "databricks", "databricks-uc")
    artifacts = None if served else (run_root / ARTIFACTS).resolve()
    return Destination(uri, tracking.experiment, run_name, artifacts)


def stored_config(folder: Path) -> Config:
    """The config that the run in `folder` was started with.

    Raises:
        UsageError: if `folder` is no run folder, or its config is of another version.
    """
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_values(content)
        return Config.model_validate(content or {})
    except OSError:
        raise UsageError(f"{folder} is not the folder of a run: it has no {CONFIG}") from None
    except UsageError as error:
        # Of a run of an earlier version: MLflow gets this file.
        raise UsageError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(redact(str(error)).split())[:200]
        raise UsageError(f"{path} cannot be read as a config: {reason}") from None


def root_of(folder: Path, run_name: str) -> Path:
    """The folder of all runs that `folder` lies in: names with slashes lie deeper."""
    parts = Path(run_name).parts
    folder = folder.resolve()
    if parts and folder.parts[-len(parts) :] == parts:
        return folder.parents[len(parts) - 1]
    return folder.parent
