"""ENTRY: the nearest items of an index to images, or to embeddings of a Parquet file.

dist-dml search query indexes/demo a.jpg b.png
dist-dml search query indexes/demo --embeddings Q.parquet --k 5 --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dist_dml.data.faults import BadSample
from dist_dml.errors import UsageError
from dist_dml.retrieval.embedding_files import read_embeddings
from dist_dml.retrieval.search_files import OpenIndex, open_search_index
from dist_dml.search.answers import UNITS, answer_lines, neighbours_of, printable
from dist_dml.search.query_model import QueryModel, find_query_checkpoint, load_query_model


def load_model_of(opened: OpenIndex, text: str) -> QueryModel:
    """The embedder that the index was built with.

    Args:
        opened: the index.
        text: where the run or checkpoint is now; empty: where the index says.

    Raises:
        UsageError: nobody says where it is, or it is another one.
    """
    stated = opened.facts.checkpoint
    if stated is None and not text:
        raise UsageError(
            f"{opened.folder} does not say what embeds queries; name it with --checkpoint, or "
            "search with --embeddings"
        )
    place = text or opened.place(stated.path if stated else "")
    if not Path(place).exists():
        raise UsageError(f"{place} is not there; name the run or checkpoint with --checkpoint")
    if stated is not None and (Path(place) / "checkpoints").is_dir():
        named = Path(place) / "checkpoints" / Path(stated.path).name
        place = str(named) if named.is_dir() else place
    model = load_query_model(*find_query_checkpoint(place))
    if stated is not None and model.embedder_sha256 != stated.embedder_sha256:
        raise UsageError(
            f"{model.checkpoint} is not the checkpoint that {opened.folder} was built with; its "
            "embeddings cannot be compared"
        )
    if model.width != opened.facts.width:
        raise UsageError(
            f"{model.checkpoint} embeds into {model.width} numbers and the index has "
            f"{opened.facts.width}; name the checkpoint that made it"
        )
    return model


def _queries(arguments: argparse.Namespace, opened: OpenIndex) -> tuple[list[str], np.ndarray]:
    """Names and embeddings."""
    if arguments.embeddings:
        if arguments.images:
            raise UsageError(f"{arguments.images[0]} and --embeddings are given; give one of both")
        read = read_embeddings(arguments.embeddings)
        return [str(value) for value in read.id_values], read.embeddings.vectors
    if not arguments.images:
        raise UsageError("there is nothing to search for; give images, or --embeddings Q.parquet")
    images = []
    for name in arguments.images:
        try:
            images.append(Path(name).read_bytes())
        except OSError as error:
            raise UsageError(f"{name} cannot be read ({error.strerror})") from None
    model = load_model_of(opened, arguments.checkpoint)
    vectors = []
    for name, data in zip(arguments.images, images, strict=True):
        try:
            vectors.append(model.embed_images([data]))
        except BadSample as error:
            raise UsageError(f"{name} cannot be searched for: {error.reason}") from None
    return arguments.images, np.concatenate(vectors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("index", metavar="INDEX", help="folder of `dist-dml search build`")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="JPEG, PNG or WebP files")
    parser.add_argument("--embeddings", default="", metavar="Q.parquet", help="instead of images")
    parser.add_argument("--k", type=int, default=10, help="neighbours (default 10)")
    parser.add_argument(
        "--checkpoint", default="", metavar="RUN_OR_CHECKPOINT", help="if it lies elsewhere now"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each query")


def run(arguments: argparse.Namespace) -> int:
    """Search and print. Returns the exit code."""
    opened = open_search_index(Path(arguments.index))
    names, vectors = _queries(arguments, opened)
    found = neighbours_of(opened, vectors, arguments.k)
    for name, neighbours in zip(names, found, strict=True):
        if arguments.json:
            facts = opened.facts
            answer = {"query": name, "distance": facts.distance, "threshold": facts.threshold}
            print(json.dumps({**answer, "neighbours": neighbours}, default=str))
        else:
            print(f"{printable(name)} ({UNITS[opened.facts.distance]})")
            print("\n".join(answer_lines(opened, neighbours)) + "\n")
    return 0
