"""`dist-dml doctor`: what would stop or slow a training here, and what to do about it.

    dist-dml doctor
    dist-dml doctor --config my.yaml run.root=/shared/runs --ray http://127.0.0.1:8265
    torchrun --nproc-per-node 2 -m dist_dml.doctor --config my.yaml
    deepspeed --num_accelerators 2 --module dist_dml.doctor

Looks at versions, GPUs, cores, memory, /dev/shm, disks, the data set, FAISS, MLflow, Ray, the
network and the environment. Workers that a launcher starts also measure their links and clocks
together. Nothing is left behind. Exit code 0 without a problem, 1 with one, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_dml.command_line import run_command
from dist_dml.config_loading import resolve
from dist_dml.credentials import refuse_secret
from dist_dml.doctor.devices import gpu_findings
from dist_dml.doctor.environment import shadow_findings, trap_findings
from dist_dml.doctor.findings import Check, Finding, Setting, run_check
from dist_dml.doctor.kernels import compiler_findings, faiss_findings, processor_findings
from dist_dml.doctor.machine import (
    core_findings,
    file_findings,
    memory_findings,
    shared_memory_findings,
    temporary_findings,
)
from dist_dml.doctor.meeting import Meeting, timed_meeting
from dist_dml.doctor.mlflow_server import mlflow_findings
from dist_dml.doctor.network import network_findings
from dist_dml.doctor.printing import object_of, text_of
from dist_dml.doctor.ray_cluster import ray_findings
from dist_dml.doctor.shards import shard_findings
from dist_dml.doctor.storage import run_root_findings
from dist_dml.doctor.versions import version_findings
from dist_dml.entry import add_config_arguments
from dist_dml.errors import UsageError
from dist_dml.parallel.world import environment_ranks

_DISK = "look at the mount (df, dmesg): a network file system that is gone blocks who asks for it"
CHECKS: tuple[Check, ...] = (
    Check("versions", "versions", version_findings, 20),
    Check("versions", "hidden modules", shadow_findings, 20, if_slow=_DISK),
    Check("devices", "GPUs", gpu_findings, 60, if_slow="nvidia-smi and dmesg: the driver hangs"),
    Check("devices", "processor", processor_findings, 5),
    Check("devices", "FAISS", faiss_findings, 20, if_slow="python -c 'import faiss' by hand"),
    Check("devices", "C++ compiler", compiler_findings, 25),
    Check("machine", "cores", core_findings, 5),
    Check("machine", "memory", memory_findings, 5),
    Check("machine", "/dev/shm", shared_memory_findings, 5),
    Check("machine", "ulimit -n", file_findings, 5),
    Check("machine", "temporary files", temporary_findings, 5, if_slow=_DISK),
    Check("storage", "run.root", run_root_findings, 15, if_slow=_DISK),
    Check("storage", "data", shard_findings, 25, if_slow=_DISK),
    Check("services", "MLflow", mlflow_findings, 20, "first", "the server takes connections only"),
    Check("services", "Ray", ray_findings, 15, "first", "the head takes connections only"),
    Check("network", "network", network_findings, 15, if_slow="name look-ups hang: resolv.conf"),
    Check("environment", "variables", trap_findings, 5),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml doctor`."""
    add_config_arguments(parser)
    parser.add_argument("--data", metavar="FOLDER", help="data set to read (sets data.path)")
    parser.add_argument(
        "--mlflow",
        metavar="URI",
        help="store to ask (sets tracking.mlflow_uri); secrets as ${NAME}",
    )
    parser.add_argument(
        "--ray",
        default="",
        metavar="ADDRESS",
        help="cluster to ask: http://HOST:8265, ray://HOST:10001, HOST:6379 or auto",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="longest wait for the other workers, and for one of their measurements (default 60)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Check, and print the report once. Returns the exit code.

    Raises:
        UsageError: for a wrong configuration.
    """
    setting = _setting(arguments, dict(os.environ))
    if not arguments.wait > 0:
        raise UsageError(f"--wait={arguments.wait:g}: give a number of seconds above 0")
    started = time.monotonic()
    meeting, found = _look(setting, arguments.wait)
    if meeting is None and setting.ranks.local_rank:
        return 1  # The first worker of this host says so.
    if meeting is not None and setting.ranks.rank:
        # A launcher reports every worker that does not end well; one is enough.
        meeting.close()
        return 0
    hosts = list(dict.fromkeys(meeting.hosts if meeting else [socket.gethostname()]))
    workers = setting.ranks.size if meeting is not None else 1
    form = (found, hosts, workers, time.monotonic() - started)
    print(json.dumps(object_of(*form), indent=1) if arguments.json else text_of(*form), flush=True)
    if meeting is not None:
        meeting.close()
    return int(any(finding.level == "problem" for finding in found))


def _setting(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Setting:
    config = resolve(arguments.config, arguments.overrides).config
    if arguments.data is not None:
        # A shell has resolved the folder that the user is in; configurations take it as it is.
        data = config.data.model_copy(update={"path": arguments.data})
        config = config.model_copy(update={"data": data})
    if arguments.mlflow is not None:
        refuse_secret(arguments.mlflow, "--mlflow")
        tracking = config.tracking.model_copy(update={"mlflow_uri": arguments.mlflow})
        config = config.model_copy(update={"tracking": tracking})
    return Setting(
        config,
        environment_ranks(),
        environment,
        ray=arguments.ray,
        mlflow_named=arguments.mlflow is not None,
        home=Path.home(),
    )


def _look(setting: Setting, wait_seconds: float) -> tuple[Meeting | None, list[Finding]]:
    """All findings that this worker knows of: those of all workers, on worker 0."""
    ranks, environment = setting.ranks, setting.environment
    speaks = ranks.local_rank == 0
    progress = _Progress(speaks and ranks.rank == 0)
    meeting, together = None, []
    if ranks.size > 1:
        progress.say("meeting")
        meeting, together = timed_meeting(ranks, environment, wait_seconds)
    own: list[Finding] = []
    for check in CHECKS:
        if check.is_for(ranks):
            progress.say(check.section)
            own += run_check(check, setting)
    host = socket.gethostname()
    own = [replace(finding, host=host) for finding in own]
    if meeting is not None:
        of_all = [finding for found in meeting.gather(own) for finding in found]
        progress.say("links")
        together += meeting.findings(setting)
        own = of_all
    progress.end()
    return meeting, [*own, *(replace(finding, section="workers") for finding in together)]


class _Progress:
    """A word for each section on stderr, as it begins."""

    def __init__(self, speaks: bool) -> None:
        self._speaks, self._last = speaks, ""

    def say(self, word: str) -> None:
        if self._speaks and word != self._last:
            start = "dist-dml doctor: " if not self._last else " "
            print(f"{start}{word}", end="", file=sys.stderr, flush=True)
        self._last = word

    def end(self) -> None:
        if self._speaks:
            print(file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.doctor ...` and every launcher's entry."""
    this: Any = sys.modules[__name__]
    return run_command("dist_dml.doctor", this, sys.argv[1:] if argv is None else argv)
