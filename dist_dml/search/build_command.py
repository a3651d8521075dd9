"""ENTRY: an index of a gallery: images of a run's data set, class weights, or any Parquet.

    dist-dml search build runs/demo indexes/demo
    dist-dml search build runs/demo indexes/classes --classes
    dist-dml search build embeddings/test indexes/test --checkpoint runs/demo --kind hnsw

The index is measured against exact neighbours before it is written, and says what it found. See
docs/search.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dist_dml.checkpoint_manifest import MANIFEST
from dist_dml.data.index import Index, load_index
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError
from dist_dml.parallel.world import limit_threads
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embedding_files import read_embeddings
from dist_dml.retrieval.embedding_manifest import file_digest
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.search_files import (
    Checkpoint,
    Images,
    SearchFacts,
    check_absent,
    relative_path,
    write_index,
)
from dist_dml.retrieval.search_index import (
    KINDS,
    IndexOptions,
    SearchIndex,
    build_index,
    fitted,
    measure,
)
from dist_dml.retrieval.search_threshold import (
    NEIGHBOURS,
    neighbour_threshold,
    verification_threshold,
)
from dist_dml.search.gallery import (
    Gallery,
    data_with_fingerprint,
    gallery_of_classes,
    gallery_of_exported,
    gallery_of_split,
    gallery_of_table,
    open_data,
)
from dist_dml.search.query_model import QueryModel, find_query_checkpoint, load_query_model

_THRESHOLDS = ("neighbours", "verification")
_NUMBERS = ("links", "build_effort", "search_effort", "lists", "probes", "code_parts", "seed")


def build(arguments: argparse.Namespace) -> SearchFacts:
    """Gather the gallery, build, measure, write. Returns what was written.

    Raises:
        UsageError: for a source, options or a folder that cannot be used.
    """
    out = Path(arguments.out)
    check_absent(out)
    if arguments.num_queries < 1:
        raise UsageError(f"--num-queries={arguments.num_queries}; measure with 1 query or more")
    distance = named_distance(arguments.distance)
    _given_threshold(arguments)
    options = IndexOptions(arguments.kind, **{name: getattr(arguments, name) for name in _NUMBERS})
    gallery, model = _gather(arguments)
    vectors = gallery.embeddings.vectors
    fitted(options, *vectors.shape)  # Refused here, it costs no training.
    if model is not None and model.width != vectors.shape[1]:
        raise UsageError(
            f"{model.checkpoint} embeds into {model.width} numbers and the gallery has "
            f"{vectors.shape[1]}; name the checkpoint that made it"
        )
    queries, measured_on = _queries(arguments, gallery)
    progress = ProgressLine("build", len(vectors), gallery.rows)
    index = build_index(vectors, distance, options, progress.advance)
    progress.finish()
    measured = measure(index, queries, gallery.embeddings)
    threshold, threshold_from = _threshold(arguments, gallery, queries, index)
    facts = SearchFacts(
        kind=index.options.kind,
        distance="cosine" if distance.name == "cosine" else "l2",
        width=index.width,
        count=index.count,
        rows=gallery.rows,
        options=asdict(index.options),
        recall={str(at): value for at, value in measured.recall.items()},
        num_measured=measured.num_queries,
        measured_on=measured_on,
        milliseconds=measured.milliseconds,
        exact_milliseconds=measured.exact_milliseconds,
        threshold=threshold,
        threshold_from=threshold_from,
        images=_images(arguments, gallery, model, out),
        checkpoint=model
        and Checkpoint(
            path=relative_path(model.checkpoint, out), embedder_sha256=model.embedder_sha256
        ),
        files={},
    )
    return write_index(out, index, gallery.table, facts)


def _gather(arguments: argparse.Namespace) -> tuple[Gallery, QueryModel | None]:
    source = Path(arguments.source)
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder; name a run, a checkpoint or Parquet")
    is_file = source.is_file() or not any(
        (source / name).exists() for name in ("checkpoints", "config.yaml", MANIFEST)
    )
    if is_file:
        if arguments.split:
            raise UsageError(f"--split={arguments.split} is for runs; {source} is a file as it is")
        return _gather_file(arguments, source)
    if arguments.checkpoint:
        raise UsageError(
            f"--checkpoint={arguments.checkpoint} is for Parquet; {source} embeds queries itself "
            "(name a checkpoint's own folder as the source to take another of the run)"
        )
    checkpoint, manifest = find_query_checkpoint(str(source))
    model = load_query_model(checkpoint, manifest)
    if not arguments.classes:
        protocol = model.config.evaluation.protocols[0]
        split = arguments.split or protocol.gallery or protocol.query
        return gallery_of_split(model, split, arguments.data), model
    if arguments.split:
        raise UsageError(f"--split={arguments.split} is for images; class weights have no split")
    data = open_data(model, arguments.data)
    return gallery_of_classes(checkpoint, manifest, data, model.config.data.split), model


def _gather_file(arguments: argparse.Namespace, source: Path) -> tuple[Gallery, QueryModel | None]:
    if arguments.classes:
        model = _model_of(arguments.checkpoint, {})
        return gallery_of_exported(source, model.width if model else None), model
    read = read_embeddings(source)
    model = _model_of(arguments.checkpoint, read.facts)
    data: Index | None = None
    made_from = read.facts.get("fingerprint")
    if arguments.data and (model is None or made_from is None):
        data = load_index(arguments.data)
    elif model is not None and made_from is not None:
        place = arguments.data or model.config.data.path
        data = data_with_fingerprint(model, place, made_from)
        if data is None and arguments.data:
            raise UsageError(
                f"--data={arguments.data} is not the data set that {source} was embedded from"
            )
    return gallery_of_table(read, data), model


def _model_of(text: str, facts: dict[str, str]) -> QueryModel | None:
    """The embedder that `--checkpoint` names; of a run, the checkpoint that made the file."""
    if not text:
        return None
    made_by = Path(text) / "checkpoints" / facts.get("checkpoint", "")
    named = str(made_by) if facts.get("checkpoint") and made_by.is_dir() else text
    checkpoint, manifest = find_query_checkpoint(named)
    stated = facts.get("checkpoint_digest")
    if stated is not None and stated != file_digest(checkpoint / MANIFEST):
        raise UsageError(
            f"{checkpoint} is not the checkpoint that made the embeddings "
            f"({facts.get('run')}, {facts.get('checkpoint')}); queries need the same one"
        )
    return load_query_model(checkpoint, manifest)


def _queries(arguments: argparse.Namespace, gallery: Gallery) -> tuple[Embeddings, str]:
    """What the index is measured by: rows of the gallery, or a file's, numbered as the gallery."""
    own = gallery.embeddings
    random = np.random.default_rng(arguments.seed)
    if not arguments.queries:
        rows = np.sort(random.permutation(len(own))[: arguments.num_queries])
        return own.rows(rows), "rows of the gallery, each without itself"
    read = read_embeddings(arguments.queries)
    if read.width != own.vectors.shape[1]:
        raise UsageError(
            f"{arguments.queries} has embeddings of width {read.width} and the gallery of "
            f"{own.vectors.shape[1]}; both must come from the same model"
        )
    rows = np.sort(random.permutation(len(read))[: arguments.num_queries])
    number = {name: i for i, name in enumerate(gallery.label_names)}
    known = [number.setdefault(str(name), len(number)) for name in read.label_values]
    labels = np.array(known, dtype=np.int64)[read.embeddings.labels[rows]]
    written = read.id_values if read.has_ids else []
    ids = _ids_beside(gallery, [written[row] for row in rows] if written else [])
    ids = ids if len(ids) else np.arange(len(rows)) + own.ids.max() + 1
    return Embeddings(
        read.embeddings.vectors[rows], labels, ids
    ), f"of {Path(arguments.queries).name}"


