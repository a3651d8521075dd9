"""A watchdog that names the worker and the place when a step takes too long.

A worker that waits for others hangs where they are not: in a collective. So all workers post where
they are, and the one that speaks looks for those that are somewhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from dist_dml.errors import print_failure
from dist_dml.parallel.failure import FailureBoard
from dist_dml.parallel.world import World

T = TypeVar("T")

_PACKAGE = str(Path(__file__).resolve().parents[1])
# Where waiting for others ends in a refusal: everywhere else it may be right to take long.
_LIMITED = ("data", "step")
# The thread that makes batches, for a main thread that waits for it.
_MAKER = "decode"
# Collectives time out at the same number of seconds, a little after they began: we come first.
_BEFORE_COLLECTIVES = 0.95
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """Where a worker is.

    Attributes:
        rank: of the worker.
        host: its machine.
        place: `data`, `step`, `collective`, `tracker`, `checkpoint` or `evaluation`.
        step: optimizer steps done.
        seconds: how long it has been there.
        line: innermost line of this package.
    """

    rank: int
    host: str
    place: str
    step: int
    seconds: float
    line: str


class StepWatch:
    """Watches one worker from a thread; costs the loop two assignments a place.

    Args:
        world: all workers.
        slow_seconds: `engine.slow_seconds`.
        limit_seconds: `engine.timeout_seconds`: ends a run that waits for data or for others.
    """

    def __init__(self, world: World, slow_seconds: float, limit_seconds: float) -> None:
        self._rank, self._size, self._board = world.rank, world.size, world.failures
        self._slow, self._limit = slow_seconds, limit_seconds * _BEFORE_COLLECTIVES
        self._poll = min(1.0, slow_seconds / 10)
        self._now = ("start", 0, time.monotonic())
        self._watched = threading.get_ident()
        self._stopped = threading.Event()
        self._hung: threading.Thread | None = None
        self._thread = threading.Thread(target=self._watch, name="step watch", daemon=True)

    def start(self) -> None:
        """Begin to watch the thread that calls this."""
        self._watched = threading.get_ident()
        self._thread.start()

    def stop(self) -> None:
        """The training is over."""
        self._stopped.set()

    def at(self, place: str, step: int) -> None:
        """The worker comes to a place.

        Args:
            place: see `Place`.
            step: optimizer steps done.
        """
        self._now = (place, step, time.monotonic())

    @contextlib.contextmanager
    def inside(self, place: str) -> Iterator[None]:
        """A short stay in a place, and back to the one before."""
        before, step, _ = self._now
        self.at(place, step)
        try:
            yield
        finally:
            self.at(before, step)

    def fetching(self, batches: Iterable[T], step: int) -> Iterator[T]:
        """The batches, whose making is the place `data`. `step`: where training starts."""
        iterator = iter(batches)
        while True:
            _, at_step, _ = self._now
            self.at("data", max(step, at_step))
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch

    def _watch(self) -> None:
        seen, due = self._now, self._slow
        while not self._stopped.wait(self._poll):
            now = self._now
            if now is not seen:
                # An evaluation is no step: it takes its time.
                seen, due = now, self._limit if now[0] == "evaluation" else self._slow
            seconds = time.monotonic() - now[2]
            if seconds < self._slow / 2 or now[0] == "start":
                continue
            mine = self._own(now, seconds)
            self._post(mine)
            over = seconds > self._limit and now[0] in _LIMITED
            if seconds < due and not over:
                continue
            due = 2 * max(due, seconds)
            if not self._speaks(mine, due) and not over:
                continue
            # Those that came here a little later post a little later.
            if self._stopped.wait(2 * self._poll) or self._now is not now:
                continue
            text = finding(mine, self._all(mine), self._size)
            if over:
                self._end(text)
            print(f"dist_dml: warning: {text}", file=sys.stderr, flush=True)

    def _own(self, now: tuple[str, int, float], seconds: float) -> Place:
        place, step, _ = now
        frames = sys._current_frames()
        frame = frames.get(self._watched)
        if place == "data":
            makers = [t.ident for t in threading.enumerate() if t.name == _MAKER]
            frame = next((frames[i] for i in makers if i in frames), frame)
        in_collective, line = where(frame)
        waits = in_collective if in_collective is not None else not self._computes()
        shown = "collective" if place == "step" and waits else place
        return Place(self._rank, socket.gethostname(), shown, step, seconds, line)

    def _computes(self) -> bool:
        """Whether the watched thread has used a core in the last while: the backward of DDP both
        computes and waits inside one call.
        """
        clock = time.pthread_getcpuclockid(self._watched)
        before, since = time.clock_gettime(clock), time.monotonic()
        self._stopped.wait(min(0.2, self._poll))
        used = time.clock_gettime(clock) - before
        return used > 0.3 * (time.monotonic() - since)

    def _post(self, mine: Place) -> None:
        if self._board is not None:
            text = json.dumps(asdict(mine))
            self._asked(lambda board: board.post(f"place {mine.rank}", text))

    def _speaks(self, mine: Place, due: float) -> bool:
        """Whether it is this worker that says so: the first that comes, for each time."""
        if self._board is None:
            return True
        key = f"speaks {mine.step} {round(due / self._slow).bit_length()}"
        first = self._asked(lambda board: board.claim(key, str(mine.rank)))
        return first in (None, str(mine.rank))

    def _all(self, mine: Place) -> dict[int, Place]:
        """What the workers have posted of this step, by rank."""
        found = {mine.rank: mine}
        if self._board is None:
            return found
        for rank in range(self._size):
            text = self._asked(lambda board, key=f"place {rank}": board.read(key))
            with contextlib.suppress(ValueError, TypeError):
                place = Place(**json.loads(text or ""))
                if place.step >= mine.step and rank != mine.rank:
                    found[rank] = place
        return found

    def _asked(self, question: Callable[[FailureBoard], str | None]) -> str | None:
        """The board's answer; None if there is none in time: its keeper may be what hangs."""
        if self._hung is not None and self._hung.is_alive():
            return None
        board, answers = self._board, []
        assert board is not None
        thread = threading.Thread(target=lambda: answers.append(question(board)), daemon=True)
        thread.start()
        thread.join(_ANSWER_SECONDS)
        self._hung = thread if thread.is_alive() else None
        return answers[0] if answers else None

    def _end(self, text: str) -> None:
        reason = (
            f"{text}; mend that, or raise engine.timeout_seconds if it may take this long, and "
            "continue with --resume auto"
        )
        if self._board is not None and (self._hung is None or not self._hung.is_alive()):
            self._board.report(reason, 1)
        print_failure(reason)
        os._exit(1)


