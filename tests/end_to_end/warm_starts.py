"""Trainings without the seconds that imports take: forks of a process that has done them.

A worker needs 5 to 7 seconds of a core for its imports, and the slow tests start hundreds. Here a
server imports once and forks; a fork gets its own words, environment, folder and output, runs the
same `main()`, and ends as any interpreter does. To a test it is a `subprocess.Popen`. What the
documented commands do from their first import on is tested by the others: torchrun, deepspeed,
`dist-dml` itself, and whoever asks for `cold=True`.

Started as a program, this is the server; it ends with the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import setproctitle

_IMPORTS = (
    *("torch", "torch._dynamo", "torch.distributed", "torch.profiler", "dist_dml.train"),
    *("pandas", "pyarrow.parquet", "pyarrow.fs"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)
_MOST_REQUEST = 2**20


class WarmProcess(subprocess.Popen):
    """A fork of the server. Its exit code comes from whoever waits for it there."""

    def __init__(
        self, command: Sequence[str], request: dict[str, Any]
    ) -> None:  # no super: no exec
        reader, writer = os.pipe()
        self._status, status = os.pipe()
        try:
            _ask(request, [writer, status])
        finally:
            os.close(writer)
            os.close(status)
        self.args = list(command)
        self.stdin = self.stderr = None
        self.stdout = io.TextIOWrapper(open(reader, "rb"), errors="replace")  # noqa: SIM115
        self.text_mode, self.encoding, self.errors = True, None, None
        self.returncode: int | None = None
        self._child_created, self._communication_started = True, False
        self._input = None
        self._closed_child_pipe_fds = True
        self._sigint_wait_secs = 0.25
        self._waitpid_lock = threading.Lock()
        self._told = b""
        self.pid = int(self._line())

    def _line(self) -> bytes:
        """The next line of the status; waits for it."""
        while b"\n" not in self._told:
            found = os.read(self._status, 64)
            if not found:
                raise RuntimeError("the server of warm starts has died")
            self._told += found
        line, _, self._told = self._told.partition(b"\n")
        return line

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """As `os.waitpid`."""
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        status = int(self._line())
        os.close(self._status)
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, **unused: Any) -> int | None:
        with self._waitpid_lock:
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
        return self.returncode

    def __del__(self, *unused: Any) -> None:
        """Nobody waits for a fork but the server."""


_server: socket.socket | None = None
_process: subprocess.Popen[bytes] | None = None


def start_warm(
    command: Sequence[str], module: str, environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[str]:
    """`python -m MODULE ARGUMENTS` or `python FILE ARGUMENTS` as a fork; output and errors in one
    pipe.

    Args:
        command: what it would be as a process of its own, and what process lists show; the
            arguments stand behind `-m MODULE` or behind the first word.
        module: whose `main` takes the arguments; or a file, which runs as a program.
        environment: all of it.
        folder: to begin in.
    """
    given = list(command)
    behind = given.index(module) + 1 if module in given else 1
    request = {
        "command": given,
        "module": module,
        "arguments": given[behind:],
        "environment": dict(environment),
        "folder": str(folder),
    }
    return WarmProcess(command, request)


def _ask(request: dict[str, Any], descriptors: list[int]) -> None:
    """Send a request to the server, which is started by the first one."""
    global _server, _process
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        _process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        _server = ours
    content = json.dumps(request).encode()
    _server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_REQUEST)
    socket.send_fds(_server, [content], descriptors)


def serve(connection: socket.socket) -> Callable[[], int]:
    """Fork for each request. Returns in each fork, with what it has to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Keepers are not waited for.
    while True:
        content, descriptors, _, _ = socket.recv_fds(connection, _MOST_REQUEST, 2)
        if not content:
            os._exit(0)
        request = json.loads(content)
        if "engine.name=deepspeed" in request["arguments"]:
            importlib.import_module("deepspeed")
        out, status = descriptors
        if os.fork() == 0:
            connection.close()
            return _keep(request, out, status)
        os.close(out)
        os.close(status)


def _keep(request: dict[str, Any], out: int, status: int) -> Callable[[], int]:
    """Fork the worker, and tell in the end how it ended. Returns in the worker."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        return _prepare(request, out, status)
    os.close(out)
    # Whatever the test signals is the worker.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            ended = os.waitpid(pid, 0)[1]
            break
        except InterruptedError:
            continue
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{ended}\n".encode())
    os._exit(0)


def _prepare(request: dict[str, Any], out: int, status: int) -> Callable[[], int]:
    """Become the process that was asked for, and tell its number."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(out)
    os.close(nothing)
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False))  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", closefd=False),  # noqa: SIM115
        errors="backslashreplace",
        line_buffering=True,
    )
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    sys.argv = [request["module"], *request["arguments"]]
    setproctitle.setproctitle(" ".join(request["command"]))
    os.write(status, f"{os.getpid()}\n".encode())
    os.close(status)
    if request["module"].endswith(".py"):
        sys.path[0] = str(Path(request["module"]).parent)
        return lambda: runpy.run_path(request["module"], run_name="__main__") and 0
    module = importlib.import_module(request["module"])
    return lambda: module.main()


def main() -> int:
    """The server, and each of its forks."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = os.getcwd()
    for name in _IMPORTS:
        importlib.import_module(name)
    setproctitle.getproctitle()  # It finds its place by an environment that is still untouched.
    gc.freeze()
    end_as(serve(connection))
    return 0


def end_as(run: Callable[[], int]) -> None:
    """Run and exit as the interpreter does, without taking all modules apart, which takes seconds
    in a fork, where each touched page is copied first."""
    code = 1
    try:
        code = run()
    except SystemExit as ended:
        if isinstance(ended.code, int) or ended.code is None:
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
