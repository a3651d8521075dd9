"""How folds are started: how many fit at a time, by which commands, and by one command only."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_dml.config import Config
from dist_dml.errors import UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.protocol_folds import Fold
from dist_dml.protocol_guard import GRACE_SECONDS
from dist_dml.protocol_jobs import Stage
from dist_dml.protocol_measure import measure_arguments
from dist_dml.usable import usable_cores


def check_launcher(command: str) -> None:
    """Refuse to be one of several workers.

    Raises:
        UsageError: a launcher's variables are set.
    """
    if any(key in os.environ for key in ("RANK", "WORLD_SIZE")):
        raise UsageError(
            f"dist-dml {command} was started by a launcher (RANK or WORLD_SIZE is set); start it "
            "once and plainly: it launches its own workers, see --workers"
        )


def divide_machine(
    config: Config, num_runs: int, workers: int, parallel: int
) -> tuple[list[dict[str, str]], int]:
    """What each fold that runs at the same time adds to the environment, and threads a worker.

    With GPUs, each place has its own where there are enough, and shares them where
    `parallel` asks for more.

    Args:
        config: its engine section.
        num_runs: folds that may run at the same time.
        workers: of each fold.
        parallel: folds at the same time; 0 takes GPUs, or else cores, over workers.
    """
    import torch

    cores = usable_cores()
    devices = _visible_devices(torch.cuda.device_count() if config.engine.device != "cpu" else 0)
    room = max(1, len(devices or range(cores)) // workers)
    parallel = min(parallel or room, num_runs)
    threads = config.engine.threads or max(1, cores // (parallel * workers))
    slots = []
    for slot in range(parallel):
        environment = {"OMP_NUM_THREADS": str(threads)}
        if devices:
            places = max(1, len(devices) // workers)
            own = devices[slot % places * workers :][:workers]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        slots.append(environment)
    return slots, threads


def _visible_devices(count: int) -> list[str]:
    """The names of this process's GPUs, as `CUDA_VISIBLE_DEVICES` writes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def training_stage(
    given: Sequence[str], fold: Fold, workers: int, tracking: Sequence[str] = ()
) -> Stage:
    """Training of a fold, or what is missing of it.

    Args:
        given: the `--config` values.
        fold: which.
        workers: of torchrun, above 1.
        tracking: further overrides, of where it stands in MLflow.
    """
    files = [word for path in given for word in ("--config", path)]
    command = [*_launcher(workers), "-m", "dist_dml.train", *files, *fold.overrides, *tracking]
    return Stage("training", tuple(command), fold.folder / "protocol.log")


def testing_stage(fold: Fold, held_out: ProtocolConfig, workers: int) -> Stage:
    """The one look at the test split."""
    measured = measure_arguments(fold.folder, held_out.query, held_out.gallery)
    command = [*_launcher(workers), "-m", "dist_dml.protocol_measure", *measured]
    return Stage("testing", tuple(command), fold.folder / "protocol.log")


def _launcher(workers: int) -> list[str]:
    if workers == 1:
        return [sys.executable]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(workers)]


@contextmanager
def only_command(folder: Path, command: str) -> Iterator[int]:
    """The one right to run these folds; their processes hold on to it until the last has ended.

    Args:
        folder: made where it is missing; what is worked on is its parent.
        command: for the message.

    Raises:
        UsageError: another command has it, longer than the folds of one that was killed may live.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + 2 * GRACE_SECONDS + 5
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{folder.parent} is being worked on by another dist-dml {command}; wait "
                        "for it, or choose another run.name"
                    ) from None
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)
