"""The workers that a launcher has started meet, compare what they found, and measure together."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import ProcessGroup

from dist_dml.doctor import links
from dist_dml.doctor.findings import Finding, Setting, ok, problem, skipped, warning
from dist_dml.doctor.storage import existing
from dist_dml.doctor.versions import differing, installed_versions
from dist_dml.parallel.collectives import barrier, gather_objects
from dist_dml.parallel.world import Ranks

# Checks of another host may take that long: each has its own limit.
_PATIENCE = timedelta(minutes=10)
_LOST = "look at the other workers' output; the network or a firewall may drop long connections"


class Meeting:
    """All workers, over gloo. Methods are called by all of them, in the same order.

    Attributes:
        hosts: the name of each worker's host.
        leaders: the first worker of each host.
        lost: why nothing more can be asked of the others; "" while it can.
    """

    def __init__(self, group: ProcessGroup, patient: ProcessGroup, timeout: timedelta) -> None:
        """
        Args:
            group: for measuring; its calls end after `timeout`.
            patient: the same workers, for results of checks.
            timeout: the wait that the user allows.
        """
        self.group, self._patient, self._timeout = group, patient, timeout
        self.hosts: list[str] = gather_objects(socket.gethostname(), group)
        self.leaders = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        self.lost = ""
        self._nccl_failed = False

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, or this one's alone where the others are lost."""
        if not self.lost:
            try:
                return gather_objects(value, self._patient)
            except (RuntimeError, dist.DistError) as error:
                self.lost = _first_line(error)
        return [value]

    def findings(self, setting: Setting) -> list[Finding]:
        """What the workers measure together; complete on worker 0."""
        found: list[Finding] = []
        for part in (self._alike, self._links, self._gpu_links, self._clocks, self._folder):
            if self.lost:
                break
            try:
                found += part(setting)
            except (RuntimeError, dist.DistError) as error:
                self.lost = _first_line(error)
        if self.lost:
            found.append(problem("workers", f"the connection broke: {self.lost}", _LOST))
        return found

    def close(self) -> None:
        """Leave together."""
        if self.lost:
            return
        with contextlib.suppress(RuntimeError, dist.DistError):
            barrier(self._patient)
            if not self._nccl_failed:  # It would wait for the collective that hangs.
                dist.destroy_process_group()

    def _alike(self, setting: Setting) -> list[Finding]:
        versions = gather_objects(installed_versions(), self._patient)
        by_host = {self.hosts[leader]: versions[leader] for leader in self.leaders}
        return [
            *differing(by_host),
            *links.gpus_alike(gather_objects(_own_gpu(setting), self.group)),
        ]

    def _links(self, setting: Setting) -> list[Finding]:
        rates = links.measure(self.group, torch.device("cpu"), self.group)
        found = [*links.link_findings("gloo", rates, len(self.hosts), len(self.leaders))]
        if all(gather_objects(bool(_own_gpu(setting)), self.group)):
            return found
        return [*found, links.head_finding(setting.config, rates, len(self.hosts))]

    def _gpu_links(self, setting: Setting) -> list[Finding]:
        with_gpu = gather_objects(bool(_own_gpu(setting)), self.group)
        if not any(with_gpu):
            return []
        if not all(with_gpu):
            count = with_gpu.count(False)
            return [skipped("nccl links", f"{count} worker(s) have no GPU of their own")]
        device = torch.device("cuda", setting.ranks.local_rank)
        torch.cuda.set_device(device)
        failure = ""
        rates: list[links.Rate] = []
        try:
            group = dist.new_group(backend="nccl", timeout=self._timeout)
            assert isinstance(group, ProcessGroup)
            sizes = (*links.SIZES, links.GPU_SIZE)
            rates = links.measure(group, device, self.group, sizes)
        except (RuntimeError, dist.DistError) as error:
            failure = f"worker {setting.ranks.rank}: {_first_line(error)}"
        if failures := list(filter(None, gather_objects(failure, self._patient))):
            self._nccl_failed = True
            remedy = "NCCL_DEBUG=INFO says why; NCCL_SOCKET_IFNAME=INTERFACE, /dev/shm, the driver"
            return [problem("nccl links", f"{failures[0]} ({len(failures)} worker(s))", remedy)]
        return [
            *links.link_findings("nccl", rates, len(self.hosts), len(self.leaders)),
            links.head_finding(setting.config, rates, len(self.hosts)),
        ]

    def _clocks(self, _: Setting) -> list[Finding]:
        targets = self.leaders[1:] or [1]
        return [*links.skew_findings(links.clock_offsets(targets, self.group), self.hosts)]

    def _folder(self, setting: Setting) -> list[Finding]:
        if len(self.leaders) == 1:
            return []
        folder = existing(Path(setting.config.run.root).absolute())
        return [*links.shared_folder(folder, self.leaders, self.group)]


