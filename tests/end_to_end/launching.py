"""Starts the documented commands as subprocesses, and reads what they left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from warm_starts import start_warm

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def plain_environment() -> dict[str, str]:
    """Of a command that no launcher has started; one thread."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return environment


def start_command(*words: str) -> subprocess.Popen[str]:
    """`dist-dml WORDS`, as a user without a launcher starts it; one thread; with warm imports."""
    command = [str(BIN / "dist-dml"), *words]
    return start_warm(command, "dist_dml.cli", plain_environment(), ROOT)


def finish(process: subprocess.Popen[str], timeout_seconds: float = 300) -> tuple[int, str]:
    """Exit code and output; nothing stays behind."""
    try:
        output = process.communicate(timeout=timeout_seconds)[0]
    finally:
        kill_tree(process.pid)
    return process.returncode, output


def steps_trained(folder: Path) -> Counter[int]:
    """How often a run has trained each step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return Counter(r["step"] for r in records if r["name"] == "train/loss")


@dataclass
class Finished:
    """How a command ended."""

    exit_code: int
    output: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        """The lines in which dist_dml says what went wrong."""
        return [line for line in self.output.splitlines() if line.startswith("dist_dml: error:")]


class Launcher:
    """Starts `train` in the ways that the README documents, and waits for the end."""

    def __init__(self, data: Path, root: Path) -> None:
        self.root = root
        self.settings = [
            f"data.path={data}",
            f"run.root={root}",
            "data.batch_size=128",
            "data.loader_processes=0",
            "data.image={size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
            "data.augment={rotation_degrees: 10, noise: 5}",
            "model={embedding_dim: 16, norm: batch, dropout: 0.3}",
            "optimizer={name: sgd, learning_rate: 0.05, nesterov: true}",
            "tracking={every_steps: 1, mlflow: false}",
            "evaluation={every_epochs: 0, nmi: false}",
            "engine.timeout_seconds=60",
            # Two threads for networks this small only wait for each other, on a busy machine long.
            "engine.threads=1",
        ]

    def command(
        self,
        kind: str,
        workers: int,
        arguments: Sequence[str],
        program: Sequence[str] | None = None,
    ) -> list[str]:
        """The command line; `by hand` starts one worker of several, see `start`.

        Args:
            kind: of start.
            workers: of a launcher.
            arguments: of the program.
            program: another one than the training's: a file with its first arguments, or -m MODULE.
        """
        port = str(free_port())
        by_python = [str(BIN / "python"), *(program or ("-m", "dist_dml.train"))]
        script = program or ("dist_dml/train.py",)
        head = {
            "python": by_python,
            "by hand": by_python,
            "deepspeed by hand": [*by_python, "engine.name=deepspeed"],
            "torchrun": [
                *(str(BIN / "torchrun"), "--nproc-per-node", str(workers)),
                *("--master-port", port, *script),
            ],
            "deepspeed": [
                *(str(BIN / "deepspeed"), "--num_accelerators", str(workers)),
                *("--master_port", port, *script, "engine.name=deepspeed"),
            ],
        }[kind]
        return [*head, *arguments]

    def start(
        self,
        kind: str,
        workers: int,
        *arguments: str,
        settings: Sequence[str] | None = None,
        of_worker: Mapping[int, Sequence[str]] | None = None,
        variables: Mapping[str, str] | None = None,
        cold: bool = False,
        program: Sequence[str] | None = None,
    ) -> list[subprocess.Popen[str]]:
        """The processes of one run; several only for workers started by hand, each of which can
        get further arguments of its own. `variables`: added to the environment of all; `program`:
        see `command`.

        What no launcher starts is forked from a process that has the imports, unless `cold`: for
        variables that are read while Python or torch starts."""
        settings = self.settings if settings is None else settings
        environment = plain_environment() | dict(variables or {})
        command = self.command(kind, workers, [*settings, *arguments], program)
        port = str(free_port())
        environments = [environment]
        if kind.endswith("by hand"):
            environments = [
                environment
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                for rank in range(workers)
            ]
        module = ""
        if (kind == "python" or kind.endswith("by hand")) and not cold:
            module = command[2] if command[1] == "-m" else command[1]
        return [
            self.popen([*command, *(of_worker or {}).get(rank, ())], each, module)
            for rank, each in enumerate(environments)
        ]

    def start_words(self, command: Sequence[str]) -> list[subprocess.Popen[str]]:
        """One process of these words, in the environment of all others."""
        return [self.popen(command, plain_environment())]

    def popen(
        self, command: Sequence[str], environment: Mapping[str, str], module: str = ""
    ) -> subprocess.Popen[str]:
        """One process, with its output in one pipe; a fork that runs `module`, if one is given."""
        if module:
            return start_warm(command, module, environment, ROOT)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        kind: str,
        workers: int,
        *arguments: str,
        settings: Sequence[str] | None = None,
        timeout_seconds: float = 300,
        program: Sequence[str] | None = None,
    ) -> Finished:
        """Start and wait; whatever is still there at the end is killed and fails the test."""
        started = time.monotonic()
        processes = self.start(kind, workers, *arguments, settings=settings, program=program)
        return self.wait(processes, started + timeout_seconds)

    def wait(self, processes: list[subprocess.Popen[str]], deadline: float) -> Finished:
        """Collect output and the largest exit code."""
        started = time.monotonic()
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=deadline - time.monotonic())[0])
        finally:
            for process in processes:
                kill_tree(process.pid)
        codes = [process.returncode for process in processes]
        return Finished(
            max(abs(code) for code in codes), "".join(outputs), time.monotonic() - started
        )

    def losses(self, name: str) -> dict[int, float]:
        """Loss by step; where a resumed run repeats a step, its last record."""
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["step"]: r["value"] for r in records if r["name"] == "train/loss"}

    def tensors(self, name: str, checkpoint_number: int = -1) -> dict[str, torch.Tensor]:
        """Everything in a checkpoint (the newest), classes joined over the workers."""
        checkpoint = sorted((self.root / name / "checkpoints").glob("step-*"))[checkpoint_number]
        tensors = {}
        for part in ("embedder", "optimizer"):
            loaded = load_file(checkpoint / f"{part}.safetensors")
            tensors |= {f"{part}/{key}": value for key, value in loaded.items()}
        shards = [load_file(path) for path in sorted(checkpoint.glob("classes-*"))]
        for key, first in shards[0].items():
            parts = [shard[key] for shard in shards]
            tensors[f"classes/{key}"] = torch.cat(parts) if first.ndim else first
        return tensors


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants, if they are still there."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def training_processes(root: Path) -> list[psutil.Process]:
    """Workers (not launchers) of the runs below `root` that are alive."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        is_worker = "python" in Path(line[0]).name if line else False
        names_run = any(str(root) in part for part in line)
        is_launcher = any(part.endswith(("torchrun", "deepspeed")) for part in line[:3])
        is_launcher = is_launcher or any("deepspeed.launcher" in part for part in line)
        if is_worker and names_run and not is_launcher and process.info["status"] != "zombie":
            found.append(process)
    return found


def wait_for_no_worker(root: Path, seconds: float = 20) -> None:
    """Until all workers of the runs below `root` have ended by themselves."""
    deadline = time.monotonic() + seconds
    while training_processes(root):
        assert time.monotonic() < deadline, "a worker was left behind"
        time.sleep(0.1)
