"""The ledger of a benchmark: one row a point, on disk as soon as it is measured.

A point is known by its key, which follows from what was asked for. A later row of the same key
replaces an earlier one, so that a point may be measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_head_measure import Spread

from dist_dml.tracking.run_files import complete_lines, end_torn_line

LEDGER = "ledger.jsonl"


def key_of(kind: str, variant: str, config: Mapping[str, Any]) -> str:
    """What a point is known by: twelve digits of a hash of what was asked for."""
    content = json.dumps([kind, variant, config], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


class Ledger:
    """Rows by key, in the order in which they were first measured.

    Args:
        folder: made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LEDGER
        self.rows: dict[str, dict[str, Any]] = {}
        following, offset = 0, -1
        while following != offset:
            offset = following
            lines, following = complete_lines(self.path, offset)
            self.rows |= {line["key"]: line for line in lines if "key" in line}

    def has(self, key: str, retry: bool = False) -> bool:
        """Whether the point needs no measuring.

        Args:
            key: of the point.
            retry: one that failed counts as missing.
        """
        row = self.rows.get(key)
        return row is not None and not (retry and row["error"])

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, with the time; it is with the operating system when this returns."""
        row = row | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.rows[row["key"]] = row
        with self.path.open("a+b") as stream:
            end_torn_line(stream.fileno())
            stream.write((json.dumps(row) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())


def point(name: str, kind: str, variant: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A row without figures: what every row has, `error` to be filled where there is one."""
    return {
        "name": name,
        "kind": kind,
        "variant": variant,
        "key": key_of(kind, variant, config),
        "config": dict(config),
        "seconds_median": None,
        "seconds_spread": None,
        "extra_bytes": None,
        "error": None,
    }


def summary(times: list[float]) -> dict[str, Any]:
    """Median and the distance of the quartiles, as every benchmark names them."""
    spread = Spread.of(times)
    return {"seconds_median": spread.median, "seconds_spread": spread.high - spread.low}
