"""Trainings from web servers that fail, vanish and return: the same weights to the last bit, or an
end in one line."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from launching import BIN, Launcher, free_port, training_processes
from printed_lines import PrintedLines
from shard_server import serving

from dist_dml.data.index_command import build_index, build_remote_index
from dist_dml.data.retry import Retry
from dist_dml.data.shards import write_shard

pytestmark = pytest.mark.slow

NUM_SHARDS = 26
SHARD_SAMPLES = 16
TRAINING = ["data.batch_size=16", "training.epochs=4", "data.loader_processes=1"]
TRAINING += ["engine.threads=1", "tracking.diagnostics=false"]
TRAINING += ["data.locality=window", "data.window_shards=2", "checkpoint.every_steps=7"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 tars of 16 noisy patterns, more than the smallest cache holds, and one of a test split."""
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    patterns = [
        cv2.resize(draw.integers(0, 256, (4, 4), dtype=np.uint8), (32, 32)) for _ in "a" * 9
    ]
    names = [f"train-{number:06d}" for number in range(NUM_SHARDS)] + ["test-000000"]
    for name in names:
        rows = []
        for sample in range(SHARD_SAMPLES):
            label = sample % 6 if name.startswith("train") else 6 + sample % 3
            noisy = np.clip(patterns[label] + draw.normal(0, 40, (32, 32)), 0, 255)
            png = cv2.imencode(".png", noisy.astype(np.uint8))[1].tobytes()
            rows.append({"__key__": f"{name}-{sample}", "png": png, "cls": f"{label}".encode()})
        write_shard(folder / f"{name}.tar", rows)
    build_index(folder)
    assert sum(path.stat().st_size for path in folder.glob("train-*")) > 1.2 * 2**20
    return folder


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final state of two workers that read local files."""
    launcher = Launcher(shards, tmp_path_factory.mktemp("local"))
    done = launcher.run("by hand", 2, "run.name=local", *TRAINING)
    assert done.exit_code == 0, done.output
    return launcher.tensors("local")


def storage(tmp_path: Path, retries: int, seconds: float) -> str:
    """A cache that cannot hold all shards, so that they are fetched in every epoch."""
    cache = f"cache: {tmp_path / 'cache'}, cache_mebibytes: 1, ahead_shards: 2"
    return f"data.storage={{{cache}, retries: {retries}, retry_seconds: {seconds}}}"


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class WebServer:
    """`python -m http.server` on a port of its own, killed and started as a test wants."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [str(BIN / "python"), "-m", "http.server", str(self.port)]
        self._command += ["--bind", "127.0.0.1", "--directory", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it takes connections."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        pytest.fail("the web server did not start")

    def kill(self) -> None:
        """With SIGKILL: connections break, and later ones are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def web_server(shards: Path) -> Iterator[WebServer]:
    server = WebServer(shards)
    server.start()
    yield server
    server.kill()


def started(launcher: Launcher, kind: str, name: str, *words: str) -> list[PrintedLines]:
    """Two workers that have trained a fourth of their steps."""
    processes = launcher.start(kind, 2, f"run.name={name}", *words)
    outputs = [PrintedLines(process) for process in processes]
    deadline = time.monotonic() + 90
    steps = 0
    while steps < NUM_SHARDS:
        assert time.monotonic() < deadline, [output.lines for output in outputs]
        with suppress(FileNotFoundError):
            steps = len(launcher.losses(name))
        time.sleep(0.02)
    return outputs


def test_a_server_that_fails_in_every_way_changes_no_bit(
    launcher: Launcher, shards: Path, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    with serving() as server:
        for path in shards.glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        remote = build_remote_index(f"{server.url}/*.tar", tmp_path / "remote", processes=1)
        faults = [503, ("cut", 700), "drop", 429, None, ("cut", 30_000), 500, ("stall", 0.5)]
        for number, name in enumerate(sorted(server.files)):
            server.faults[name].extend(faults[number % 8 :] + faults[: number % 8])
        words = [f"data.path={remote.folder}", storage(tmp_path, 8, 0.05)]
        done = launcher.run("by hand", 2, "run.name=far", *TRAINING, *words)
        met = sum(len(faults) - len(left) for left in server.faults.values())
    assert done.exit_code == 0, done.output
    assert_equal(launcher.tensors("far"), expected)
    assert "Traceback" not in done.output
    assert met > 3 * NUM_SHARDS


def test_a_server_that_is_away_for_seconds_in_mid_run_changes_no_bit(
    launcher: Launcher, web_server: WebServer, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    remote = build_remote_index(f"{web_server.url}/*.tar", tmp_path / "remote", processes=1)
    words = [*TRAINING, f"data.path={remote.folder}", storage(tmp_path, 7, 0.2)]
    outputs = started(launcher, "by hand", "away", *words)
    web_server.kill()
    deadline = time.monotonic() + 60
    while not any("trying again" in line for output in outputs for line in list(output.lines)):
        assert time.monotonic() < deadline, [output.lines for output in outputs]
        time.sleep(0.01)
    time.sleep(2.0)
    web_server.start()
    for output in outputs:
        assert output.end(90) == 0, output.lines
    assert_equal(launcher.tensors("away"), expected)


def test_a_server_that_stays_away_ends_the_run_in_its_patience_and_a_resumed_one_goes_on(
    launcher: Launcher, web_server: WebServer, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    remote = build_remote_index(f"{web_server.url}/*.tar", tmp_path / "remote", processes=1)
    retry = Retry(5, 0.2)
    words = [
        *TRAINING,
        f"data.path={remote.folder}",
        storage(tmp_path, retry.retries, retry.seconds),
    ]
    outputs = started(launcher, "by hand", "lost", *words)
    web_server.kill()
    began = time.monotonic()
    assert [output.end(60) for output in outputs] == [1, 1]
    waited = time.monotonic() - began
    lines = [line for output in outputs for line in output.lines]
    (error,) = [line for line in lines if line.startswith("dist_dml: error:")]
    assert "cannot be had" in error
    assert "data.storage.retries" in error
    assert not any("Traceback" in line for line in lines)
    assert not training_processes(tmp_path)
    # Four processes need the same shard, and do not wait one after the other.
    assert waited < 3 * retry.pauses(), waited

    web_server.start()
    done = launcher.run("by hand", 2, "run.name=lost", *words, "--resume", "auto")
    assert done.exit_code == 0, done.output
    assert_equal(launcher.tensors("lost"), expected)
