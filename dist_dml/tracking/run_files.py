"""The files of a run folder that tracking writes and reads, and the rules that they keep.

`metrics.jsonl` and `artifacts.jsonl` only ever grow, a line at a time, so that any number of
readers can follow them by byte offset. `run.json` and `mlflow.json` are replaced as a whole.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_dml.credentials import redact
from dist_dml.errors import UsageError
from dist_dml.whole_files import write_json

METRICS = "metrics.jsonl"
"""One object a line: `step, images_seen, seconds, name, value`. The source of truth."""
SYSTEM = "system.jsonl"
"""Processor, memory and GPU readings in the same form, of the first worker's machine."""
_SYSTEM_OF_OTHERS = "system-*.jsonl"
"""Those of other machines, see `system_name`."""
EVENTS = "artifacts.jsonl"
"""One object a line: a file worth keeping (`path, folder`) or a change of `status`."""
CONFIG = "config.yaml"
"""The resolved config."""
IDENTITY = "run.json"
"""`run_id`, `started_at` and facts about the run, see `identify_run`."""
KIND = "kind"
"""Tag of what a run is: `study`, `protocol`, `comparison`, `method`; trainings have none."""
MIRROR_STATE = "mlflow.json"
"""What each MLflow store has received. Losing it costs a look at the server, no more."""
MIRROR_LOG = "mlflow.log"
"""What went wrong with MLflow, one line each."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where the file is absent or is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def identify_run(folder: Path, facts: dict[str, str]) -> dict[str, Any]:
    """Give the run an identity that outlives restarts, and write down `facts` about it.

    The first call draws `run_id` (a uuid) and notes `started_at` (Unix seconds); later calls, also
    those of a resumed run, keep both and replace the facts that they name. Facts become tags in
    MLflow; known ones are `config_hash`, `dataset_fingerprint` and `git_commit`.

    Returns:
        The content of `run.json`.
    """
    before = read_json(folder / IDENTITY)
    identity = {"run_id": uuid.uuid4().hex, "started_at": time.time()} | before | facts
    if identity != before:
        write_json(folder / IDENTITY, identity)
    return identity


def system_name(node: int) -> str:
    """The file of a machine's readings; 0 is the first worker's."""
    return f"system-{node}.jsonl" if node else SYSTEM


def system_files(folder: Path) -> list[str]:
    """The names of all machines' readings of a run, the first worker's first."""
    return [SYSTEM, *sorted(path.name for path in folder.glob(_SYSTEM_OF_OTHERS))]


def runs_below(given: Sequence[Path]) -> list[Path]:
    """The folders among and below `given` that hold a run, sorted, each once.

    Raises:
        UsageError: one of them has none.
    """
    found: dict[Path, None] = {}
    for folder in given:
        runs = sorted({path.parent for path in folder.rglob(IDENTITY)})
        if not runs:
            raise UsageError(
                f"{folder} holds no run: neither it nor a folder below has a {IDENTITY}"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def check_kind(folder: Path, kind: str) -> None:
    """Refuse a folder in which something else began: both would be one run in MLflow.

    Args:
        folder: need not exist.
        kind: of what is to begin; "" for a training.

    Raises:
        UsageError: with what lies there.
    """
    identity = read_json(folder / IDENTITY)
    found = str(identity.get(KIND, ""))
    if identity and found != kind and (folder / CONFIG).exists():
        raise UsageError(
            f"{folder} holds a {found or 'training'} and a {kind or 'training'} is to begin there; "
            "choose another run.name"
        )


def complete_lines(
    path: Path, offset: int, most_bytes: int = 2**22
) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of `path` from byte `offset` on, and the offset after them.

    A last line without its end of line stays for the next call: its writer is still at it, or was
    killed. A line that is no JSON object (torn by a full disk, then continued) is left out. At most
    `most_bytes` are looked at, or one line if that is longer: call again until the offset stands
    still. An absent file has no lines; one that is shorter than `offset` is read from its start.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return [], offset
    with stream:
        if offset > os.fstat(stream.fileno()).st_size:
            offset = 0
        stream.seek(offset)
        block = stream.read(most_bytes)
        if len(block) == most_bytes and not block.endswith(b"\n"):
            block += stream.readline()
    block = block[: block.rfind(b"\n") + 1]
    lines = []
    for text in block.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines, offset + len(block)


def open_to_append(path: Path) -> int:
    """A descriptor to append whole lines to `path`; ends a line that a killed writer left torn."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end_torn_line(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def end_torn_line(descriptor: int) -> None:
    """Write an end of line to a file that lacks it. Raises OSError where the disk does."""
    status = os.fstat(descriptor)
    if (
        stat.S_ISREG(status.st_mode)
        and status.st_size
        and os.pread(descriptor, 1, status.st_size - 1) != b"\n"
    ):
        os.write(descriptor, b"\n")


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """Add one line to the events of the run. Raises OSError where the disk does."""
    descriptor = open_to_append(folder / EVENTS)
    try:
        line = (json.dumps(event) + "\n").encode()
        if os.write(descriptor, line) < len(line):  # The disk filled up within the line.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def start_attempt(folder: Path) -> str:
    """Note that the run is running (again). Returns the name of this attempt.

    A run that is killed and resumed has several attempts in one folder, and the mirror process of
    the killed one may still be finishing. Its last word carries its attempt, and `last_status` does
    not listen to it any more.
    """
    attempt = uuid.uuid4().hex
    append_event(folder, {"status": "RUNNING", "attempt": attempt, "time": time.time()})
    return attempt


def last_status(folder: Path) -> dict[str, Any]:
    """The event that says how the run stands (`status`, `attempt`, `time`); empty before the first.

    `status` is RUNNING, FINISHED, FAILED or KILLED, as in MLflow.
    """
    current: dict[str, Any] = {}
    offset = -1
    following = 0
    while following != offset:
        offset = following
        lines, following = complete_lines(folder / EVENTS, offset)
        for line in lines:
            if line.get("status") == "RUNNING":
                current = line
            elif "status" in line and line.get("attempt", current.get("attempt")) == current.get(
                "attempt"
            ):
                current = {"attempt": current.get("attempt")} | line
    return current


def note_problem(folder: Path, text: str) -> None:
    """Add one line to the mirror's log, without secrets. Never raises: things go wrong already."""
    # Redacted before it is cut: the first half of a password would not be known as one.
    line = " ".join(redact(text).split())[:500]
    try:
        with (folder / MIRROR_LOG).open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    except OSError:
        pass
