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


def encode_value(value: float) -> float | str:
    """`value` for JSON, whose standard has no nan or infinity: these become "nan", "inf", "-inf".

    `float` reads them back.
    """
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Recorder:
    """Appends to `metrics.jsonl` and `artifacts.jsonl`. A full disk loses records, never the run.

    Attributes:
        lost: records (one name at one step, or one event) that could not be written.
    """

    def __init__(self, folder: Path, metrics_file: str = run_files.METRICS) -> None:
        """Open the file in `folder`, which must exist, behind what it already holds.

        Raises:
            RunError: if the file cannot be opened for writing.
        """
        self.folder = folder
        self.lost = 0
        self._torn = False
        path = folder / metrics_file
        try:
            self._descriptor = run_files.open_to_append(path)
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror}; free the disk, or choose another folder "
                "with run.root"
            ) from None

    def record(self, step: int, images_seen: int, seconds: float, values: dict[str, float]) -> None:
        """Write `values` (by name) of a step, in one call of `write` on whole lines.

        Waits for no disk: the lines are with the operating system, which keeps them when this
        process is killed. Costs 10 microseconds for four values in a loop, 170 for ten after half a
        second of other work (2 CPU cores, November 2026). Never raises OSError, see `lost`.

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
        # A torn line ends here, so that it spoils itself alone.
        block = ("\n" if self._torn else "") + "".join(lines)
        content = block.encode()
        try:
            written = os.write(self._descriptor, content)
        except OSError as error:
            self._lose(len(lines), error.strerror or "write failed")
            return
        self._torn = written < len(content)
        if self._torn:
            self._lose(len(lines) - content[:written].count(b"}\n"), "the disk is full")

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
        """Close the file. Nothing is buffered, so nothing is flushed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _note(self, event: dict[str, str | float]) -> None:
        try:
            run_files.append_event(self.folder, event)
        except OSError as error:
            self._lose(1, error.strerror or "write failed")

    def _lose(self, count: int, reason: str) -> None:
        if self.lost == 0:
            print(
                f"dist_dml: records of {self.folder} are being lost ({reason}); training goes on",
                file=sys.stderr,
                flush=True,
            )
        self.lost += count


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
