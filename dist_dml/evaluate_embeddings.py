"""`dist-dml evaluate --embeddings Q.parquet [--gallery G.parquet]`: scores of anybody's embeddings.

    dist-dml evaluate --embeddings embeddings/test
    dist-dml evaluate --embeddings queries.parquet --gallery gallery.parquet --distance l2 --json
    dist-dml evaluate --embeddings fold-0 --embeddings fold-1 --embeddings fold-2

One process. Files and folders as docs/embeddings.md has them, scores as docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dist_dml.errors import UsageError
from dist_dml.parallel.world import environment_ranks, limit_threads
from dist_dml.retrieval.distances import Distance, named_distance
from dist_dml.retrieval.embedding_columns import ColumnNames
from dist_dml.retrieval.embedding_files import EmbeddingTable, metadata_names, read_pair
from dist_dml.retrieval.full_scores import DistanceScores, ScoreOptions, score_everything
from dist_dml.retrieval.groups import (
    GroupScores,
    class_sizes,
    scores_by_class,
    scores_by_class_size,
    scores_by_group,
)
from dist_dml.retrieval.report import aligned_table

DISTANCES = ("cosine", "l2")
"""Others compare class probabilities, which embeddings alone do not give."""
_OWN_GROUPS = ("label", "class_size")
_GROUPS_SHOWN = 30


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--embeddings`. What is not given is None: `check_file_arguments` asks."""
    files = parser.add_argument_group("embeddings of files, instead of a run")
    files.add_argument(
        "--embeddings",
        metavar="Q",
        action="append",
        help="Parquet file or folder of the queries; again for each other model, side by side",
    )
    files.add_argument(
        "--gallery", metavar="G", action="append", help="what is searched; without, the queries"
    )
    files.add_argument(
        "--distance", action="append", metavar="NAME", help="cosine (default) or l2; or both"
    )
    files.add_argument("--recall-at", nargs="+", type=int, metavar="K", help="default: 1 2 4 8")
    files.add_argument(
        "--group-by",
        metavar="COLUMN",
        help="also scores by a column of the queries, by `label`, or by `class_size`",
    )
    files.add_argument("--seed", type=int, metavar="N", help="of clusters and resamples: 0")
    files.add_argument("--resamples", type=int, metavar="N", help="of the intervals: 1000; 0: none")
    files.add_argument("--no-nmi", action="store_true", default=None, help="no clustering")
    files.add_argument("--no-verification", action="store_true", default=None, help="no pairs")
    for name in ("embedding", "label", "id"):
        files.add_argument(f"--{name}-column", metavar="NAME", help=f"default: {name}")


_OWN = (
    *("gallery", "distance", "recall_at", "group_by", "seed", "resamples", "no_nmi"),
    *("no_verification", "embedding_column", "label_column", "id_column"),
)


def check_file_arguments(arguments: argparse.Namespace) -> bool:
    """Whether files are to be evaluated, and not a run.

    Raises:
        UsageError: neither or both are given, or options of the one with the other.
    """
    if arguments.embeddings is None:
        for name in _OWN:
            if getattr(arguments, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} goes with --embeddings FILE; of a run the section "
                    "`evaluation` of its configuration decides: give evaluation.KEY=VALUE"
                )
        if arguments.run is None:
            raise UsageError("give a RUN folder, for example runs/demo, or --embeddings FILE")
        return False
    if arguments.run is not None or arguments.overrides or arguments.config:
        given = arguments.run or (*arguments.overrides, *arguments.config)[0]
        raise UsageError(
            f"--embeddings and {given!r:.80}: give files of embeddings or a run with its "
            "configuration, not both"
        )
    if arguments.baselines or arguments.checkpoint != "best":
        raise UsageError("--baselines and --checkpoint are of a run; leave out --embeddings")
    return True


def evaluate_files(arguments: argparse.Namespace) -> int:
    """Score, and print tables or one JSON object. Returns the exit code."""
    if environment_ranks().size > 1:
        raise UsageError("--embeddings is evaluated by one process; start it without a launcher")
    limit_threads()
    distances = _distances(arguments.distance or ["cosine"])
    options = _options(arguments)
    group_by = arguments.group_by
    columns = ColumnNames(
        embedding=arguments.embedding_column or "embedding",
        label=arguments.label_column or "label",
        id=arguments.id_column,
    )
    folds = len(arguments.embeddings), len(arguments.gallery or arguments.embeddings)
    if folds[0] != folds[1]:
        raise UsageError(
            f"--embeddings is given {folds[0]} times and --gallery {folds[1]}; give one of each "
            "model, in the same order"
        )
    if group_by:
        _check_group_column(arguments.embeddings[0], columns, group_by)
    queries, gallery = read_pair(
        arguments.embeddings, arguments.gallery, columns, [group_by] if group_by else []
    )
    if gallery is not None:
        _note_other_networks(queries, gallery)
    searched = gallery.embeddings if gallery else None
    found = {
        distance.name: score_everything(queries.embeddings, searched, distance, options)
        for distance in distances
    }
    groups = {
        name: _groups(scores, queries, gallery, group_by) if group_by else []
        for name, scores in found.items()
    }
    tables = {"queries": queries, "gallery": gallery}
    if arguments.json:
        print(json.dumps(as_json(tables, found, groups), allow_nan=False))
    else:
        print(as_text(tables, found, groups))
    return 0


def _note_other_networks(queries: EmbeddingTable, gallery: EmbeddingTable) -> None:
    made = [table.facts.get("checkpoint_digest") for table in (queries, gallery)]
    if all(made) and made[0] != made[1]:
        print(
            "note: queries and gallery were embedded by different checkpoints; two networks seldom "
            "share a space",
            file=sys.stderr,
        )


def _distances(names: Sequence[str]) -> list[Distance]:
    for name in names:
        if name not in DISTANCES:
            raise UsageError(
                f"--distance {name!r:.80}: embeddings of files are compared by "
                f"{' or '.join(DISTANCES)}; distances of class probabilities need a run"
            )
    return [named_distance(name) for name in dict.fromkeys(names)]


def _options(arguments: argparse.Namespace) -> ScoreOptions:
    return ScoreOptions(
        recall_at=tuple(dict.fromkeys(arguments.recall_at or ScoreOptions.recall_at)),
        nmi=not arguments.no_nmi,
        seed=arguments.seed or 0,
        resamples=ScoreOptions.resamples if arguments.resamples is None else arguments.resamples,
        verification=not arguments.no_verification,
    )


def _check_group_column(path: str, columns: ColumnNames, group_by: str) -> None:
    if group_by in _OWN_GROUPS:
        return
    known = metadata_names(path, columns)
    if group_by not in known:
        there = ", ".join(repr(name)[:80] for name in (*_OWN_GROUPS, *known))
        raise UsageError(f"--group-by {group_by!r:.80}: {path} has {there}; name one of these")


def _groups(
    scores: DistanceScores, queries: EmbeddingTable, gallery: EmbeddingTable | None, group_by: str
) -> list[GroupScores]:
    if group_by == "label":
        return scores_by_class(scores.queries, [str(name) for name in queries.label_values])
    if group_by == "class_size":
        sizes = class_sizes(queries.embeddings, gallery.embeddings if gallery else None)
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
            "classes": len(np.unique(table.embeddings.labels)),
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
    classes = len(np.unique(queries.embeddings.labels))
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
