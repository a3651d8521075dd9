"""Between Ray Tune and the study: which trial is next, and what became of each.

Ray Tune keeps the trials running and asks here; everything that must outlive it is in the ledger.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import PlacementGroupID, cloudpickle
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

from dist_dml.tracking.live import format_duration
from dist_dml.tuning.ledger import Kind, Ledger, State, TrialRecord
from dist_dml.tuning.sampler import Sampler
from dist_dml.tuning.space import BudgetConfig, overrides_of
from dist_dml.tuning.trial import GROUP, reason_of

_REPORTED = ("value", "share", "step", "images_seen", "seconds", "test")


class TrialSource(Searcher):
    """Gives Ray Tune the trials that are left: those interrupted, then new proposals.

    Args:
        ledger: of the study.
        sampler: proposes; None for the given trials alone.
        waiting: trials with known settings, begun before or not.
        budget: of the search.
    """

    def __init__(
        self,
        ledger: Ledger,
        sampler: Sampler | None,
        waiting: Sequence[TrialRecord],
        budget: BudgetConfig,
    ) -> None:
        super().__init__(metric="value", mode="max")
        self._ledger, self._sampler, self._budget = ledger, sampler, budget
        self._waiting = deque(waiting)
        self._ends_at = time.monotonic() + 3600 * budget.hours if budget.hours else math.inf

    @property
    def remaining(self) -> int:
        """Trials that may still be begun here."""
        new = self._budget.trials - len(self._ledger.of_kind("search")) if self._sampler else 0
        return len(self._waiting) + max(0, new)

    def suggest(self, trial_id: str) -> Any:
        """The next trial as Ray's config, written down before it runs; FINISHED if none is left."""
        if self._waiting:
            record = self._waiting.popleft()
            if self._sampler is not None:
                number = list(self._ledger.trials).index(record.name)
                self._sampler.resume(record.name, number, record.chosen)
        elif self._sampler is None or not self.remaining or time.monotonic() > self._ends_at:
            return Searcher.FINISHED
        else:
            number = len(self._ledger.of_kind("search"))
            name = f"trial-{number:03d}"
            record = TrialRecord(name, "search", self._sampler.propose(name, number))
        if record.name not in self._ledger.trials:
            self._ledger.begin(record)
        overrides = [*overrides_of(record.chosen), *record.overrides]
        return {"trial": record.name, "kind": record.kind, "overrides": overrides}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: `Bookkeeper` is told more."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing that is needed: the ledger has it. Ray wants a file."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search is continued from its ledger."""


class Bookkeeper(Callback):
    """Writes down what Ray Tune sees, tells the sampler, and says it to the person who waits.

    Args:
        ledger: of the study.
        sampler: None where trials are not proposed.
        total: trials in the end, for the progress.
        ended: is called with each trial that has ended.
    """

    def __init__(
        self,
        ledger: Ledger,
        sampler: Sampler | None,
        total: int,
        ended: Callable[[TrialRecord], None],
    ) -> None:
        self._ledger, self._sampler, self._total, self._ended = ledger, sampler, total, ended
        self._started = time.monotonic()
        self._before = sum(record.state != "running" for record in ledger.trials.values())
        self._groups: dict[str, str] = {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """One begins."""
        name = trial.config["trial"]
        words = " ".join(overrides_of(self._ledger.trials[name].chosen)) or "as configured"
        _say(f"{name} begins: {words}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """One was evaluated."""
        if "value" in result:
            name = trial.config["trial"]
            self._ledger.report(name, {k: result[k] for k in _REPORTED if k in result})
            _say(f"{name} at {100 * result['share']:.0f}%: {result['value']:.4f}")
        if GROUP in result:
            self._groups[trial.config["trial"]] = result[GROUP]

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """One has ended, by itself or because it fell behind."""
        record = self._ledger.trials[trial.config["trial"]]
        if not record.reports:
            self._end(record, "failed", "it ended without an evaluation")
            return
        whole = record.reports[-1]["share"] >= 1
        self._end(record, "complete" if whole else "stopped", "")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """One has failed; the others go on."""
        record = self._ledger.trials[trial.config["trial"]]
        self._end(record, "failed", _reason(trial))

    def _end(self, record: TrialRecord, state: State, reason: str) -> None:
        test = None
        if record.kind != "search" and record.reports:
            # At the checkpoint that the search's metric chooses.
            test = max(record.reports, key=lambda report: report["value"]).get("test")
        self._ledger.end(record.name, state, reason, test)
        if self._sampler is not None and record.kind == "search":
            self._sampler.tell(record)
        # Ray's own cleaner asks the dashboard's server, and gives up where that is slow: the next
        # trial would wait for ever for what nobody uses.
        release(self._groups.pop(record.name, ""))
        self._ended(record)
        _say(self._line(record))

    def _line(self, record: TrialRecord) -> str:
        ends = {"complete": "done", "stopped": "stopped early", "failed": "failed"}
        text = f"{record.name} {ends[record.state]}"
        if record.state == "failed":
            text += f": {record.reason}"
        elif record.best is not None:
            text += f": {record.best:.4f}"
        every = self._ledger.trials.values()
        done = sum(one.state != "running" for one in every)
        # What runs beside it is partly done as well.
        shares = [
            one.reports[-1]["share"] for one in every if one.state == "running" and one.reports
        ]
        left = max(0.0, self._total - done - sum(shares))
        each = (time.monotonic() - self._started) / max(1.0, done + sum(shares) - self._before)
        text += f"   [{done}/{self._total} trials"
        best = self._ledger.best()
        if best is not None:
            text += f", best {best.best:.4f} ({best.name})"
        return text + (f", about {format_duration(left * each)} left]" if left else "]")


def release(group: str) -> None:
    """End the workers of a trial that was stopped or has died, and free what they held.

    Args:
        group: id of the placement group, in hexadecimal; one that is gone and "" are fine.
    """
    if group:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _reason(trial: Trial) -> str:
    """Why a trial failed: of the file that Ray's driver has just written on this machine."""
    path = trial.pickled_error_file
    if path and Path(path).is_file():
        return reason_of(cloudpickle.loads(Path(path).read_bytes()))
    return "its process is gone without a word: killed, out of memory, or its machine failed"


def _say(text: str) -> None:
    print(f"tune: {text}", file=sys.stderr, flush=True)


def confirmation(kinds: Sequence[Kind], ledger: Ledger, seeds: Sequence[int]) -> list[TrialRecord]:
    """The trainings of the best and the unchanged configuration that have not ended.

    Seed by seed, so that an interruption leaves whole pairs.

    Args:
        kinds: which.
        ledger: knows the best trial.
        seeds: `run.seed` of each.
    """
    best = ledger.best()
    records = []
    for seed in seeds:
        for kind in kinds:
            name = f"confirm/{kind}-seed-{seed}"
            chosen = dict(best.chosen) if kind == "best" and best is not None else {}
            known = ledger.trials.get(name)
            if known is None:
                records.append(TrialRecord(name, kind, chosen, [f"run.seed={seed}"]))
            elif known.state == "running":
                records.append(known)
    return records
