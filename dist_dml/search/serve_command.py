"""ENTRY: a web page on this machine: drop an image and see its neighbours.

    dist-dml search serve indexes/demo

It asks nobody who he is, so it listens to this machine alone unless `--host` says otherwise, and
answers only to the names that it is told. See docs/search.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_dml.errors import UsageError
from dist_dml.listening import (
    HOST,
    bracketed,
    check_names,
    is_loopback,
    listen,
    name_filter,
    sigterm_as_interrupt,
    spellings,
)
from dist_dml.retrieval.search_files import open_search_index
from dist_dml.search.app import search_app
from dist_dml.search.query_command import load_model_of
from dist_dml.search.service import SearchService, images_of

_MOST_CONNECTIONS = 64
"""Each may hold a body of 16 MiB: a gibibyte in all."""


def search_server(service: SearchService, port: int, allowed_hosts: Sequence[str]) -> Any:
    """A uvicorn server of the page; its `run` ends in good order at SIGINT or SIGTERM.

    Requests that have begun get three seconds to end, then the signal is raised again.
    """
    import uvicorn

    config = uvicorn.Config(
        search_app(service, name_filter(allowed_hosts, port)),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


def _say_when_started(server: Any, line: str) -> None:
    """Print the address once it answers, and signals end it in good order."""
    while not server.started and not server.should_exit:
        time.sleep(0.02)
    if server.started:
        print(line, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("index", metavar="INDEX", help="folder of `dist-dml search build`")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"address to listen on (default: {HOST}, this machine alone); another one needs "
        "--allowed-hosts, and a proxy that asks for passwords: the page asks for none",
    )
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME,...",
        help="names by which browsers reach it (search.example.org); others get nothing",
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="RUN_OR_CHECKPOINT", help="if it lies elsewhere now"
    )
    parser.add_argument("--data", default="", metavar="DATASET", help="likewise, for the pictures")


def run(arguments: argparse.Namespace) -> int:
    """Serve. Returns the exit code.

    Raises:
        UsageError: the index, its checkpoint, the address or the names cannot be used.
    """
    names = [name.strip() for name in arguments.allowed_hosts.split(",") if name.strip()]
    check_names(arguments.host, names, "search.example.org")
    if patterns := [name for name in names if "*" in name or "?" in name]:
        raise UsageError(f"--allowed-hosts={patterns[0]} is a pattern; list the names themselves")
    for library in ("starlette", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise UsageError(f"{library} is not installed; run `pip install 'dist_dml[search]'`")
    opened = open_search_index(Path(arguments.index))
    model = load_model_of(opened, arguments.checkpoint)
    data, reason = images_of(opened, model, arguments.data)
    if data is None:
        print(f"note: no pictures of the gallery: {reason}", file=sys.stderr)
    service = SearchService(opened, model, data)
    with listen(arguments.host, arguments.port) as listener:
        port = int(listener.getsockname()[1])
        shown = f"{bracketed(arguments.host)}:{port}"
        if not is_loopback(arguments.host):
            shown = spellings(names[0], port)[0]
        server = search_server(service, port, names)
        line = f"search page: http://{shown}/ (Ctrl-C ends it)"
        threading.Thread(target=_say_when_started, args=(server, line), daemon=True).start()
        try:
            with sigterm_as_interrupt():
                server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
    return 0
