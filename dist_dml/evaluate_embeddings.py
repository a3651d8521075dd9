"""`dist-dml evaluate --embeddings Q.parquet [--gallery G.parquet]`: scores of anybody's embeddings.

    dist-dml evaluate --embeddings embeddings/test
    dist-dml evaluate --embeddings queries.parquet --gallery gallery.parquet --distance l2 --json
    dist-dml evaluate --embeddings fold-0 --embeddings fold-1 --embeddings fold-2

Under torchrun, deepspeed or srun each worker holds and searches its share of the gallery. Files and
folders as docs/embeddings.md has them, scores as docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_dml.config_loading import Resolved
from dist_dml.entry import run_worker
from dist_dml.errors import UsageError
from dist_dml.file_scores import as_json, as_text, grouped
from dist_dml.measurement import search_settings
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World, environment_ranks, limit_threads
from dist_dml.retrieval.distances import Distance, named_distance
from dist_dml.retrieval.embedding_columns import ColumnNames
from dist_dml.retrieval.embedding_files import EmbeddingTable, metadata_names, read_pair
from dist_dml.retrieval.embedding_raw import WHOLE, Share
from dist_dml.retrieval.full_scores import (
    DistanceScores,
    ScoreOptions,
    score_everything,
    scores_of_queries,
)
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.sharded_gallery import score_sharded
from dist_dml.retrieval.sharded_hits import complete_sharded_hits

DISTANCES = ("cosine", "l2")
"""Others compare class probabilities, which embeddings alone do not give."""
_OWN_GROUPS = ("label", "class_size")


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


@dataclass(frozen=True)
class _Request:
    """What the arguments ask for, checked."""

    distances: list[Distance]
    options: ScoreOptions
    columns: ColumnNames
    group_by: str | None

    @property
    def needs_whole(self) -> bool:
        """Whether something is measured that one worker computes from all embeddings."""
        return self.options.nmi or self.options.verification


def evaluate_files(arguments: argparse.Namespace) -> int:
    """Score, and print tables or one JSON object. Returns the exit code."""
    request = _request(arguments)
    if environment_ranks().size > 1:
        return run_worker(_evaluate_together, arguments, ["engine.device=cpu"])
    limit_threads()
    queries, gallery = _read(arguments, request, WHOLE)
    searched = gallery.embeddings if gallery else None
    found = {
        distance.name: score_everything(queries.embeddings, searched, distance, request.options)
        for distance in request.distances
    }
    _print(arguments, request, queries, gallery, found)
    return 0


def _evaluate_together(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    """The same by all workers: each holds and searches its share of the gallery.

    What the first worker measures alone (NMI, verification) needs all embeddings: it reads them if
    that is asked for.
    """
    request = _request(arguments)
    share = world.rank, world.size
    held = WHOLE if world.is_first and request.needs_whole else share
    queries, gallery = _read(arguments, request, held)
    own = queries.share(*share)
    searched = gallery.share(*share) if gallery else None
    settings = search_settings(resolved.config, world)
    recall_at, group = request.options.recall_at, world.group
    found = {}
    for distance in request.distances:
        scores = score_sharded(own, searched, distance, recall_at, group, settings)
        scores = complete_sharded_hits(scores, own, searched, distance, group, settings.device)
        every = QueryScores.concatenate(gather_objects(scores, group))
        if world.is_first:
            whole = gallery.embeddings if gallery else None
            found[distance.name] = scores_of_queries(
                every, queries.embeddings, whole, distance, request.options
            )
    if world.is_first:
        _print(arguments, request, queries, gallery, found)


def _request(arguments: argparse.Namespace) -> _Request:
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
    distances, options = _distances(arguments.distance or ["cosine"]), _options(arguments)
    if arguments.group_by:
        _check_group_column(arguments.embeddings[0], columns, arguments.group_by)
    return _Request(distances, options, columns, arguments.group_by)


def _read(
    arguments: argparse.Namespace, request: _Request, share: Share
) -> tuple[EmbeddingTable, EmbeddingTable | None]:
    metadata = [request.group_by] if request.group_by else []
    return read_pair(arguments.embeddings, arguments.gallery, request.columns, metadata, share)


def _print(
    arguments: argparse.Namespace,
    request: _Request,
    queries: EmbeddingTable,
    gallery: EmbeddingTable | None,
    found: Mapping[str, DistanceScores],
) -> None:
    if gallery is not None:
        _note_other_networks(queries, gallery)
    by = request.group_by
    groups = {
        name: grouped(scores, queries, gallery, by) if by else [] for name, scores in found.items()
    }
    tables = {"queries": queries, "gallery": gallery}
    if arguments.json:
        print(json.dumps(as_json(tables, found, groups), allow_nan=False), flush=True)
    else:
        print(as_text(tables, found, groups), flush=True)


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
