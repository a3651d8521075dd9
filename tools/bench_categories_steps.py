"""Time and memory of a step of every objective at every number of classes.

Each point is a process of its own with fresh memory. Processes of one number of classes whose heads
fit the memory together take turns, in an order that moves on by one; those that do not fit beside
the others come after them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench_categories_child import Request, serve
from bench_categories_ledger import point, summary
from bench_categories_objectives import epoch_seconds, needed_bytes
from bench_head_measure import report_progress

from dist_dml.usable import usable_memory

# Kept free of other processes' sake, and for what the estimate leaves out.
RESERVE_BYTES = 2 * 2**30
_STOP_SECONDS = 10.0
# Seconds that the turns of a point may take: slow ones have fewer, but three at least.
_PATIENCE_SECONDS, _FEWEST_TURNS = 12.0, 3


class PointLost(Exception):
    """A process ended or did not answer in time; its text is the row's `error`."""


class Member:
    """One process, its answers and its figures.

    Args:
        request: what it measures.
        limit_seconds: for any one of its answers.
    """

    def __init__(self, request: Request, limit_seconds: float) -> None:
        self.request, self._limit = request, limit_seconds
        # Forked from a process that has imported everything and computed nothing: an import takes
        # longer than most points. It finds the modules as this process does.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([serve.__module__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, request), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}
        self.heads: list[float] = []
        self.wholes: list[float] = []

    def answer(self, what: str) -> dict[str, Any]:
        """What it says next.

        Raises:
            PointLost: it ended, or the time limit passed.
        """
        try:
            if not self._connection.poll(self._limit):
                raise PointLost(f"time limit: {what} took more than {self._limit:g} s")
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise PointLost(self._ended(f" while {what}")) from None

    def ask(self, word: str) -> None:
        """Send it a word."""
        try:
            self._connection.send(word)
        except BrokenPipeError:
            raise PointLost(self._ended("")) from None

    def _ended(self, when: str) -> str:
        self._process.join(_STOP_SECONDS)
        code = self._process.exitcode
        killed = "; killed, perhaps for memory" if code == -signal.SIGKILL else ""
        return f"its process ended with status {code}{when}{killed}"

    def build(self) -> None:
        """Let it build its head and warm up."""
        self.ask("build")
        self.facts = self.answer("building the head and its first steps")

    def turn(self) -> None:
        """Let it measure once."""
        self.ask("turn")
        found = self.answer("a turn")
        self.heads.append(found["head_seconds"])
        self.wholes.append(found["seconds"])

    def close(self) -> None:
        """End it, and with it its memory."""
        self._connection.close()
        # One that is in the middle of something would go on to its end.
        self._process.terminate()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def step_settings(request: Request, images_per_class: int) -> dict[str, Any]:
    """The `config` of a point, from which its key follows."""
    clock = "processor time" if request.threads == 1 else "wall time"
    facts = {"images_per_class": images_per_class, "optimizer": "sgd", "clock": clock}
    return asdict(request) | facts


def measure_classes(
    requests: Sequence[Request],
    images_per_class: int,
    repeats: int,
    limit_seconds: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """All objectives at one number of classes, as many at a time as fit the memory.

    Args:
        requests: of the same number of classes.
        images_per_class: for the time of an epoch.
        repeats: turns of each.
        limit_seconds: for one answer of a process.
        keep: takes each row as soon as it is measured.
    """
    waiting = list(requests)
    group = 0
    while waiting:
        group += 1
        waiting = _measure_group(waiting, group, images_per_class, repeats, limit_seconds, keep)


def fitting(
    requests: Sequence[Request], free: float
) -> tuple[list[Request], list[Request], list[Request]]:
    """Who runs now, who comes later, and who does not fit even alone.

    Args:
        requests: in order.
        free: bytes.
    """
    now, later, never = [], [], []
    left = free - RESERVE_BYTES
    for request in requests:
        needed = needed_bytes(request.objective, request.num_classes, request.dim)
        if needed > free - RESERVE_BYTES:
            never.append(request)
        elif needed > left:
            later.append(request)
        else:
            now.append(request)
            left -= needed
    return now, later, never


def _measure_group(
    waiting: Sequence[Request],
    group: int,
    images_per_class: int,
    repeats: int,
    limit_seconds: float,
    keep: Callable[[dict[str, Any]], None],
) -> list[Request]:
    """Those that fit now. Returns those that are left."""
    free = usable_memory()
    now, later, never = fitting(waiting, free)
    for request in never:
        needed = needed_bytes(request.objective, request.num_classes, request.dim)
        text = (
            f"does not fit: needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free "
            f"and {RESERVE_BYTES / 2**30:.0f} GiB of them are kept"
        )
        keep(point_of(request, images_per_class) | {"error": text})
    members = [Member(request, limit_seconds) for request in now]
    try:
        ready = []
        for member in members:
            row = point_of(member.request, images_per_class)
            try:
                member.build()
            except PointLost as lost:
                keep(row | {"error": str(lost)})
                member.close()
                continue
            ready.append(member)
        for member in _take_turns(ready, repeats, images_per_class, keep):
            row = point_of(member.request, images_per_class)
            keep(row | figures_of(member, images_per_class) | {"group": group})
    finally:
        for member in members:
            member.close()
    return later


def turns_due(first_seconds: float, repeats: int) -> int:
    """How many turns a point has, from what a turn takes."""
    affordable = int(_PATIENCE_SECONDS / max(first_seconds, 1e-9))
    return min(repeats, max(_FEWEST_TURNS, affordable))


def _take_turns(
    members: Sequence[Member],
    repeats: int,
    images_per_class: int,
    keep: Callable[[dict[str, Any]], None],
) -> list[Member]:
    """Measure all in turns. Returns those that were measured to the end."""
    alive = list(members)
    started = time.perf_counter()
    for turn in range(repeats):
        first = turn % max(1, len(alive))
        for member in [*alive[first:], *alive[:first]]:
            seconds = 2 * member.facts["first_seconds"] * member.facts["steps_of_a_turn"]
            if turn >= turns_due(seconds, repeats):
                continue
            try:
                member.turn()
            except PointLost as lost:
                keep(point_of(member.request, images_per_class) | {"error": str(lost)})
                member.close()
                alive.remove(member)
        spent = time.perf_counter() - started
        left = spent / (turn + 1) * (repeats - turn - 1)
        report_progress(f"    turn {turn + 1} of {repeats}, at most {left:.0f} s left")
    return alive


def point_of(request: Request, images_per_class: int) -> dict[str, Any]:
    """The row of a point without figures."""
    settings = step_settings(request, images_per_class)
    return point("categories", "step", request.objective, settings)


def figures_of(member: Member, images_per_class: int) -> dict[str, Any]:
    """What a process has measured."""
    request, facts = member.request, member.facts
    whole, head = summary(member.wholes), summary(member.heads)
    epoch = epoch_seconds(
        whole["seconds_median"], request.num_classes, images_per_class, request.rows
    )
    known: Mapping[str, Any] = {
        name: facts[name] for name in ("extra_bytes", "step_extra_bytes", "setup_seconds")
    }
    return {
        **whole,
        "head_seconds_median": head["seconds_median"],
        "head_seconds_spread": head["seconds_spread"],
        "epoch_seconds": epoch,
        "seconds": member.wholes,
        "head_seconds": member.heads,
        **known,
    }
