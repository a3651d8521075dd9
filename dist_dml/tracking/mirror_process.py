"""The process that tails a run folder into MLflow. Started by `dist_dml.tracking.mirror`.

The main thread talks to MLflow and may hang in a call for as long as MLflow pleases. A second
thread watches the run and the trainer, reads the machine's load, and ends the process when its time
is up.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dist_dml.credentials import RedactedStream
from dist_dml.errors import UsageError
from dist_dml.tracking import run_files
from dist_dml.tracking.destination import Destination
from dist_dml.tracking.load_sampler import LoadSampler, is_alive

WATCH_SECONDS = 0.5
INTERVAL_SECONDS = 10.0
"""Each round costs some 40 ms of a core: every 5 s they were 0.95% of one."""
RETRY_SECONDS = 5.0
MOST_BACKOFF_SECONDS = 300.0

EXIT_MIRRORED = 0
EXIT_INCOMPLETE = 3


@dataclass(frozen=True)
class Watch:
    """The run as its mirror sees it.

    Attributes:
        folder: the run folder.
        attempt: the attempt (see `run_files.start_attempt`) that this process belongs to.
        parent: process id of the trainer.
        flush_seconds: time for the last flush, from the end of the run on.
        system_metrics: whether to record the machine's load.
        ended: set once the run has ended, whichever way.
        superseded: set as well if a later attempt has taken the folder over.
    """

    folder: Path
    attempt: str
    parent: int
    flush_seconds: float
    system_metrics: bool
    ended: threading.Event
    superseded: threading.Event


def main(arguments: list[str] | None = None) -> int:
    """Run until the trainer has ended and all is mirrored. Returns the exit code.

    0: the store has everything. 3: it has not, and `dist-dml track sync` delivers the rest.
    """
    parser = argparse.ArgumentParser(prog="dist_dml.tracking.mirror_process", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--run-name", required=True)
    parser.add_argument("--artifact-root", type=Path)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--flush-seconds", type=float, default=60.0)
    parser.add_argument("--interval-seconds", type=float, default=INTERVAL_SECONDS)
    parser.add_argument("--system-metrics", action="store_true")
    given = parser.parse_args(arguments)
    # Both are `mlflow.log`: what libraries print themselves, tracebacks as well, has no secrets.
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    # The trainer and its decoders come first.
    os.nice(10)
    destination = Destination(given.uri, given.experiment, given.run_name, given.artifact_root)
    watch = Watch(
        given.folder,
        given.attempt,
        given.parent_pid,
        given.flush_seconds,
        given.system_metrics,
        threading.Event(),
        threading.Event(),
    )
    threading.Thread(target=_watch, args=(watch,), daemon=True).start()
    return tail(watch, destination, given.interval_seconds)


def tail(watch: Watch, destination: Destination, interval_seconds: float) -> int:
    """Mirror every `interval_seconds` until the run has ended and all has arrived.

    A store that fails is asked again after 10 s, then 20, up to five minutes, and at once when the
    run ends. Every failure is one line in `mlflow.log`.
    """
    failures = 0
    # The watch's first look: an attempt that is over has nothing to mirror.
    watch.ended.wait(WATCH_SECONDS)
    while not watch.superseded.is_set():
        # Read before mirroring: what is written between the two belongs to the next round.
        last = watch.ended.is_set()
        try:
            _mirror(watch.folder, destination)
            if last:
                return EXIT_MIRRORED
            failures, delay = 0, interval_seconds
        except (ImportError, UsageError) as error:
            # Waiting would not help.
            run_files.note_problem(watch.folder, str(error))
            return EXIT_INCOMPLETE
        except Exception as error:
            failures += 1
            first = min(interval_seconds, RETRY_SECONDS)
            delay = min(first * 2**failures, MOST_BACKOFF_SECONDS)
            run_files.note_problem(watch.folder, f"{type(error).__name__}: {error}")
        if last:
            time.sleep(1.0)
        else:
            watch.ended.wait(delay)
    return EXIT_MIRRORED


def _mirror(folder: Path, destination: Destination) -> None:
    from dist_dml.tracking.mlflow_mirror import mirror_once
    from dist_dml.tracking.received import is_mirrored

    if not is_mirrored(folder, destination):
        mirror_once(folder, destination)


def _watch(watch: Watch) -> None:
    """Wait for the end of the run, recording the load meanwhile; then enforce the deadline."""
    sampler = _start_sampler(watch)
    try:
        _await_end(watch, sampler)
    except Exception as error:
        run_files.note_problem(watch.folder, f"the watch ended: {type(error).__name__}: {error}")
    if sampler is not None:
        sampler.close()
    watch.ended.set()
    time.sleep(watch.flush_seconds)
    run_files.note_problem(
        watch.folder, f"MLflow had not taken everything after {watch.flush_seconds:.0f} s; given up"
    )
    # The main thread may be inside a call that does not return.
    os._exit(EXIT_INCOMPLETE)


def _await_end(watch: Watch, sampler: LoadSampler | None) -> None:
    was_child = os.getppid() == watch.parent
    seen = -1
    while True:
        # The size first: an event that comes between the two is read in the next round again.
        path = watch.folder / run_files.EVENTS
        size = path.stat().st_size if path.exists() else 0
        status = run_files.last_status(watch.folder) if size != seen else {}
        seen = size
        if status and status["attempt"] != watch.attempt:
            watch.superseded.set()
            return
        if status and status["status"] != "RUNNING":
            return
        if not is_alive(watch.parent, was_child):
            # Its last event may have been written since the file was read.
            if run_files.last_status(watch.folder).get("status") == "RUNNING":
                run_files.append_event(
                    watch.folder,
                    {"status": "KILLED", "attempt": watch.attempt, "time": time.time()},
                )
            return
        if sampler is not None and not sampler.sample_when_due():
            sampler = None
        time.sleep(WATCH_SECONDS)


def _start_sampler(watch: Watch) -> LoadSampler | None:
    """A sampler if one is wanted and the machine can be read: the watch goes on without it."""
    try:
        return LoadSampler(watch.folder) if watch.system_metrics else None
    except Exception as error:
        run_files.note_problem(watch.folder, f"no system metrics: {error}")
        return None


if __name__ == "__main__":
    code = main()
    # MLflow's and its libraries' threads are not waited for.
    os._exit(code)
