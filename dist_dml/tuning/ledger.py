"""What has been tried: one line an event, written by the driver alone, on disk before it counts.

A search that was killed is continued from here: ended trials are told to the sampler and never run
again; trials that had begun are run on, from their own checkpoints. Ray's state is not needed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist_dml.errors import RunError, UsageError
from dist_dml.tracking.run_files import complete_lines, open_to_append
from dist_dml.tuning.space import Value

FILE = "ledger.jsonl"
State = Literal["running", "complete", "stopped", "failed"]
Kind = Literal["search", "default", "best"]


@dataclass
class TrialRecord:
    """One trial, as far as it is known."""

    name: str
    """Of its run folder, below the study's."""
    kind: Kind
    """Proposed by the sampler; or, in the confirmation, unchanged or the best."""
    chosen: dict[str, Value]
    """The space's keys that it sets."""
    overrides: list[str] = field(default_factory=list)
    """What it sets besides."""
    state: State = "running"
    """`stopped`: early, because it fell behind; `failed`: see `reason`."""
    reports: list[dict[str, float]] = field(default_factory=list)
    """Each evaluation: value, share of its training, step, images_seen, seconds."""
    reason: str = ""
    test: float | None = None
    """Of the confirmation: the test's score at the chosen checkpoint."""

    @property
    def best(self) -> float | None:
        """The largest value reported; None before the first."""
        return max((report["value"] for report in self.reports), default=None)

    @property
    def seconds(self) -> float:
        """Of training, evaluations apart."""
        return self.reports[-1]["seconds"] if self.reports else 0.0


class Ledger:
    """The file, and what follows from it."""

    def __init__(self, folder: Path, search_digest: str) -> None:
        """Opens or makes the file; another search's is refused.

        Args:
            folder: of the study.
            search_digest: of what must not change between starts.

        Raises:
            UsageError: the file is of another search.
        """
        self.trials: dict[str, TrialRecord] = {}
        self._path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        offset, following = -1, 0
        while following != offset:
            offset = following
            events, following = complete_lines(self._path, offset)
            for event in events:
                self._apply(event, search_digest)
        if not following:
            self._write({"event": "search", "digest": search_digest})

    def begin(self, record: TrialRecord) -> None:
        """A trial is about to run."""
        self.trials[record.name] = record
        facts = {"kind": record.kind, "chosen": record.chosen, "overrides": record.overrides}
        self._write({"event": "begin", "trial": record.name, **facts})

    def report(self, name: str, report: Mapping[str, float]) -> None:
        """A trial has been evaluated; a repeated step of one that was resumed is passed over."""
        record = self.trials[name]
        if record.reports and report["step"] <= record.reports[-1]["step"]:
            return
        record.reports.append(dict(report))
        self._write({"event": "report", "trial": name, **report})

    def end(self, name: str, state: State, reason: str = "", test: float | None = None) -> None:
        """A trial is over."""
        record = self.trials[name]
        record.state, record.reason, record.test = state, reason, test
        self._write({"event": "end", "trial": name, "state": state, "reason": reason, "test": test})

    def of_kind(self, *kinds: Kind) -> list[TrialRecord]:
        """Trials in the order in which they began."""
        return [record for record in self.trials.values() if record.kind in kinds]

    def best(self) -> TrialRecord | None:
        """The trial of the search with the largest value, the earlier of equal ones.

        A trial that failed after its evaluations does not count: nobody could run it.
        """
        scored = [
            (record.best, record)
            for record in self.of_kind("search")
            if record.best is not None and record.state != "failed"
        ]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    def _apply(self, event: dict[str, Any], search_digest: str) -> None:
        kind, name = event.get("event"), event.get("trial", "")
        if kind == "search" and event["digest"] != search_digest:
            raise UsageError(
                f"{self._path} is of another search: its space, sampler, metric or configuration "
                "differ; go on with those, or choose another run.name"
            )
        if kind == "begin" and name not in self.trials:
            self.trials[name] = TrialRecord(
                name, event["kind"], event["chosen"], event["overrides"]
            )
        if kind == "report":
            numbers = {k: v for k, v in event.items() if k not in ("event", "trial", "time")}
            self.trials[name].reports.append(numbers)
        if kind == "end":
            record = self.trials[name]
            record.state, record.reason = event["state"], event["reason"]
            record.test = event["test"]

    def _write(self, event: dict[str, Any]) -> None:
        line = (json.dumps(event | {"time": time.time()}) + "\n").encode()
        descriptor = open_to_append(self._path)
        try:
            if os.write(descriptor, line) < len(line):
                raise RunError(f"{self._path}: the disk is full; free space and start again")
            os.fsync(descriptor)
        except OSError as error:
            raise RunError(f"{self._path}: {error.strerror}; free space and start again") from None
        finally:
            os.close(descriptor)