@dataclass(frozen=True)
class Absent:
    """Why the workers did not meet."""

    finding: Finding


def meet(ranks: Ranks, environment: Mapping[str, str], wait_seconds: float) -> Meeting | Absent:
    """Join the other workers over gloo, whatever devices there are.

    Unlike `world.start_world`, a failure is a finding: what is wrong with the network is what this
    command is for.

    Args:
        ranks: of this worker; more than one of them.
        environment: MASTER_ADDR, MASTER_PORT, and what torchrun sets.
        wait_seconds: for the others, and for one collective.
    """
    timeout = timedelta(seconds=wait_seconds)
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        return Absent(
            problem(
                "meeting",
                f"{ranks.size} workers, and MASTER_ADDR={address!r}, MASTER_PORT={port!r}",
                "set both to a free port of worker 0's host, or start with torchrun or deepspeed",
            )
        )
    # A variable of our own process: with it a hanging NCCL collective raises, and does not abort.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    kept_by_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = f"{address}:{port}"
    try:
        store = TCPStore(
            address,
            int(port),
            world_size=None if kept_by_agent else ranks.size,
            is_master=ranks.rank == 0 and not kept_by_agent,
            timeout=timeout,
        )
    except (RuntimeError, dist.DistError) as error:
        return Absent(
            problem(
                "meeting",
                f"worker {ranks.rank} on {socket.gethostname()} did not meet the other "
                f"{ranks.size - 1} at {place} within {wait_seconds:g} s ({_first_line(error)})",
                "start all workers; open the port in firewalls; MASTER_ADDR must be worker 0's "
                "host as the others reach it",
            )
        )
    try:
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"doctor {attempt}", store),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=timeout,
        )
        group, patient = dist.group.WORLD, dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert group is not None
        assert isinstance(patient, ProcessGroup)
        return Meeting(group, patient, timeout)
    except (RuntimeError, dist.DistError) as error:
        return Absent(
            problem(
                "meeting",
                f"worker {ranks.rank} on {socket.gethostname()} found the meeting point {place} "
                f"and cannot connect to the others ({_first_line(error)})",
                "GLOO_SOCKET_IFNAME=INTERFACE of the network of the workers; gloo uses ports that "
                "the system chooses, which firewalls between the hosts must let through",
            )
        )


def met(meeting: Meeting, seconds: float) -> Finding:
    """The finding that all are there."""
    count, hosts = len(meeting.hosts), len(meeting.leaders)
    measured = f"{count} workers on {hosts} host(s) met in {seconds:.1f} s"
    if seconds > 30:
        remedy = "hosts that start late hold up all; look at the scheduler and at name look-ups"
        return warning("meeting", measured, remedy, workers=count, hosts=hosts)
    return ok("meeting", measured, workers=count, hosts=hosts)


def timed_meeting(
    ranks: Ranks, environment: Mapping[str, str], wait_seconds: float
) -> tuple[Meeting | None, list[Finding]]:
    """`meet`, and what is to be said of it."""
    started = time.monotonic()
    found = meet(ranks, environment, wait_seconds)
    if isinstance(found, Absent):
        return None, [found.finding]
    return found, [met(found, time.monotonic() - started)]


def _own_gpu(setting: Setting) -> list[str]:
    """The name of the GPU that this worker would train on; nothing where there is none."""
    if setting.config.engine.device == "cpu" or not torch.cuda.is_available():
        return []
    local = setting.ranks.local_rank
    return [torch.cuda.get_device_name(local)] if local < torch.cuda.device_count() else []


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
