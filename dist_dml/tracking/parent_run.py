"""A run that stands above others in MLflow: of a study, a protocol, a comparison.

It has a folder of its own, with the configuration that all share, and the results that are nobody's
alone. Its children name it by `tracking.parent`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dist_dml
from dist_dml.config import Config
from dist_dml.config_loading import to_yaml
from dist_dml.tracking.mirror import CHILD_ENVIRONMENT, start_mirror
from dist_dml.tracking.recorder import Recorder
from dist_dml.tracking.run_files import CONFIG, KIND, check_kind, identify_run
from dist_dml.whole_files import write_text

_NOTE = "mlflow.note.content"
_MOST_NOTE = 5000  # Characters of a tag in MLflow.
_MIRROR_SECONDS = 30.0
_SYNC_SECONDS = 60.0
_SYNC_SECONDS_A_RUN = 10.0


@dataclass(frozen=True)
class ParentRun:
    """An open parent.

    Attributes:
        folder: the run folder.
        run_id: by which children name it.
        recorder: for its own numbers, figures and files.
    """

    folder: Path
    run_id: str
    recorder: Recorder

    def describe(self, text: str) -> None:
        """Have MLflow's page of the run show a text, as Markdown; a later one replaces it."""
        identify_run(self.folder, {_NOTE: shortened(text)})

    def words_of_child(self, config: Config, tags: Mapping[str, object]) -> tuple[str, ...]:
        """What puts a run below this one: overrides of its configuration.

        Args:
            config: the child's; its own tags stay.
            tags: by which MLflow's pages filter and group the children.
        """
        return words_of_child(self.run_id, config.tracking.tags, tags)


def shortened(text: str) -> str:
    """The first whole lines of a text that fit into a tag of MLflow."""
    if len(text) <= _MOST_NOTE:
        return text
    more = "\n..."
    return text[: text.rfind("\n", 0, _MOST_NOTE - len(more))] + more


def words_of_child(
    parent: str, own: Mapping[str, str], tags: Mapping[str, object]
) -> tuple[str, ...]:
    """Overrides that put a run below `parent`, with its `own` tags and further `tags`."""
    every = {**own, **{key: str(value) for key, value in tags.items()}}
    return (f"tracking.parent={parent}", f"tracking.tags={json.dumps(every)}")


@contextmanager
def parent_run(folder: Path, config: Config, kind: str, **facts: str) -> Iterator[ParentRun]:
    """Open the parent in `folder` (again), mirrored to MLflow until the block ends.

    Args:
        folder: made where it is missing.
        config: what its children have in common; `run.name` names it.
        kind: what it is, see `run_files.KIND`.
        facts: further tags.

    Raises:
        UsageError: another kind of run lies there.
    """
    check_kind(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    identity = identify_run(folder, {KIND: kind, **facts})
    write_text(folder / CONFIG, to_yaml(config))
    recorder = Recorder(folder)
    mirror = None
    if config.tracking.mlflow:
        mirror = start_mirror(folder, config.tracking, Path(config.run.root), config.run.name)
    status = "FAILED"
    try:
        yield ParentRun(folder, identity["run_id"], recorder)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        recorder.note_end(status)
        recorder.close()
        if mirror is not None and (trouble := mirror.finish(_MIRROR_SECONDS)):
            print(f"note: {trouble}", file=sys.stderr)


def write_child(
    folder: Path,
    config: Config,
    kind: str,
    values: Mapping[str, float],
    step: int,
    cost: tuple[int, float],
    text: str,
    files: Sequence[str] = (),
    **facts: str,
) -> None:
    """A finished run that was measured elsewhere: its configuration and one value of each name.

    Args:
        folder: must exist. What it recorded earlier stays; the last value of a step counts.
        config: with its parent.
        kind: see `run_files.KIND`.
        values: by metric.
        step: of the values.
        cost: images seen and seconds of training that they took.
        text: what MLflow's page of it shows, Markdown.
        files: in the folder, that go along as its report.
        facts: further tags.
    """
    identify_run(folder, {KIND: kind, _NOTE: shortened(text), **facts})
    write_text(folder / CONFIG, to_yaml(config))
    recorder = Recorder(folder)
    recorder.record(step, *cost, dict(values))
    for name in files:
        recorder.note_artifact(folder / name, "report")
    recorder.note_end("FINISHED")
    recorder.close()


def sync_below(folder: Path, num_runs: int) -> str:
    """Send what was added to runs since their mirrors ended, in a process that may not hang.

    Args:
        folder: of the parent; its runs lie below.
        num_runs: about so many: the longest wait depends on it.

    Returns:
        "" if MLflow has all, else one sentence with the command that sends the rest.
    """
    checkout = str(Path(dist_dml.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "dist_dml.cli", "track", "sync", "--recursive", str(folder)]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SYNC_SECONDS + _SYNC_SECONDS_A_RUN * num_runs,
            env=CHILD_ENVIRONMENT | os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        reason = "no answer in time"
    else:
        if ended.returncode == 0:
            return ""
        reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][:160]
    return (
        f"MLflow does not have all of {folder} ({reason}); nothing is lost: "
        f"`dist-dml track sync --recursive {folder}` sends the rest"
    )
