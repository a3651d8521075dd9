"""From a model to scores: vectors of each split, retrieval by each distance, certificates.

Called by all workers together; every one embeds its slice and scores its slice of the queries.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.data.loader import evaluation_batches
from dist_dml.data.plan import row_counts, worker_slice
from dist_dml.engine import autocast
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.metric_parameters import parse_metric
from dist_dml.models.embedder import Embedder
from dist_dml.parallel.class_scores import (
    label_distances,
    log_probabilities,
    top_log_probabilities,
)
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.collectives import gather_objects, gather_uneven
from dist_dml.parallel.world import World
from dist_dml.retrieval.certificates import Certificate, certify
from dist_dml.retrieval.distances import Distance, named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.first_hits import complete_first_hits
from dist_dml.retrieval.full_scores import ScoreOptions, scores_of_queries
from dist_dml.retrieval.gallery_search import SearchSettings
from dist_dml.retrieval.metrics import QueryScores, score_names, summarise
from dist_dml.retrieval.protocol import score_slice
from dist_dml.retrieval.ranking import top_agreement
from dist_dml.retrieval.verification import Verification

Embed = Callable[[Tensor], Tensor]
_AGREEMENT_QUERIES = 512


@dataclass(frozen=True)
class Model:
    """What is measured: images to embeddings and, where there is one, the classifier behind."""

    embed: Embed
    classifier: ClassParallelClassifier | None = None


@dataclass(frozen=True)
class Measurement:
    """Scores as `protocol/distance/score`, the same on every worker, and what they came from."""

    scores: dict[str, float] = field(default_factory=dict)
    vectors: dict[tuple[str, str, int], Embeddings] = field(default_factory=dict)
    """By split, space and number of kept classes."""
    certified: dict[str, tuple[np.ndarray, np.ndarray, MetricLoss]] = field(default_factory=dict)
    """Epsilons, whether each image is classified correctly, and the loss, by the metric's text."""
    certificates: dict[str, Certificate] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Damaged images of each split, which no score counts."""
    query_scores: dict[tuple[str, str], QueryScores] = field(default_factory=dict)
    """Of every query, in the order of its split's vectors, by protocol and distance."""
    verifications: dict[tuple[str, str], Verification] = field(default_factory=dict)
    """Thresholds on pairs, likewise, where they were measured: on the first worker, with `nmi`."""

    def of(self, split: str, distance: Distance) -> Embeddings:
        """The vectors of a split that a distance compares."""
        return self.vectors[split, distance.space, distance.top]