def _ids_beside(gallery: Gallery, values: list[int] | list[str]) -> np.ndarray:
    """Ids of the gallery for samples that are in it too: none finds itself; new ones for others."""
    own = gallery.embeddings.ids
    written = gallery.table["id"].to_pylist() if gallery.rows == "images" else []
    by_value = dict(zip(written, own.tolist(), strict=True)) if written else {}
    new = int(own.max()) + 1
    ids = [by_value.get(value, new + i) for i, value in enumerate(values)]
    return np.array(ids, dtype=np.int64)


def _threshold(
    arguments: argparse.Namespace,
    gallery: Gallery,
    queries: Embeddings,
    index: SearchIndex,
) -> tuple[float | None, str]:
    """The line, and where it is from."""
    given = _given_threshold(arguments)
    if given is not None:
        return given, "given"
    if gallery.rows == "classes" and not arguments.queries:
        return None, "class weights alone tell none; give --queries or --threshold"
    if arguments.threshold == "neighbours":
        found = neighbour_threshold(queries, gallery.embeddings, index.distance)
        what = f"the {NEIGHBOURS} nearest"
    else:
        seed = arguments.seed
        found = verification_threshold(queries, gallery.embeddings, index.distance, seed)
        what = "all pairs"
    if found is None:
        return None, "no pairs of one class and of two to learn from; give --threshold"
    return found, f"best parts same from other classes among {what} of {len(queries):,} queries"


