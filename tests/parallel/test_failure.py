"""A failure of one worker ends all, soon, with one line and one exit code. Real processes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from dist_dml.config_loading import Resolved
from dist_dml.entry import run_worker
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.collectives import barrier
from dist_dml.parallel.world import World

NUM_WORKERS = 3
# Worker 0 keeps the store through which the others would learn a reason.
KILLED = {
    "a worker killed while others wait": 1,
    "worker 0 killed while others wait": 0,
    "worker 0 killed while others compute": 0,
}


@dataclass
class Ended:
    """How the workers ended, by rank."""

    exit_codes: list[int | None]
    outputs: list[str]
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        lines = "".join(self.outputs).splitlines()
        return [line for line in lines if line.startswith("dist_dml: error: ")]

    @property
    def tracebacks(self) -> int:
        return "".join(self.outputs).count("Traceback (most recent call last)")


def run_together(scenario: str, folder: Path, deadline_seconds: float = 30.0) -> Ended:
    """Start the workers of a scenario as a launcher would, and wait for all of them."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes: list[ForkServerProcess] = []
    started = time.monotonic()
    try:
        for rank in range(NUM_WORKERS):
            process = context.Process(target=_worker, args=(scenario, rank, port, str(folder)))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(max(0.0, started + deadline_seconds - time.monotonic()))
        seconds = time.monotonic() - started
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    outputs = [(folder / f"{rank}.txt").read_text() for rank in range(NUM_WORKERS)]
    return Ended(codes, outputs, seconds)


def _worker(scenario: str, rank: int, port: int, folder: str) -> None:
    output = os.open(f"{folder}/{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_WORKERS}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    settings = ["engine.device=cpu", "engine.threads=1", "engine.timeout_seconds=60"]
    arguments = argparse.Namespace(config="", overrides=settings, scenario=scenario)
    sys.exit(run_worker(_body, arguments, []))


def _body(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    barrier(world.group)
    scenario, rank = arguments.scenario, world.rank
    if scenario == "success":
        print(f"worker {rank} is done")
    elif scenario == "mistake while others wait" and rank == 1:
        raise UsageError("data.path=x\nis broken")
    elif scenario == "mistake while others compute":
        if rank == 1:
            raise UsageError("data.path=x is broken")
        time.sleep(60)
    elif scenario == "failure of the worker that keeps the store":
        if rank == 0:
            raise RunError("the disk of worker 0 is full")
        time.sleep(60)
    elif scenario == "two at once" and rank > 0:
        raise UsageError(f"worker {rank} is wrong")
    elif scenario == "an error of the project" and rank == 2:
        raise KeyError("missing")
    elif scenario in KILLED:
        if rank == KILLED[scenario]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if "compute" in scenario else 0)
    barrier(world.group)


def test_success_ends_in_good_order(tmp_path: Path) -> None:
    ended = run_together("success", tmp_path)
    assert ended.exit_codes == [0, 0, 0]
    assert ended.outputs == [f"worker {rank} is done\n" for rank in range(NUM_WORKERS)]


@pytest.mark.parametrize(
    ("scenario", "exit_code", "line", "tracebacks"),
    [
        ("mistake while others wait", 2, "data.path=x is broken", 0),
        ("mistake while others compute", 2, "data.path=x is broken", 0),
        ("failure of the worker that keeps the store", 1, "the disk of worker 0 is full", 0),
        ("an error of the project", 1, "KeyError: 'missing' (an error of dist_dml; please", 1),
    ],
)
def test_the_first_failure_ends_all_with_its_reason_printed_once(
    scenario: str, exit_code: int, line: str, tracebacks: int, tmp_path: Path
) -> None:
    ended = run_together(scenario, tmp_path)
    assert ended.exit_codes == [exit_code] * NUM_WORKERS, ended
    assert len(ended.error_lines) == 1, ended
    assert ended.error_lines[0].startswith(f"dist_dml: error: {line}")
    assert ended.tracebacks == tracebacks
    assert ended.seconds < 15


def test_of_two_failures_at_once_one_is_printed(tmp_path: Path) -> None:
    ended = run_together("two at once", tmp_path)
    assert ended.exit_codes == [2, 2, 2], ended
    assert len(ended.error_lines) == 1, ended
    assert ended.error_lines[0].endswith(("worker 1 is wrong", "worker 2 is wrong"))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", KILLED)
def test_a_killed_worker_ends_the_others_within_30_seconds(scenario: str, tmp_path: Path) -> None:
    ended = run_together(scenario, tmp_path)
    codes = [1] * NUM_WORKERS
    codes[KILLED[scenario]] = -signal.SIGKILL
    assert ended.exit_codes == codes, ended
    # The dead cannot speak: one of the others says that it is gone, and what to do.
    assert len(ended.error_lines) == 1, ended
    assert "gone" in ended.error_lines[0]
    assert "--resume auto" in ended.error_lines[0]
    assert ended.tracebacks == 0, ended