def embed_with(embedder: Embedder, config: Config, world: World) -> Embed:
    """Retrieval features of uint8 images, under the precision of training, without dropout."""

    def embed(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(config, world.device):
            return embedder(images.to(world.device, non_blocking=True))

    return embed


def embed_pixels(images: Tensor) -> Tensor:
    """The baseline without a network: the image itself as a vector."""
    return images.flatten(1).float() / 255


def embed_split(embed: Embed, index: Index, split: str, config: Config, world: World) -> Embeddings:
    """Embeddings of a whole split, on every worker; each embeds its slice.

    Damaged images are left out, never replaced: the result then has fewer rows than the split.
    Costs one pass over the slice and an all-gather of the embeddings: N * D * 4 bytes a worker.

    Raises:
        RunError: if no image of the split can be read.
    """
    ids = index.select(split)
    counts = row_counts(len(ids), world.size)
    batches = evaluation_batches(
        index, split, config.data, config.evaluation.batch_size, world.rank, world.size
    )
    parts, readable = [], []
    for batch in batches:
        parts.append(embed(batch.images).float())
        readable.append(batch.readable)
    if not parts:  # More workers than images: learn the width from a blank one.
        image = config.data.image
        blank = torch.zeros(1, image.channels, image.size, image.size, dtype=torch.uint8)
        parts, readable = [embed(blank).float()[:0]], [torch.zeros(0, dtype=torch.bool)]
    vectors = gather_uneven(torch.cat(parts).to(world.device), counts, world.group).cpu()
    own = torch.cat(readable).to(world.device, torch.uint8)
    kept = gather_uneven(own, counts, world.group).cpu().bool().numpy()
    if not kept.any():
        raise RunError(
            f"none of the {len(ids)} images of split {split} can be read; `dist-dml verify "
            f"{index.folder}` tells why"
        )
    ids = ids[kept].astype(np.int64)
    return Embeddings(vectors.numpy()[kept], index.class_id[ids], ids)


def search_settings(config: Config, world: World) -> SearchSettings:
    """How this worker searches."""
    memory_bytes = config.evaluation.search_mebibytes * 2**20
    return SearchSettings(config.evaluation.search_backend, memory_bytes, world.device)


def measure_model(
    model: Model, index: Index, config: Config, world: World, nmi: bool
) -> Measurement:
    """All scores of all protocols and distances, and the certificates.

    The queries are divided among the workers. With `nmi`, also what costs a pass of its own: the
    mean reciprocal rank, and on worker 0 alone NMI and AMI and verification. Distances between
    class probabilities are left out for a model without a classifier.
    """
    found = Measurement()

    def vectors_of(split: str, distance: Distance) -> Embeddings:
        key = (split, distance.space, distance.top)
        if key not in found.vectors:
            if distance.space == "embedding":
                found.vectors[key] = embed_split(model.embed, index, split, config, world)
                found.left_out[split] = len(index.select(split)) - len(found.vectors[key])
            else:
                plain = vectors_of(split, named_distance("l2"))
                found.vectors[key] = _class_vectors(plain, model.classifier, distance)
        return found.vectors[key]

    distances = [named_distance(text) for text in config.evaluation.distances]
    settings = search_settings(config, world)
    for protocol in config.evaluation.protocols:
        for distance in distances:
            if distance.space != "embedding" and model.classifier is None:
                continue
            queries = vectors_of(protocol.query, distance)
            gallery = vectors_of(protocol.gallery, distance) if protocol.gallery else None
            mine = worker_slice(len(queries), world.rank, world.size)
            part = score_slice(
                queries, gallery, mine, distance, config.evaluation.recall_at, settings
            )
            if nmi:
                searched = queries if gallery is None else gallery
                part = complete_first_hits(part, queries.rows(mine), searched, distance)
            every = QueryScores.concatenate(gather_objects(part, world.group))
            found.query_scores[protocol.name, distance.name] = every
            prefix = f"{protocol.name}/{distance.name}"
            if nmi and world.is_first:
                recall_at, seed = config.evaluation.recall_at, config.run.seed
                # Intervals are the report's: they follow from `query_scores`.
                options = ScoreOptions(recall_at, nmi=True, seed=seed, resamples=0)
                full = scores_of_queries(every, queries, gallery, distance, options)
                summary = full.scores | _agreement(found, protocol, distance, distances)
                if full.verification is not None:
                    found.verifications[protocol.name, distance.name] = full.verification
            else:
                summary = summarise(every)
            found.scores.update({f"{prefix}/{key}": value for key, value in summary.items()})
    if model.classifier is not None:
        for text in config.evaluation.certificates:
            split = config.evaluation.certificate_split
            known = vectors_of(split, named_distance("l2"))
            _certify(found, known, model.classifier, text, split)
    for split, count in found.left_out.items():
        if count:
            found.scores[f"data/left_out/{split}"] = float(count)
    scores = gather_objects(found.scores, world.group)[0]
    return replace(found, scores=scores)


def _agreement(
    found: Measurement, protocol: ProtocolConfig, distance: Distance, others: list[Distance]
) -> dict[str, float]:
    """How alike a top-T distance ranks to the full one, where both are measured."""
    full = [d for d in others if d.parameters == distance.parameters and not d.top]
    if not distance.top or not full:
        return {}
    queries = found.of(protocol.query, full[0])
    gallery = found.of(protocol.gallery, full[0]) if protocol.gallery else queries
    # Both searches once more, so of no more queries than the comparison needs.
    step = max(1, len(queries) // _AGREEMENT_QUERIES)
    return top_agreement(queries.rows(slice(0, None, step)), gallery, distance)


def _class_vectors(
    embeddings: Embeddings, classifier: ClassParallelClassifier | None, distance: Distance
) -> Embeddings:
    """Log-probabilities of all classes, or of the largest ones with their ids."""
    assert classifier is not None
    rows = classifier.rows_for_scores(torch.from_numpy(embeddings.vectors))
    problem = classifier.problem()
    labels, ids = embeddings.labels, embeddings.ids
    if distance.space == "log_probability":
        values = log_probabilities(rows, problem).float().cpu().numpy()
        return Embeddings(np.ascontiguousarray(values), labels, ids)
    top = min(distance.top, classifier.partition.num_classes)
    values, classes = top_log_probabilities(rows, problem, top)
    return Embeddings(values.float().cpu().numpy(), labels, ids, classes.cpu().numpy())


def _certify(
    found: Measurement,
    known: Embeddings,
    classifier: ClassParallelClassifier,
    text: str,
    split: str,
) -> None:
    """Add the certificate of one metric."""
    spec = parse_metric(text)
    rows = classifier.rows_for_scores(torch.from_numpy(known.vectors))
    labels = torch.from_numpy(known.labels).to(rows.device)
    problem = classifier.problem()
    epsilon, correct = label_distances(rows, labels, problem, spec.parameters)
    samples = (epsilon.float().cpu().numpy(), correct.cpu().numpy(), MetricLoss(spec.parameters))
    certificate = certify(*samples)
    found.certified[text], found.certificates[text] = samples, certificate
    prefix = f"{split}/certificate/{spec.name}"
    found.scores.update({f"{prefix}/{key}": value for key, value in certificate.scores().items()})


def check_evaluation(
    index: Index, config: Config, num_classes: int, num_local_workers: int
) -> None:
    """Refuse, before any work, what cannot be measured.

    Raises:
        UsageError: for protocols whose splits are missing, certificates of unknown classes, class
            probabilities that memory cannot hold, a best metric never measured; names the key.
    """
    evaluation = config.evaluation
    names = [protocol.name for protocol in evaluation.protocols]
    if len(set(names)) < len(names):
        raise UsageError(f"evaluation.protocols has a name twice ({names}); give each its own")
    splits = {s for p in evaluation.protocols for s in (p.query, p.gallery) if s}
    images = sum(len(index.select(split)) for split in splits)
    if evaluation.certificates:
        split = evaluation.certificate_split
        largest = int(index.class_id[index.select(split)].max(initial=-1))
        if largest >= num_classes:
            raise UsageError(
                f"evaluation.certificate_split={split!r} holds class {largest}, which the "
                f"classifier of {num_classes} classes does not know; certificates speak of "
                "training classes: name a split with held-out images of these"
            )
    distances = [named_distance(text) for text in evaluation.distances]
    if len({distance.name for distance in distances}) < len(distances):
        raise UsageError(
            f"evaluation.distances={list(evaluation.distances)} names one twice; remove one"
        )
    if config.loss.of_pairs:
        _check_without_classes(config, distances)
    if any(distance.space == "log_probability" for distance in distances):
        _check_memory(images, num_classes, num_local_workers)
    _check_best_metric(config, [distance.name for distance in distances])


def _check_without_classes(config: Config, distances: list[Distance]) -> None:
    asked = [f"distance {one.name}" for one in distances if one.space != "embedding"]
    asked += [f"certificate {text}" for text in config.evaluation.certificates]
    if asked:
        raise UsageError(
            f"the evaluation asks for {', '.join(asked)}, made of class probabilities, and "
            f"loss.name={config.loss.name} has none; remove it from evaluation.distances or "
            "evaluation.certificates"
        )


def _check_memory(images: int, num_classes: int, num_local_workers: int) -> None:
    """Full rows of probabilities exist only here: everywhere else the classes are split."""
    needed = 2 * 4 * images * num_classes * num_local_workers
    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"evaluation.distances compares all {num_classes} class probabilities of {images} "
            f"images, which needs {needed / 2**30:.1f} GiB on this machine with "
            f"{free / 2**30:.1f} GiB free; use the distance of the largest ones, for example "
            "metric(p=0.1,top=64), or smaller splits"
        )


def _check_best_metric(config: Config, distances: list[str]) -> None:
    best = config.checkpoint.best_metric
    measured = {
        f"{protocol.name}/{distance}/{score}"
        for protocol in config.evaluation.protocols
        for distance in distances
        for score in score_names(config.evaluation.recall_at)
    }
    if best and best not in measured:
        near = difflib.get_close_matches(best, measured, n=3, cutoff=0.0)
        raise UsageError(
            f"checkpoint.best_metric={best!r} is not measured; use PROTOCOL/DISTANCE/SCORE, for "
            f"example {' or '.join(near)}, or '' to keep none"
        )