def where(frame: FrameType | None) -> tuple[bool | None, str]:
    """Whether a thread is in a collective (None if the stack does not tell), and its innermost line
    of this package.
    """
    found: bool | None = False
    while frame is not None:
        name = frame.f_code.co_filename
        if "torch/distributed" in name or name.endswith("parallel/collectives.py"):
            found = True
        elif name.endswith("torch/autograd/graph.py"):  # Our own functions and DDP reduce in it.
            found = found or None
        if name.startswith(_PACKAGE):
            short = Path(name).relative_to(Path(_PACKAGE).parent)
            return found, f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return found, ""


def finding(mine: Place, places: Mapping[int, Place], size: int) -> str:
    """Who holds the others up, in one line.

    Args:
        mine: of the worker that speaks.
        places: by rank; those missing have said nothing of this step.
        size: number of workers.
    """
    start = f"step {mine.step + 1} has taken {mine.seconds:.0f} s so far: "
    silent = [rank for rank in range(size) if rank not in places]
    elsewhere = [place for place in places.values() if place.place not in ("collective", "step")]
    computing = [place for place in places.values() if place.place == "step"]
    waiting = [place for place in places.values() if place.place == "collective"]
    if elsewhere:
        named, others = elsewhere, [*computing, *waiting]
    elif waiting and computing:
        named, others = computing, waiting
    elif silent:
        named, others = [], [*computing, *waiting]
    else:
        named, others = [*computing, *waiting], []
    parts = [f"worker {p.rank} ({p.host}) is in {p.place} ({p.line})" for p in named]
    if silent:
        names = ", ".join(str(rank) for rank in silent)
        parts.append(f"worker {names} says nothing: stopped, cut off, or its machine is gone")
    if others:
        ranks = ", ".join(str(place.rank) for place in sorted(others, key=lambda p: p.rank))
        parts.append(f"worker {ranks} waits for it")
    elif len(named) > 1 and not silent and not elsewhere:
        parts.append("all wait for each other: look at the network between them")
    return start + "; ".join(parts)
