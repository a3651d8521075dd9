"""Readings of a machine's load, and the process that takes them on the other machines of a run.

The first worker's machine is read by the mirror's process. On every other one the first worker
there starts this module as a process, which ends with it:
`python -m dist_dml.tracking.load_sampler FOLDER --node 1 --parent-pid PID`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import dist_dml
from dist_dml.tracking import run_files

SYSTEM_SECONDS = 10.0
_WATCH_SECONDS = 0.5
_END_SECONDS = 5.0


class LoadSampler:
    """Writes a machine's load to `system.jsonl`, from where it is mirrored like all else.

    The step of a reading is the number of seconds since the run began: it grows through restarts.
    """

    def __init__(self, folder: Path, node: int = 0) -> None:
        """Start measuring.

        Args:
            folder: of the run; its run.json must be there on machines other than the first.
            node: the machine's number; 0 is the first worker's.
        """
        from dist_dml.tracking.recorder import Recorder
        from dist_dml.tracking.system_metrics import gpu_handles, read_system

        self._recorder = Recorder(folder, run_files.system_name(node))
        identity = run_files.read_json(folder / run_files.IDENTITY) if node else None
        # One machine alone gives a run its identity.
        self._started_at = (identity or run_files.identify_run(folder, {}))["started_at"]
        self._handles = gpu_handles()
        self._node = node
        self._read = read_system
        self._read(self._handles)
        self._due = time.monotonic() + SYSTEM_SECONDS

    def sample_when_due(self) -> bool:
        """Record a reading if it is time. False if the machine cannot be read any more."""
        if time.monotonic() < self._due:
            return True
        self._due += SYSTEM_SECONDS
        seconds = time.time() - self._started_at
        try:
            values = self._read(self._handles)
            if self._node:  # MLflow's page draws what begins with `system/`.
                mine = f"system/node_{self._node}/"
                values = {mine + k.removeprefix("system/"): v for k, v in values.items()}
            self._recorder.record(int(seconds), 0, seconds, values)
        except Exception as error:
            run_files.note_problem(self._recorder.folder, f"system metrics end here: {error}")
            return False
        return True

    def close(self) -> None:
        """Write readings that the disk has not taken so far, if it takes them now."""
        self._recorder.close()


def is_alive(parent: int, was_child: bool) -> bool:
    """Whether the trainer still runs. A dead one that nobody has waited for does not."""
    if was_child:
        # The kernel gives orphans to another parent at the moment of death.
        return os.getppid() == parent
    import psutil

    try:
        return psutil.Process(parent).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_load_sampler(folder: Path, node: int) -> subprocess.Popen[bytes] | None:
    """Start the process that reads this machine; None where it cannot start. Milliseconds.

    Args:
        folder: of the run, on storage that the machines share; where it is not, nothing is read.
        node: the machine's number, 1 or more.
    """
    checkout = str(Path(dist_dml.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "dist_dml.tracking.load_sampler", str(folder.resolve())]
    command += ["--node", str(node), "--parent-pid", str(os.getpid())]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the trainer, which ends it.
        )
    except OSError as error:
        run_files.note_problem(folder, f"no system metrics of machine {node}: {error}")
        return None


def stop_load_sampler(process: subprocess.Popen[bytes]) -> None:
    """End it; what it has written stays."""
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Read until the trainer has ended. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="dist_dml.tracking.load_sampler", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    given = parser.parse_args(arguments)
    os.nice(10)  # The trainer and its decoders come first.
    was_child = os.getppid() == given.parent_pid
    sampler = None
    while is_alive(given.parent_pid, was_child):
        # The first worker, which makes the folder, may be slower.
        if sampler is None and (given.folder / run_files.IDENTITY).is_file():
            sampler = LoadSampler(given.folder, given.node)
        if sampler is not None and not sampler.sample_when_due():
            return 1
        time.sleep(_WATCH_SECONDS)
    if sampler is not None:
        sampler.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
