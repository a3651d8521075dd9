"""The two ways in which a run ends early on purpose. Both print one line and no traceback."""

from __future__ import annotations

import sys


class UsageError(ValueError):
    """What the user gave cannot work: got, expected, which key, what to do. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on, through no fault in its configuration. Exit code 1."""


def print_failure(reason: str) -> None:
    """The one line that a failed command ends with, without secrets."""
    from dist_dml.credentials import redact  # It refuses with the errors above.

    print(f"dist_dml: error: {' '.join(redact(reason).split())}", file=sys.stderr, flush=True)
