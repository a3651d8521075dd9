"""A file of lines on a disk that may fill up: what it does not take waits in memory, in order."""

from __future__ import annotations

import os
from pathlib import Path

from dist_dml.tracking import run_files

MOST_WAITING_BYTES = 64 * 2**20
"""What waits at most: half a million records. A run that writes more has its later ones lost."""
_PIECE = 2**16


class LineFile:
    """Appends whole lines to a file and never raises OSError.

    What the disk refuses is kept, and tried again before anything else is written: lines keep their
    order, none comes twice, and a line of which a part was taken is continued where it was torn.

    Attributes:
        path: the file.
        lost: lines that are given up: beyond the bound, or still waiting when it was closed.
        reason: why the disk refused something the last time; empty if it never did.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_WAITING_BYTES) -> None:
        """Touch nothing yet; the file is opened with the first line, or by `open`.

        Args:
            path: the file, which is made if it is absent.
            most_bytes: what waits at most.
        """
        self.path = path
        self.lost = 0
        self.reason = ""
        self._most_bytes = most_bytes
        self._descriptor = -1
        self._waiting = bytearray()
        # Bytes of the first waiting line that are in the file already, and where they end.
        self._begun = 0
        self._end = 0

    @property
    def waits(self) -> bool:
        """Whether lines wait in memory."""
        return bool(self._waiting)

    def open(self) -> None:
        """Open the file behind what it holds, ending a line that a killed writer left torn.

        Raises:
            OSError: if it cannot be opened, or that line not be ended.
        """
        self._descriptor = run_files.open_to_append(self.path)

    def append(self, block: bytes) -> bool:
        """Write whole lines, in one call of `write`. Returns whether all lines are in the file."""
        if self._waiting and not self.retry():
            self.keep(block)
            return False
        if self._descriptor < 0:
            self.keep(block)
            return self.retry()
        try:
            written = os.write(self._descriptor, block)
        except OSError as error:
            self._refused(error)
            written = 0
        if written == len(block):
            return True
        self.reason = self.reason or "the disk took a part only"
        self.keep(block)
        self._took(written)
        return False

    def keep(self, block: bytes) -> None:
        """Have whole lines wait without an attempt to write them."""
        if self._waiting and len(self._waiting) + len(block) > self._most_bytes:
            self.lost += block.count(b"\n")
        else:
            self._waiting += block

    def retry(self) -> bool:
        """Write what waits, as far as the disk takes it. Returns whether nothing waits any more.

        An attempt that fails costs microseconds, however much waits.
        """
        try:
            while self._waiting:
                if self._descriptor < 0:
                    self.open()
                self._mend()
                piece = self._waiting[self._begun : self._begun + _PIECE]
                written = os.write(self._descriptor, piece)
                self._took(written)
                if written < len(piece):
                    break
        except OSError as error:
            self._refused(error)
        return not self._waiting

    def close(self) -> None:
        """Try for the last time, count what still waits as lost, and close the file."""
        self.retry()
        self.lost += self._waiting.count(b"\n")
        self._waiting.clear()
        self._begun = 0
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if descriptor >= 0:
                os.close(descriptor)
        except OSError as error:  # Network file systems say here what they could not write.
            self._refused(error)

    def _took(self, written: int) -> None:
        """Forget the lines that are whole in the file, now that it took further bytes."""
        reached = self._begun + written
        whole = self._waiting.rfind(b"\n", 0, reached) + 1
        del self._waiting[:whole]
        self._begun = reached - whole
        try:
            self._end = os.fstat(self._descriptor).st_size
        except OSError:
            self._end = -1  # Not known: a torn line will be written anew.

    def _mend(self) -> None:
        """See to it that the next byte continues the torn line, or begins a line.

        Another process that writes to the file (`run_files.append_event`) ends what it takes for
        the torn line of a dead one. Then the line is written anew, unless its end was all it
        lacked; what is left of the first attempt is no JSON and is left out by every reader.
        """
        if self._begun and os.fstat(self._descriptor).st_size != self._end:
            if self._waiting[self._begun : self._begun + 1] == b"\n":
                del self._waiting[: self._begun + 1]
            self._begun = 0
        if not self._begun:
            run_files.end_torn_line(self._descriptor)

    def _refused(self, error: OSError) -> None:
        self.reason = error.strerror or "write failed"
