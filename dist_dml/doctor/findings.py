"""What a check found, and how checks run: each alone, with a time limit, and never the end of all.

A check is a function from a `Setting` to findings. It may raise: what it raises becomes a finding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dist_dml.config import Config
from dist_dml.credentials import redact
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.world import Ranks

Level = Literal["ok", "note", "warning", "problem", "skipped"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note", "skipped", "ok")
"""From what must be acted on to what needs nothing. Only a problem changes the exit code."""

Scope = Literal["host", "first"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; without secrets, whatever it was made from.

    Attributes:
        name: what was looked at.
        level: `ok`; `note` (worth knowing); `warning` (slower, or fails under load); `problem` (a
            training fails, is wrong or leaves no trace); `skipped` (not looked at, and why).
        measured: what was found.
        remedy: which key, variable or command changes it; none for `ok`.
        values: the numbers behind `measured`, for JSON.
        section: of the report; of the check that found it.
        host: where it was found.
    """

    name: str
    level: Level
    measured: str
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    section: str = ""
    host: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.level in ("ok", "skipped"), f"{self.name} has no remedy"
        for name in ("measured", "remedy"):
            object.__setattr__(self, name, " ".join(redact(getattr(self, name)).split()))
        shown = {k: redact(v) if isinstance(v, str) else v for k, v in self.values.items()}
        object.__setattr__(self, "values", shown)


def ok(name: str, measured: str, /, **values: Any) -> Finding:
    """Nothing to do."""
    return Finding(name, "ok", measured, values=values)


def note(name: str, measured: str, remedy: str, /, **values: Any) -> Finding:
    """Worth knowing."""
    return Finding(name, "note", measured, remedy, values)


def warning(name: str, measured: str, remedy: str, /, **values: Any) -> Finding:
    """Slower than it could be, or fails under load."""
    return Finding(name, "warning", measured, remedy, values)


def problem(name: str, measured: str, remedy: str, /, **values: Any) -> Finding:
    """A training fails, is wrong, or leaves no trace where it should."""
    return Finding(name, "problem", measured, remedy, values)


def skipped(name: str, reason: str, remedy: str = "") -> Finding:
    """Not looked at."""
    return Finding(name, "skipped", reason, remedy)


@dataclass(frozen=True)
class Setting:
    """What all checks are given.

    Attributes:
        config: of the run that is to be; the defaults where none was named.
        ranks: who this worker is.
        environment: variables as they were when the command began.
        ray: address of a Ray cluster; "" asks none.
        mlflow_named: whether the user named a store, rather than taking the default.
        system: root of /proc, /sys and /dev.
        home: of this user.
    """

    config: Config
    ranks: Ranks
    environment: Mapping[str, str]
    ray: str = ""
    mlflow_named: bool = False
    system: Path = Path("/")
    home: Path = field(default_factory=Path.home)

    @property
    def several_hosts(self) -> bool:
        """Whether the launcher has started workers on more than one host."""
        return self.ranks.size > self.ranks.local_size


@dataclass(frozen=True)
class Check:
    """One function and where it runs.

    Attributes:
        section: of the report.
        name: of the finding that replaces the function's own where it gives none.
        find: the function.
        seconds: its time limit.
        scope: the first worker of each host, or the first of all.
        if_slow: the remedy where the limit is reached.
    """

    section: str
    name: str
    find: Callable[[Setting], Iterable[Finding]]
    seconds: float
    scope: Scope = "host"
    if_slow: str = "run the command again; if it stays so, look at what it waits for"

    def is_for(self, ranks: Ranks) -> bool:
        """Whether this worker runs it."""
        return ranks.rank == 0 if self.scope == "first" else ranks.local_rank == 0


def run_check(check: Check, setting: Setting) -> list[Finding]:
    """Its findings, within its time limit. Never raises.

    It runs in a thread of its own. One that is over its limit is left behind: a read from a network
    file system that is gone cannot be ended.
    """
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check.find(setting))
        except Exception as error:
            found.append(of_error(check.name, error))

    thread = threading.Thread(target=work, name=f"doctor: {check.name}", daemon=True)
    thread.start()
    thread.join(check.seconds)
    done = list(found)
    if thread.is_alive():
        measured = f"no answer within {check.seconds:g} s"
        done.append(warning(check.name, measured, check.if_slow))
    return [replace(finding, section=check.section) for finding in done]


def of_error(name: str, error: Exception) -> Finding:
    """What an exception says: a user's mistake with its own remedy, else a check that failed."""
    text = " ".join(str(error).split())
    if isinstance(error, (UsageError, RunError)):
        # Refusals say what was found, and behind the last semicolon what to do.
        measured, _, remedy = text.rpartition("; ")
        return problem(name, measured or text, remedy if measured else "change what it names")
    return skipped(
        name,
        f"the check itself failed ({type(error).__name__}: {text[:200]})",
        "an error of dist_dml; please report it",
    )


def gibibytes(size: float) -> str:
    """Bytes for people: GiB, or MiB below one."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
