"""Run a function in N real gloo workers and hand back what each returned.

Workers come from a forkserver that has preloaded torch and dist_dml (conftest.py): a plain fork
hangs once the parent has run a parallel torch operation, and spawn pays the imports for every
worker.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class WorkerFailed(AssertionError):
    """A worker raised, died, or did not end in time; the message holds its traceback."""


def run_workers(
    function: Callable[..., Any],
    num_workers: int,
    tmp_path: Path,
    *args: Any,
    timeout_seconds: float = 60.0,
) -> list[Any]:
    """`function(rank, num_workers, group, *args)` of each of `num_workers` gloo workers, by rank.

    Args:
        function: module-level, because it is pickled by name. What it returns is pickled by value.
        tmp_path: holds the workers' meeting point; several calls may share it.
        timeout_seconds: for the start and the work of all workers together.

    Raises:
        WorkerFailed: with the first failing worker's traceback; all workers are killed.
    """
    context = multiprocessing.get_context("forkserver")
    meeting_point = str(tmp_path / f"store-{uuid.uuid4().hex}")
    receivers: list[Connection] = []
    processes = []
    grace_seconds = 0.0
    try:
        for rank in range(num_workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work,
                args=(sender, function, rank, num_workers, meeting_point, args),
                daemon=True,
            )
            process.start()
            sender.close()  # Else the end of a killed worker would not be seen here.
            receivers.append(receiver)
            processes.append(process)
        results = _collect(receivers, time.monotonic() + timeout_seconds)
        grace_seconds = 10.0
        return results
    finally:
        for process in processes:
            process.join(timeout=grace_seconds)
            if process.is_alive():
                process.kill()
                process.join()
        for receiver in receivers:
            receiver.close()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    """Every worker's result, or the first failure."""
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    results: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailed(f"workers {sorted(waiting.values())} did not end in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                failure, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise WorkerFailed(f"worker {rank} died without a word") from None
            if failure:
                raise WorkerFailed(f"worker {rank} of {len(receivers)} failed:\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def _work(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    num_workers: int,
    meeting_point: str,
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Without it gloo looks up the machine's own name, which some sandboxes cannot resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting_point}",
            rank=rank,
            world_size=num_workers,
            timeout=timedelta(seconds=30),
        )
        result = function(rank, num_workers, dist.group.WORLD, *args)
        # Not `sender.send`: its pickler hands tensors over by a handle into this process's memory.
        sender.send_bytes(pickle.dumps((None, result)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        # Stay until killed: the others would fail of the broken connection, and hide the reason.
        time.sleep(600)
