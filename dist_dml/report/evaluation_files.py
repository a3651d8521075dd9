"""What an evaluation prints, and its pictures as files: table, gallery, recall, certificates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.measurement import Measurement
from dist_dml.report.scores_section import scores_of
from dist_dml.retrieval.certificate_figure import certificate_figure
from dist_dml.retrieval.certificates import certificate_text
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.report import GalleryRows, recall_curve, retrieval_gallery, score_table


def tables(rows: Mapping[str, Mapping[str, float]], config: Config) -> str:
    """One table a protocol and distance; `rows` holds the scores of each model.

    The first protocol and distance, the ones that matter most, come last: next to the prompt.
    """
    texts = []
    for protocol in reversed(config.evaluation.protocols):
        searched = f"gallery {protocol.gallery}" if protocol.gallery else "each without itself"
        for text in reversed(config.evaluation.distances):
            distance = named_distance(text).name
            shown = {name: scores_of(scores, protocol, distance) for name, scores in rows.items()}
            shown = {name: scores for name, scores in shown.items() if scores}
            title = f"{protocol.name}, {text}: queries {protocol.query}, {searched}"
            texts.append(f"{title}\n{score_table(shown)}")
    return "\n\n".join(texts)


def shown_names(index: Index, *samples: Embeddings) -> dict[int, str]:
    """Names of the classes of these samples alone: there may be millions of others."""
    names = index.class_names
    labels = np.unique(np.concatenate([one.labels for one in samples]))
    return {label: names[label] for label in labels.tolist()}


def write_gallery(
    path: Path,
    index: Index,
    measured: Measurement,
    config: Config,
    title: str,
    rows: GalleryRows | None = None,
) -> None:
    """The picture of hits and misses of the first protocol and distance.

    Args:
        path: of the picture; its folder is made.
        index: where the images are.
        measured: with the vectors.
        config: which protocol and distance.
        title: headline.
        rows: of `choose_rows`, where they are known.
    """
    from dist_dml.data.reader import open_reader, read_image

    protocol = config.evaluation.protocols[0]
    distance = named_distance(config.evaluation.distances[0])
    reader = open_reader(index, config.data.image.channels, config.data.storage)
    queries = measured.of(protocol.query, distance)
    gallery = measured.of(protocol.gallery, distance) if protocol.gallery else None
    figure = retrieval_gallery(
        queries,
        gallery,
        distance,
        lambda sample_id: read_image(index, reader, sample_id),
        shown_names(index, queries, *([gallery] if gallery is not None else [])),
        seed=config.run.seed,
        title=title,
        rows=rows,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write_certificates(path: Path, measured: Measurement) -> str:
    """The picture of the certificates, and their table with what it means; empty without any."""
    if not measured.certificates:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    certificate_figure(measured.certified).savefig(path)
    text = certificate_text(measured.certificates)
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return text


def write_recall(path: Path, rows: Mapping[str, Mapping[str, float]], config: Config) -> None:
    """The picture of Recall@K of the first protocol and distance, one line a model."""
    protocol = config.evaluation.protocols[0]
    distance = named_distance(config.evaluation.distances[0]).name
    curves = {}
    for name, scores in rows.items():
        found = scores_of(scores, protocol, distance)
        if not found:  # Pixels have no class probabilities.
            continue
        curves[name] = {k: found[f"recall_at_{k}"] for k in config.evaluation.recall_at}
    title = f"Recall@K, {protocol.name} ({distance})"
    recall_curve(curves, title).savefig(path)
