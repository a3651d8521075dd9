"""`dist-dml ui`: the MLflow UI on the runs of a folder.

MLflow asks nobody who he is. So the UI is for this machine alone unless `--host` says otherwise,
and it answers only to the names that it is told: a page of another name that points here (DNS
rebinding) gets nothing, nor does one of another origin that sends it requests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_dml.errors import UsageError
from dist_dml.listening import (
    HOST,
    bracketed,
    check_names,
    is_loopback,
    listen,
    sigterm_as_interrupt,
    spellings,
)
from dist_dml.tracking.destination import DATABASE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml ui`."""
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"address to listen on (default: {HOST}, this machine alone); another one needs "
        "--allowed-hosts, and a proxy that asks for passwords: MLflow asks for none",
    )
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME,...",
        help="names by which browsers reach the UI (mlflow.example.org); others get nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve the UI until Ctrl-C. Returns MLflow's exit code.

    Raises:
        UsageError: if there is no database, MLflow is not installed, the address is taken, or is
            none of this machine's own without names that may ask.
    """
    names = [name.strip() for name in arguments.allowed_hosts.split(",") if name.strip()]
    command = ui_command(arguments.root, arguments.port, arguments.host, names)
    # The server starts others, which outlive it when it is killed: they get a session of their own,
    # that is ended as a whole.
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # It would switch off the checks that the command asks for.
    environment.pop("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", None)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    shown = f"{bracketed(arguments.host)}:{arguments.port}"
    if not is_loopback(arguments.host):
        shown = spellings(names[0], arguments.port)[0]
    print(
        # MLflow 3 opens on its pages for language models; the parameter asks for training runs.
        f"MLflow UI of {arguments.root}: "
        f"http://{shown}/#/experiments?workflowType=machine_learning "
        "(there in about 10 s; Ctrl-C ends it)",
        flush=True,
    )
    try:
        with sigterm_as_interrupt():
            return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(process)


def ui_command(
    root: Path, port: int, host: str = HOST, allowed_hosts: Sequence[str] = ()
) -> list[str]:
    """The command that serves the UI of `root`. Raises what `run` raises.

    Args:
        root: folder of the runs.
        port: to listen on.
        host: address or name of this machine to listen on.
        allowed_hosts: names, with or without a port, that requests may ask for besides loopback's.
    """
    database = root / DATABASE
    if not database.is_file():
        raise UsageError(
            f"there is no MLflow database {database}; train first (tracking.mlflow=true), name the "
            "folder of the runs with --root, or fill it with `dist-dml track sync RUN_FOLDER`"
        )
    check_names(host, allowed_hosts, "mlflow.example.org")
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError("mlflow is not installed; run `pip install 'dist_dml[mlflow]'`")
    listen(host, port).close()
    # Of any port, as `ssh -L 8080:localhost:5000` makes one of its own.
    names = ["localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", f"[::1]:{port}"]
    names += [with_port for name in allowed_hosts for with_port in spellings(name, port)]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database.resolve()}"]
    # Always explicit: MLflow's default lets every private address in, and the environment changes
    # it. Origins are those of the UI's own pages.
    command += ["--allowed-hosts", ",".join(dict.fromkeys(names))]
    command += ["--cors-allowed-origins", ",".join(_origins(names)), "--x-frame-options", "DENY"]
    return [*command, "--workers", "1", "--uvicorn-opts", "--log-level=warning"]


def _origins(names: Sequence[str]) -> list[str]:
    return [f"{scheme}://{name}" for name in dict.fromkeys(names) for scheme in ("http", "https")]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it has started, within 10 seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
