"""The report as text, and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_dml.doctor.findings import LEVELS, Finding

_WIDTH = 100
_LEVEL_WIDTH, _NAME_WIDTH = 8, 18
_FEW_HOSTS = 3


@dataclass(frozen=True)
class Row:
    """Findings of several hosts that say the same, as one."""

    finding: Finding
    hosts: tuple[str, ...]


def rows(findings: Iterable[Finding]) -> list[Row]:
    """Findings that differ in the host or in what was measured alone, as one row each.

    In the order of their first appearance; sections stay together.
    """
    grouped: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.section, finding.name, finding.level, finding.remedy)
        grouped.setdefault(key, []).append(finding)
    made = [
        Row(same[0], tuple(dict.fromkeys(finding.host for finding in same if finding.host)))
        for same in grouped.values()
    ]
    sections = list(dict.fromkeys(row.finding.section for row in made))
    return sorted(made, key=lambda row: sections.index(row.finding.section))


def text_of(findings: Sequence[Finding], hosts: Sequence[str], workers: int, seconds: float) -> str:
    """The report: sections of lines, remedies below what they are for, and a summary.

    Args:
        findings: of all workers.
        hosts: the different ones.
        workers: number of them.
        seconds: that all took.
    """
    lines = [f"dist-dml doctor: {workers} worker{'s' * (workers > 1)} on {_few(hosts)}"]
    section = ""
    for row in rows(findings):
        if row.finding.section != section:
            section = row.finding.section
            lines += ["", section]
        lines += _lines(row, len(hosts))
    return "\n".join([*lines, "", summary(findings, seconds)])


def _lines(row: Row, num_hosts: int) -> list[str]:
    finding = row.finding
    head = f"  {finding.level:<{_LEVEL_WIDTH}} {finding.name:<{_NAME_WIDTH}} "
    margin = " " * (2 + _LEVEL_WIDTH + 1 + _NAME_WIDTH + 1)
    text = finding.measured
    if num_hosts > 1 and 0 < len(row.hosts) < num_hosts:
        text = f"[{_few(row.hosts)}] {text}"
    elif num_hosts > 1 and len(row.hosts) > 1:
        text += f" [{row.hosts[0]}; {len(row.hosts) - 1} more alike]"
    shown = _wrapped(text, head, margin)
    if finding.remedy:
        shown += _wrapped(finding.remedy, f"{margin}-> ", f"{margin}   ")
    return shown


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """How many of each level, worst first; the last line of the report."""
    count = counts(findings)
    plural = {"problem": "problems", "warning": "warnings", "note": "notes"}
    parts = [
        f"{number} {level if number == 1 else plural.get(level, level)}"
        for level, number in count.items()
        if number or level == "problem"
    ]
    return f"{', '.join(parts)}; {seconds:.1f} s"


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Rows of each level; a finding that many hosts share counts once."""
    levels = [row.finding.level for row in rows(findings)]
    return {level: levels.count(level) for level in LEVELS}


def object_of(
    findings: Sequence[Finding], hosts: Sequence[str], workers: int, seconds: float
) -> dict[str, Any]:
    """The report for JSON: every finding of every host, with its numbers."""
    return {
        "format": 1,
        "workers": workers,
        "hosts": list(hosts),
        "seconds": round(seconds, 3),
        "counts": counts(findings),
        "exit_code": int(any(finding.level == "problem" for finding in findings)),
        "findings": [
            {
                "section": finding.section,
                "name": finding.name,
                "level": finding.level,
                "measured": finding.measured,
                "remedy": finding.remedy,
                "host": finding.host,
                "values": dict(finding.values),
            }
            for finding in findings
        ],
    }


def _few(hosts: Sequence[str]) -> str:
    shown = ", ".join(hosts[:_FEW_HOSTS])
    return shown + (f" and {len(hosts) - _FEW_HOSTS} more" if len(hosts) > _FEW_HOSTS else "")
