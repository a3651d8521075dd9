"""What was measured of files of embeddings: as one object of JSON, and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dist_dml.retrieval.embedding_files import EmbeddingTable
from dist_dml.retrieval.full_scores import DistanceScores
from dist_dml.retrieval.groups import (
    GroupScores,
    class_sizes,
    scores_by_class,
    scores_by_class_size,
    scores_by_group,
)
from dist_dml.retrieval.report import aligned_table

_GROUPS_SHOWN = 30


def grouped(
    scores: DistanceScores, queries: EmbeddingTable, gallery: EmbeddingTable | None, group_by: str
) -> list[GroupScores]:
    """The scores of each group of queries.

    Args:
        scores: of the queries, by one distance.
        queries: what was searched for.
        gallery: what was searched, if not the queries.
        group_by: `label`, `class_size`, or a column of the queries' metadata.
    """
    if group_by == "label":
        return scores_by_class(scores.queries, [str(name) for name in queries.label_values])
    if group_by == "class_size":
        sizes = class_sizes(queries.labels, gallery.labels if gallery else None)
        return scores_by_class_size(scores.queries, sizes)
    return scores_by_group(scores.queries, queries.metadata[group_by])


def as_json(
    tables: Mapping[str, EmbeddingTable | None],
    found: Mapping[str, DistanceScores],
    groups: Mapping[str, list[GroupScores]],
) -> dict[str, Any]:
    """All that was measured, as one object of JSON.

    Args:
        tables: what was read, by `queries` and `gallery`.
        found: by the name of the distance.
        groups: likewise; empty lists without groups.
    """
    content: dict[str, Any] = {
        name: None
        if table is None
        else {
            "samples": len(table),
            "width": table.width,
            "classes": len(np.unique(table.labels)),
            "made_by": table.facts,
        }
        for name, table in tables.items()
    }
    content["distances"] = {
        name: {
            "scores": one.scores,
            "intervals": one.intervals,
            **({"groups": [asdict(group) for group in groups[name]]} if groups[name] else {}),
        }
        for name, one in found.items()
    }
    return content


def as_text(
    tables: Mapping[str, EmbeddingTable | None],
    found: Mapping[str, DistanceScores],
    groups: Mapping[str, list[GroupScores]],
) -> str:
    """The same as tables for people; of many groups, those with the most queries."""
    queries, gallery = tables["queries"], tables["gallery"]
    assert queries is not None
    among = "each without itself" if gallery is None else f"a gallery of {len(gallery):,}"
    classes = len(np.unique(queries.labels))
    texts = []
    for name, one in found.items():
        title = f"{name}: {len(queries):,} queries of {classes:,} classes, {among}"
        rows = [["", "score", "95% interval over classes"]]
        for key, value in one.scores.items():
            low_high = one.intervals.get(key)
            interval = "{:.4f} .. {:.4f}".format(*low_high) if low_high else ""
            rows.append(
                [key, f"{value:,.0f}" if key.startswith("num_") else f"{value:.4f}", interval]
            )
        texts.append(f"{title}\n{aligned_table(rows)}")
        if groups[name]:
            texts.append(_group_table(groups[name]))
    return "\n\n".join(texts)


def _group_table(groups: Sequence[GroupScores]) -> str:
    """At most 30 groups, in their order."""
    order = sorted(range(len(groups)), key=lambda i: -groups[i].num_queries)
    kept = [groups[i] for i in sorted(order[:_GROUPS_SHOWN])]
    names = ("precision_at_1", "r_precision", "map_at_r")
    rows = [["group", "queries", "without match", "classes", *names]]
    for group in kept:
        scores = [f"{group.scores[key]:.4f}" if key in group.scores else "-" for key in names]
        # Texts of a file that others wrote, on a terminal.
        name = "".join(c if c.isprintable() else "?" for c in group.name)[:60]
        counts = (group.num_queries, group.num_queries_without_match, group.num_classes)
        rows.append([name, *(f"{count:,}" for count in counts), *scores])
    more = len(groups) - len(kept)
    return aligned_table(rows) + (f"\nand {more:,} smaller groups: see --json" if more else "")
