"""Runs the folds: some at a time, each a process of its own; one that fails ends the others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from dist_dml.errors import RunError
from dist_dml.protocol_guard import GRACE_SECONDS
from dist_dml.tracking.live import Stream, format_duration

_POLL_SECONDS = 0.2
_TERMINAL_SECONDS = 1.0
_FILE_SECONDS = 10.0
_TAIL_BYTES = 2**16
_STEP = re.compile(r"^step +(\d+)(?:[/:]|  )")
_TOTAL = re.compile(r": (\d+) steps(?: or (\S+) s)?(?:, from step (\d+))? of ")
# Of a training with a limit of time.
_SECONDS = re.compile(r"^step +\d+  (\d+)/\d+ s  ")
_HEAD_BYTES = 2**14
_ERROR = "dist_dml: error: "
_KILLED = re.compile(r"(Signal \d+ \(\w+\) received by PID \d+)")


@dataclass(frozen=True)
class Stage:
    """One command of a fold; its output is appended to `log`."""

    label: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Job:
    """A fold's stages, one after the other."""

    name: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class _Goal:
    """All steps, or seconds where these are limited; those done when it was first looked at."""

    total: float
    of_seconds: bool
    before: float
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Running:
    job: Job
    stage: int
    process: subprocess.Popen[bytes]
    log_start: int
    started: float
    """Of the job, not of the stage."""
    goal: _Goal | None = None
    """Of training, once it has said it."""

    @property
    def at(self) -> Stage:
        return self.job.stages[self.stage]


@dataclass
class _Board:
    """What is shown while folds run: a line for each, redrawn on a terminal."""

    num_done: int
    stream: Stream
    what: str = "folds"
    shown_at: float = field(default_factory=time.monotonic)
    num_drawn: int = 0
    seconds: list[float] = field(default_factory=list)
    """What each fold took that was finished here."""

    def show(self, running: Sequence[_Running], num_waiting: int) -> None:
        every = _TERMINAL_SECONDS if self.stream.isatty() else _FILE_SECONDS
        if time.monotonic() - self.shown_at < every:
            return
        self.shown_at = time.monotonic()
        looks = [_look(one) for one in running]
        left = _seconds_left(running, [own for _, own in looks], num_waiting, self.seconds)
        head = f"{self.what}: {self.num_done} done, {len(running)} running, {num_waiting} waiting"
        lines = [head + (f", about {format_duration(left)} left" if left is not None else "")]
        for one, (said, _) in zip(running, looks, strict=True):
            lines.append(f"  {one.job.name}  {one.at.label}  {said}".rstrip())
        # A line that wraps would count as two when it is drawn over.
        width = shutil.get_terminal_size().columns - 1 if self.stream.isatty() else None
        self.say("\n".join(line[:width] for line in lines), len(lines))

    def say(self, text: str, drawn: int = 0) -> None:
        """Print text; the next one takes the place of the last `drawn` lines on a terminal."""
        # Up to the first of the lines that stand there, and all below it empty.
        start = f"\x1b[{self.num_drawn}F\x1b[J" if self.num_drawn else ""
        self.stream.write(f"{start}{text}\n")
        self.stream.flush()
        self.num_drawn = drawn if self.stream.isatty() else 0


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    num_done: int,
    lock: int,
    stream: Stream | None = None,
    keep_going: bool = False,
    what: str = "folds",
) -> dict[str, str]:
    """Run every job, as many at a time as there are slots.

    Every process stands under a guard (`protocol_guard`): whether a fold fails, this function is
    interrupted, or this process is killed, no worker is left behind.

    Args:
        jobs: in the order in which they start.
        slots: what each place adds to the environment, for example its devices.
        num_done: folds that need no run; for the progress.
        lock: descriptor of a lock that the guards hold on to until their command has ended.
        stream: where progress goes; standard error by default.
        keep_going: let the others run where one fails.
        what: the jobs are, for the progress.

    Returns:
        What failed, by the job's name: its last words and where to read the others.

    Raises:
        RunError: a job failed, unless `keep_going`.
    """
    failures: dict[str, str] = {}
    board = _Board(num_done, sys.stderr if stream is None else stream, what)
    waiting = deque(jobs)
    running: dict[int, _Running] = {}
    try:
        while waiting or running:
            for slot, environment in enumerate(slots):
                if waiting and slot not in running:
                    job = waiting.popleft()
                    board.say(f"{job.name}: output in {_logs(job)}")
                    running[slot] = _start(job, 0, environment, lock, time.monotonic())
            time.sleep(_POLL_SECONDS)
            for slot, one in list(running.items()):
                code = one.process.poll()
                if code is None:
                    continue
                del running[slot]
                _close(one)
                if code:
                    failures[one.job.name] = _failure(one, code)
                    if not keep_going:
                        raise RunError(failures[one.job.name])
                    board.say(failures[one.job.name])
                    continue
                if one.stage + 1 < len(one.job.stages):
                    running[slot] = _start(one.job, one.stage + 1, slots[slot], lock, one.started)
                    continue
                board.num_done += 1
                board.seconds.append(time.monotonic() - one.started)
                board.say(f"{one.job.name}: done in {format_duration(board.seconds[-1])}")
            board.show(list(running.values()), len(waiting))
    finally:
        _end(list(running.values()))
    return failures


