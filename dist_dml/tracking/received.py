"""What each MLflow store has received of a run: `mlflow.json` in the run folder.

An entry a store, so that a run can be replayed into several. Nothing here asks a server.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_dml.tracking import run_files
from dist_dml.tracking.destination import Destination
from dist_dml.whole_files import write_json


@dataclass
class Received:
    """What one store has received of a run.

    Attributes:
        run_id: MLflow's id of the run; None before there is one.
        last_step: of each metric, the last step sent. Earlier ones are not sent (again).
        offsets: bytes of each JSONL file that have been dealt with.
        described: digest of `config.yaml` and `run.json` as last sent.
        status: the status event last sent.
        has_parent: whether the run stands below its parent, where it has one.
    """

    run_id: str | None = None
    last_step: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    described: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    has_parent: bool = False


def load_received(folder: Path, destination: Destination) -> Received:
    """What the destination has received, as far as `mlflow.json` knows."""
    stored = run_files.read_json(folder / run_files.MIRROR_STATE).get(_key(destination))
    try:
        return Received(**stored) if isinstance(stored, dict) else Received()
    except TypeError:  # Of another version: the server is asked instead.
        return Received()


def is_mirrored(folder: Path, destination: Destination) -> bool:
    """Whether the destination has all that the folder holds, judged without asking it."""
    received = load_received(folder, destination)
    return (
        received.run_id is not None
        and received.described == description_of(folder)
        and received.status == run_files.last_status(folder)
        and all(
            received.offsets.get(name, 0) == _whole_size(folder / name)
            for name in (run_files.METRICS, *run_files.system_files(folder), run_files.EVENTS)
        )
    )


def _key(destination: Destination) -> str:
    return f"{destination.shown} {destination.experiment}"


def save_received(folder: Path, destination: Destination, received: Received) -> None:
    path = folder / run_files.MIRROR_STATE
    stored = run_files.read_json(path)
    write_json(path, stored | {_key(destination): asdict(received)})


def description_of(folder: Path) -> str:
    """Digest of the files that describe the run. Times and sizes would not tell all changes."""
    digest = hashlib.sha256()
    for name in (run_files.CONFIG, run_files.IDENTITY):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _whole_size(path: Path) -> int:
    """Bytes up to the end of the last whole line. A torn line is at most some kilobytes long."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return 0
    with stream:
        size = os.fstat(stream.fileno()).st_size
        start = max(0, size - 2**16)
        stream.seek(start)
        return start + stream.read(size - start).rfind(b"\n") + 1