def _given_threshold(arguments: argparse.Namespace) -> float | None:
    if arguments.threshold in _THRESHOLDS:
        return None
    try:
        value = float(arguments.threshold)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"--threshold={arguments.threshold} is neither a number nor one of "
            f"{', '.join(_THRESHOLDS)}"
        )
    return value


def _images(
    arguments: argparse.Namespace, gallery: Gallery, model: QueryModel | None, out: Path
) -> Images | None:
    if gallery.data is None:
        return None
    named = arguments.data or (model.config.data.path if model else "")
    place = named if "${" in named else gallery.data.folder
    return Images(path=relative_path(place, out), fingerprint=gallery.data.fingerprint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", help="run, checkpoint, or Parquet file or folder of embeddings"
    )
    parser.add_argument("out", metavar="OUT", help="folder of the index; not there yet")
    parser.add_argument("--kind", choices=KINDS, default="flat", help="flat (default) is exact")
    parser.add_argument("--distance", choices=("cosine", "l2"), default="cosine")
    parser.add_argument("--split", default="", help="of a run; default: its first gallery")
    parser.add_argument(
        "--classes", action="store_true", help="class weights of the run, or of an exported file"
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="RUN_OR_CHECKPOINT", help="what embeds queries"
    )
    parser.add_argument("--data", default="", metavar="DATASET", help="where the images are")
    parser.add_argument(
        "--queries", default="", metavar="Q.parquet", help="held-out queries to measure with"
    )
    parser.add_argument("--num-queries", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--threshold",
        default=_THRESHOLDS[0],
        metavar="VALUE",
        help=f"where the line is: {', '.join(_THRESHOLDS)} (default: the first) or a number",
    )
    defaults = asdict(IndexOptions())
    for name in _NUMBERS:
        shown = defaults[name] or ("0" if name == "seed" else "by size")
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, type=int, default=defaults[name], metavar="N", help=f"default: {shown}"
        )
    parser.add_argument("--json", action="store_true", help="print search.json instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Build. Returns the exit code."""
    limit_threads()
    facts = build(arguments)
    if arguments.json:
        print(json.dumps(facts.model_dump()))
        return 0
    size = sum(file.bytes for file in facts.files.values()) / 2**20
    print("\n".join(facts.summary()))
    print(f"{arguments.out}: {size:,.1f} MiB")
    if facts.checkpoint is None:
        print("note: no --checkpoint: queries need embeddings (`search query --embeddings`)")
    return 0
