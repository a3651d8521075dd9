"""The ways in which a run ends early on purpose. All print one line and no traceback."""

from __future__ import annotations

import contextlib
import sys


class UsageError(ValueError):
    """What the user gave cannot work: got, expected, which key, what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on, through no fault in its configuration. Exit code 1."""


class NotFiniteError(RunError):
    """A loss, a gradient or a weight is not finite after `step` steps; all workers see it together.

    Attributes:
        step: optimizer steps done, with the one in which it was found.
        finding: what was found, in words.
        facts: further numbers for the report, JSON-able.
    """

    def __init__(self, step: int, finding: str, facts: dict[str, object] | None = None) -> None:
        super().__init__(finding)
        self.step, self.finding, self.facts = step, finding, facts or {}


class Stopped(Exception):
    """The run was asked to stop, and what it had done is saved. Exit code 75: start it again.

    Attributes:
        together: whether all workers stop in this same place.
    """

    def __init__(self, text: str, together: bool = False) -> None:
        super().__init__(text)
        self.together = together


STOPPED_EXIT_CODE = 75
"""`EX_TEMPFAIL`: for a scheduler that starts again what ends with it."""


def print_failure(reason: str) -> None:
    """The one line that a failed command ends with, without secrets."""
    from dist_dml.credentials import redact  # It refuses with the errors above.

    _print_last(f"dist_dml: error: {' '.join(redact(reason).split())}")


def print_stopped(text: str) -> None:
    """The one line that a command ends with which was asked to stop."""
    _print_last(f"dist_dml: stopped: {' '.join(text.split())}")


def _print_last(line: str) -> None:
    """To stderr, behind what was printed before: a pipe or a file holds stdout back."""
    with contextlib.suppress(OSError, ValueError):  # Its reader is gone.
        sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
