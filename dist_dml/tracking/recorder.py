"""Writing and reading the figures of a run: `metrics.jsonl`, its source of truth.

Recording costs some microseconds and depends on nothing but the local file system. Whatever shows
the figures elsewhere (MLflow, plots, comparisons) reads the file.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dist_dml.errors import RunError
from dist_dml.tracking import run_files
from dist_dml.tracking.waiting_lines import LineFile

# A disk that is full now and then is not reported more often.
_TELL_SECONDS = 60.0


def encode_value(value: float) -> float | str:
    """`value` for JSON, whose standard has no nan or infinity: these become "nan", "inf", "-inf".

    `float` reads them back.
    """
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Recorder:
    """Appends to `metrics.jsonl` and `artifacts.jsonl`. A full disk loses and stops nothing.

    What the disk refuses waits in memory and is tried again with every record and at the end.
    """

    def __init__(self, folder: Path, metrics_file: str = run_files.METRICS) -> None:
        """Open the file in `folder`, which must exist, behind what it already holds.

        Raises:
            RunError: if the file cannot be opened for writing.
        """
        self.folder = folder
        self._metrics = LineFile(folder / metrics_file)
        self._events = LineFile(folder / run_files.EVENTS)
        self._waits = False
        # When it was last said that records wait; whether their end is to be told; whether a loss
        # has been.
        self._told_at = -math.inf
        self._owes_word = False
        self._told_of_loss = False
        try:
            self._metrics.open()
        except OSError as error:
            raise RunError(
                f"cannot write {self._metrics.path}: {error.strerror}; free the disk, or choose "
                "another folder with run.root"
            ) from None

    @property
    def lost(self) -> int:
        """Records (one name at one step, or one event) that will never be in the files."""
        return self._metrics.lost + self._events.lost

    def record(self, step: int, images_seen: int, seconds: float, values: dict[str, float]) -> None:
        """Write `values` (by name) of a step, in one call of `write` on whole lines.

        Waits for no disk: the lines are with the operating system, which keeps them when this
        process is killed. Costs 10 microseconds for four values in a loop, 170 for ten after half a
        second of other work (2 CPU cores, November 2026). Never raises OSError.

        Args:
            step: optimizer steps done.
            images_seen: training images up to this step, over all workers.
            seconds: training time up to this step; a resumed run goes on counting.
            values: numbers on the host. A tensor on a device would make the step wait for it.
        """
        head = f'{{"step": {int(step)}, "images_seen": {int(images_seen)}, '
        head += f'"seconds": {float(seconds):.3f}, "name": '
        lines = [
            f'{head}{json.dumps(name)}, "value": {json.dumps(encode_value(value))}}}\n'
            for name, value in values.items()
        ]
        if not self._metrics.append("".join(lines).encode()) or self._waits:
            self._settle()

    def note_artifact(self, path: Path, folder: str = "") -> None:
        """Have the file `path` mirrored, into `folder` of the run's artifacts in MLflow.

        The file stays where it is and may be noted again when it has changed.
        """
        relative = os.path.relpath(path.absolute(), self.folder.absolute())
        self._note({"path": relative, "folder": folder})

    def note_figure(self, path: Path) -> None:
        """Have the picture `path` mirrored, beside the report."""
        self.note_artifact(path, "report")

    def note_end(self, status: str) -> None:
        """Write down how the run ended: FINISHED, FAILED or KILLED. The mirror then ends too."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        self._note({"status": status, "time": time.time()})

    def close(self) -> None:
        """Write what still waits, say how many records are lost for good, and close the files."""
        self._metrics.close()
        self._events.close()
        if self.lost:
            self._say(f"warning: {self.lost} records of {self.folder} are lost ({self._reason})")
        elif self._waits:
            self._tell(waits=False)
        self._waits = False

    def _note(self, event: dict[str, str | float]) -> None:
        # Events after records: the mirror takes the last event for the end of all records.
        add = self._events.append if self._metrics.retry() else self._events.keep
        add((json.dumps(event) + "\n").encode())
        self._settle()

    def _settle(self) -> None:
        """Try what waits, and say so where that begins or ends."""
        waits = not (self._metrics.retry() and self._events.retry())
        if waits != self._waits:
            self._tell(waits)
        if self.lost and not self._told_of_loss:
            self._told_of_loss = True
            self._say(
                f"warning: as many records of {self.folder} wait as memory is set aside for; "
                "further ones are lost until the disk takes them"
            )
        self._waits = waits

    def _tell(self, waits: bool) -> None:
        """One line when records begin to wait and one when they are written, once a minute."""
        now = time.monotonic()
        if waits and now > self._told_at + _TELL_SECONDS:
            self._told_at, self._owes_word = now, True
            self._say(
                f"warning: records of {self.folder} wait in memory ({self._reason}); training goes "
                "on, and they are written as soon as the disk takes them"
            )
        elif not waits and self._owes_word:
            self._owes_word = False
            lost = f"; {self.lost} others are lost" if self.lost else ", none is lost"
            self._say(f"the records of {self.folder} that waited are written{lost}")

    @property
    def _reason(self) -> str:
        return self._metrics.reason or self._events.reason

    def _say(self, text: str) -> None:
        print(f"dist_dml: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Curve:
    """One figure over a run, by ascending step, each step once.

    Dimensions:
        n: steps at which it was recorded.
    """

    step: Int[np.ndarray, " n"]
    images_seen: Int[np.ndarray, " n"]
    seconds: Float[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


def read_metrics(folder: Path, metrics_file: str = run_files.METRICS) -> dict[str, Curve]:
    """All figures of the run in `folder`, by name. Empty for a run without records.

    A run that was killed and resumed has written some steps twice: the last one counts, as it is
    the one that the final weights descend from. A torn line is left out.
    """
    records: dict[str, dict[int, tuple[int, float, float]]] = {}
    offset = -1
    following = 0
    while following != offset:
        offset = following
        lines, following = run_files.complete_lines(folder / metrics_file, offset)
        for line in lines:
            records.setdefault(line["name"], {})[line["step"]] = (
                line["images_seen"],
                line["seconds"],
                float(line["value"]),
            )
    curves = {}
    for name, by_step in records.items():
        steps = sorted(by_step)
        images_seen, seconds, values = zip(*(by_step[step] for step in steps), strict=True)
        curves[name] = Curve(
            step=np.array(steps, np.int64),
            images_seen=np.array(images_seen, np.int64),
            seconds=np.array(seconds, np.float64),
            value=np.array(values, np.float64),
        )
    return curves
