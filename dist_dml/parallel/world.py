"""Start and stop of the workers, and how a failure of one ends all.

Ranks come from the environment alone, so that `torchrun`, `deepspeed`, `srun`, Ray and variables
set by hand all work; without them there is one process.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroup

from dist_dml.config import EngineConfig
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.determinism import make_deterministic
from dist_dml.parallel.failure import FailureBoard
from dist_dml.usable import usable_cores

# How long a worker that has written its part of a checkpoint waits for the others.
_DISK_SECONDS = 3600.0


@dataclass(frozen=True)
class Ranks:
    """Who this worker is, as the environment says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


@dataclass(frozen=True)
class World:
    """The one axis: rows are gathered and classes split over all workers.

    `group` and `failures` are None for a single process without a launcher.

    Attributes:
        control: the same workers, for the few bytes that their hosts agree on after each step: it
            waits for no device.
        background: the same workers, for the threads that write checkpoints.
    """

    ranks: Ranks
    device: torch.device
    group: ProcessGroup | None
    failures: FailureBoard | None
    control: ProcessGroup | None = None
    background: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of workers (W)."""
        return self.ranks.size

    @property
    def is_first(self) -> bool:
        """Worker 0 writes what is written once."""
        return self.ranks.rank == 0


def environment_ranks() -> Ranks:
    """Ranks from RANK, WORLD_SIZE, LOCAL_RANK (torchrun, deepspeed, by hand) or Slurm's variables.

    Raises:
        UsageError: for numbers that are none, or a rank outside the world.
    """
    environment = os.environ
    if "RANK" in environment or "WORLD_SIZE" in environment:
        size = _integer("WORLD_SIZE", 1)
        local_size = _integer("LOCAL_WORLD_SIZE", _integer("LOCAL_SIZE", size))
        ranks = Ranks(_integer("RANK", 0), size, _integer("LOCAL_RANK", 0), local_size)
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        # The batch script itself has SLURM_PROCID too; only steps of srun have a number of tasks.
        size = _integer("SLURM_STEP_NUM_TASKS", 1)
        nodes = _integer("SLURM_STEP_NUM_NODES", 1)
        ranks = Ranks(
            _integer("SLURM_PROCID", 0), size, _integer("SLURM_LOCALID", 0), -(-size // nodes)
        )
    else:
        return Ranks()
    if not 0 <= ranks.rank < ranks.size:
        raise UsageError(
            f"RANK={ranks.rank} is outside WORLD_SIZE={ranks.size}; ranks run from 0 to size - 1"
        )
    return ranks


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"environment variable {name}={text!r} is not a whole number") from None


def limit_threads() -> None:
    """Keep a command of one process, without a world, to the cores that it may use.

    torch by itself takes every core that the machine shows, in a container with a quota too.
    """
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def start_world(config: EngineConfig, ranks: Ranks) -> World:
    """Join the other workers, choose the device and the number of CPU threads.

    The gradient of a layer depends in its last bits on the number of threads; equal layouts get
    equal numbers.

    Raises:
        UsageError: if the device is missing, or the environment names no meeting point.
        RunError: if the workers do not meet in time.
    """
    if config.deterministic:
        make_deterministic()
    torch.set_num_threads(config.threads or max(1, usable_cores() // max(1, ranks.local_size)))
    device = _choose_device(config, ranks)
    needs_group = ranks.size > 1 or config.name == "deepspeed"
    if not needs_group:
        return World(ranks, device, None, None)
    timeout = timedelta(seconds=config.timeout_seconds)
    store = _meet(ranks, timeout)
    # torchrun's store outlives a restart of the workers; what the last ones wrote must not be read.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    failures = None
    if isinstance(store, TCPStore):
        watched = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  (not in its stub)
        failures = FailureBoard(watched, ranks.rank, ranks.size, ranks.local_rank, attempt)
        failures.watch()
    try:
        return _connect(ranks, device, PrefixStore(f"group {attempt}", store), timeout, failures)
    except (RuntimeError, dist.DistError) as error:
        reason = (
            f"worker {ranks.rank} lost the others while they met ({str(error).splitlines()[0]}): "
            "look at their output, then start again with --resume auto"
        )
        if failures is not None:
            failures.report(reason, 1)
        raise RunError(reason) from None


def _connect(
    ranks: Ranks,
    device: torch.device,
    store: Store,
    timeout: timedelta,
    failures: FailureBoard | None,
) -> World:
    """The process groups of all workers."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    if ranks.size == 1:
        return World(ranks, device, dist.group.WORLD, failures)
    control, background = _group_of_hosts(timeout), _group_of_hosts(timeout)
    # From here on: who is missing now would be waited for as long.
    patience = timedelta(seconds=max(timeout.total_seconds(), _DISK_SECONDS))
    background._get_backend(torch.device("cpu"))._set_default_timeout(patience)
    return World(ranks, device, dist.group.WORLD, failures, control, background)


def _group_of_hosts(timeout: timedelta) -> ProcessGroup:
    """All workers once more, with messages of their own that no device sees."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    return group


def _meet(ranks: Ranks, timeout: timedelta) -> Store:
    if ranks.size == 1:
        return HashStore()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(
                f"{ranks.size} workers, but {name} is not set: set MASTER_ADDR and MASTER_PORT to "
                "a free port of worker 0's machine, or start with torchrun or deepspeed"
            )
    address, port = os.environ["MASTER_ADDR"], _integer("MASTER_PORT", 0)
    # torchrun's agent keeps a store already; elsewhere worker 0 does.
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return TCPStore(
            address,
            port,
            world_size=None if agent_keeps_store else ranks.size,
            is_master=ranks.rank == 0 and not agent_keeps_store,
            timeout=timeout,
        )
    except (RuntimeError, dist.DistNetworkError) as error:
        first_line = str(error).splitlines()[0]
        raise RunError(
            f"worker {ranks.rank} on {socket.gethostname()} did not meet the other "
            f"{ranks.size - 1} at {address}:{port} within {timeout.total_seconds():.0f} s "
            f"({first_line}); check that all were started and that the port is free"
        ) from None


def _choose_device(config: EngineConfig, ranks: Ranks) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError("engine.device=cuda, but PyTorch sees no CUDA device; use auto or cpu")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        raise UsageError(
            f"worker {ranks.local_rank} of this machine has no GPU of its own ({count} visible); "
            f"start at most {count} workers here"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def stop_world(world: World) -> None:
    """Leave in good order after success: nobody takes another's leaving for a death."""
    if world.failures is not None:
        dist.barrier(group=world.group)
        world.failures.close()
    if dist.is_initialized():
        dist.destroy_process_group()