def _start(
    job: Job, stage: int, environment: Mapping[str, str], lock: int, started: float
) -> _Running:
    at = job.stages[stage]
    at.log.parent.mkdir(parents=True, exist_ok=True)
    with at.log.open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_dml.protocol_guard", *at.command],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is this process's to pass on, through the pipe.
            start_new_session=True,
            pass_fds=(lock,),
        )
    return _Running(job, stage, process, log_start, started)


def _close(one: _Running) -> None:
    """Close the pipe: the guard ends its command."""
    pipe = one.process.stdin
    assert pipe is not None
    pipe.close()


def _end(running: Sequence[_Running]) -> None:
    """Have every guard end its command, all at the same time, and wait until they have."""
    for one in running:
        _close(one)
    for one in running:
        try:
            one.process.wait(2 * GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            one.process.kill()


def _failure(one: _Running, code: int) -> str:
    """One line: which fold, why, where to read more."""
    return (
        f"{one.job.name} failed while {one.at.label} (exit code {code}): {last_words(_tail(one))} "
        f"[log: {one.at.log}]"
    )


def last_words(output: str) -> str:
    """Why a command failed: its own line about that, or torchrun's, or the last with a letter."""
    lines = [line.strip() for line in output.splitlines() if re.search(r"\w", line)]
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    # Where torchrun is faster, it ends the workers that would say that one of them is gone; the
    # first to go, which it calls the root cause, is the last of its list.
    killed = [found.group(1) for line in lines if (found := _KILLED.search(line))]
    return [*errors[-1:], *killed[-1:], *lines[-1:], "it said nothing"][0]


def _tail(one: _Running) -> str:
    """The end of what the running stage has written since it was started."""
    with one.at.log.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        return _read_from(log, max(one.log_start, size - _TAIL_BYTES))


def _read_from(log: BinaryIO, start: int) -> str:
    log.seek(start)
    return log.read().decode("utf-8", "replace")


def _look(one: _Running) -> tuple[str, float | None]:
    """What a fold says of itself, and the seconds it needs; None while nobody can know.

    The time is that of all steps (or seconds of training, where they are limited) since it was
    first looked at, evaluations included.
    """
    if one.stage > 0:
        return "", 0.0
    said = [line.strip() for line in _tail(one).splitlines()]
    line = [text for text in said if _STEP.match(text)][-1:]
    if one.goal is None:
        with one.at.log.open("rb") as log:
            log.seek(one.log_start)
            found = _TOTAL.search(log.read(_HEAD_BYTES).decode("utf-8", "replace"))
        if found:
            limit = float(found.group(2)) if found.group(2) else None
            before = _done(said, limit)
            before = int(found.group(3) or 0) if before is None and limit is None else before
            if before is not None:
                one.goal = _Goal(limit or int(found.group(1)), limit is not None, before)
    if one.goal is None or not line:
        return "".join(line), None
    goal = one.goal
    done = _done(said, goal.total if goal.of_seconds else None)
    if done is None or done <= goal.before:
        return line[0], None
    left = (time.monotonic() - goal.since) / (done - goal.before) * max(0.0, goal.total - done)
    unit = " s" if goal.of_seconds else ""
    return f"{done:.0f}/{goal.total:.0f}{unit}, {format_duration(left)} left: {line[0]}", left


def _done(said: Sequence[str], limit: float | None) -> float | None:
    """Steps that are done, or seconds of training where these are limited."""
    form = _STEP if limit is None else _SECONDS
    found = [match for text in said if (match := form.match(text))]
    return float(found[-1].group(1)) if found else None


def _seconds_left(
    running: Sequence[_Running],
    own: Sequence[float | None],
    num_waiting: int,
    finished: Sequence[float],
) -> float | None:
    """Of all folds: what the running ones need, and for those that wait what the others took."""
    known = [left for left in own if left is not None]
    if not running or len(known) < len(own):
        return None
    now = time.monotonic()
    whole = [now - one.started + left for one, left in zip(running, known, strict=True)]
    typical = sum([*finished, *whole]) / (len(finished) + len(whole))
    return max(max(known), (sum(known) + num_waiting * typical) / len(running))


def _logs(job: Job) -> str:
    return ", ".join(dict.fromkeys(str(stage.log) for stage in job.stages))
