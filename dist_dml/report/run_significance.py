"""Paired tests between runs, where they answered the same queries; else the reason why not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_dml.report.compared_runs import ComparedRun
from dist_dml.report.query_scores import SCORES
from dist_dml.report.significance import PairedTest, holm, paired_test

MOST_RUNS_IN_ALL_PAIRS = 4


@dataclass(frozen=True)
class Tested:
    """The second run against the first, by one score."""

    first: str
    second: str
    protocol: str
    distance: str
    score: str
    test: PairedTest
    p_of_all: float
    """Holm's, over all tests of the comparison."""


def pairs_to_test(runs: Sequence[ComparedRun]) -> list[tuple[ComparedRun, ComparedRun]]:
    """All pairs of up to four runs; of more, the first run against each other one."""
    if len(runs) <= MOST_RUNS_IN_ALL_PAIRS:
        return list(itertools.combinations(runs, 2))
    return [(runs[0], other) for other in runs[1:]]


def paired_tests(runs: Sequence[ComparedRun], seed: int = 0) -> tuple[list[Tested], list[str]]:
    """Every test that can be made, and for each pair that has none the reason.

    For each protocol that both were measured by, its first common distance and the scores
    `recall_at_1`, `r_precision` and `map_at_r`.
    """
    made: list[tuple[ComparedRun, ComparedRun, str, str, str, PairedTest]] = []
    reasons = []
    for first, second in pairs_to_test(runs):
        reason = _obstacle(first, second)
        common = [] if reason else _common(first, second)
        if not reason and not common:
            reason = "no protocol and distance in common with the same splits and the same images"
        if reason:
            reasons.append(f"{first.name} and {second.name}: {reason}")
            continue
        for protocol, distance in common:
            made += [
                (first, second, protocol, distance, score, test)
                for score, test in _tests(first, second, protocol, distance, seed)
            ]
    adjusted = holm([test.p for *_, test in made])
    return [
        Tested(first.name, second.name, protocol, distance, score, test, p)
        for (first, second, protocol, distance, score, test), p in zip(made, adjusted, strict=True)
    ], reasons


def _obstacle(first: ComparedRun, second: ComparedRun) -> str:
    for run in (first, second):
        if run.queries is None:
            return (
                f"{run.folder} has no scores of single queries; `dist-dml evaluate {run.folder}` "
                "writes them"
            )
    assert first.queries is not None
    assert second.queries is not None
    if first.queries.fingerprint != second.queries.fingerprint:
        return "they were evaluated on other data (the fingerprints differ)"
    return ""


def _common(first: ComparedRun, second: ComparedRun) -> list[tuple[str, str]]:
    """The first common distance of each protocol whose splits and queries are the same."""
    ours, theirs = first.queries, second.queries
    assert ours is not None
    assert theirs is not None
    found: dict[str, str] = {}
    for (protocol, distance), queries in ours.found.items():
        others = theirs.found.get((protocol, distance))
        if protocol in found or others is None:
            continue
        same_splits = ours.protocols.get(protocol) == theirs.protocols.get(protocol)
        if (
            same_splits
            and np.array_equal(queries.ids, others.ids)
            and np.array_equal(queries.labels, others.labels)
            and np.array_equal(queries.has_match, others.has_match)
            and queries.has_match.any()
        ):
            found[protocol] = distance
    return list(found.items())


def _tests(
    first: ComparedRun, second: ComparedRun, protocol: str, distance: str, seed: int
) -> list[tuple[str, PairedTest]]:
    assert first.queries is not None
    assert second.queries is not None
    ours, theirs = (run.found[protocol, distance] for run in (first.queries, second.queries))
    kept = ours.has_match
    return [
        (
            score,
            paired_test(
                ours.scores[score][kept], theirs.scores[score][kept], ours.labels[kept], seed
            ),
        )
        for score in SCORES
    ]
