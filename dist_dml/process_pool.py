"""Pools of processes for work on shards and images, on one machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def process_pool(
    processes: int, start: Callable[..., object] | None = None, *arguments: Any
) -> ProcessPoolExecutor:
    """A pool whose processes have this process's environment of now.

    Forked children of a process that runs threads can hang; a forkserver has none. But its children
    know only the environment of the time at which it was started, for whichever pool came first: a
    password that a notebook sets later would be missing in them.

    Args:
        processes: at most so many.
        start: called once in each process, before its first job.
        arguments: of `start`; they are pickled.
    """
    return ProcessPoolExecutor(
        processes,
        get_context("forkserver"),
        initializer=_start,
        initargs=(dict(os.environ), start, arguments),
    )


def take_environment(variables: Mapping[str, str]) -> None:
    """Make `variables` the environment of this process, others removed."""
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _start(
    variables: Mapping[str, str], start: Callable[..., object] | None, arguments: tuple[Any, ...]
) -> None:
    take_environment(variables)
    if start is not None:
        start(*arguments)
