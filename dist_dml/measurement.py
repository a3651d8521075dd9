"""From a model to scores: vectors of each split, retrieval by each distance, certificates.

Called by all workers together: every one embeds its slice of each split, and searches it for the
queries of all.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.data.plan import worker_slice
from dist_dml.errors import UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.metric_parameters import parse_metric
from dist_dml.parallel.class_scores import label_distances
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.collectives import gather_objects
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
from dist_dml.retrieval.sharded_gallery import score_sharded
from dist_dml.retrieval.sharded_hits import complete_sharded_hits
from dist_dml.retrieval.verification import Verification
from dist_dml.split_vectors import Key, Model, SplitVectors, key_of
from dist_dml.usable import usable_memory

_AGREEMENT_QUERIES = 512


@dataclass(frozen=True)
class Measurement:
    """Scores as `protocol/distance/score`, the same on every worker, and what they came from."""

    scores: dict[str, float] = field(default_factory=dict)
    vectors: dict[Key, Embeddings] = field(default_factory=dict)
    """Whole splits, by `split_vectors.key_of`, on the first worker and where it was asked for."""
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
        return self.vectors[key_of(split, distance)]


def search_settings(config: Config, world: World) -> SearchSettings:
    """How this worker searches."""
    memory_bytes = config.evaluation.search_mebibytes * 2**20
    return SearchSettings(config.evaluation.search_backend, memory_bytes, world.device)


def measure_model(
    model: Model, index: Index, config: Config, world: World, nmi: bool, whole: bool = True
) -> Measurement:
    """All scores of all protocols and distances, and the certificates; called by all workers.

    Every worker keeps the embeddings of its slice: the gallery stays divided and queries travel.
    Whole splits are held by the first worker, if asked for, and by all of them where a distance or
    a certificate is made of class probabilities: classes are divided, so rows are not.

    Args:
        model: what is measured; without a classifier, distances between class probabilities are
            left out.
        index: the data.
        config: says what is measured.
        world: the workers.
        nmi: also what costs a pass of its own: the mean reciprocal rank, and on the first worker
            alone NMI and AMI and verification.
        whole: leave the splits' vectors in `Measurement.vectors` on the first worker, for pictures
            and files. With `nmi` they are there anyway.
    """
    found = Measurement()
    vectors = SplitVectors(model, index, config, world)
    named = [named_distance(text) for text in config.evaluation.distances]
    classless = model.classifier is None
    distances = [one for one in named if one.space == "embedding" or not classless]
    for protocol in config.evaluation.protocols:
        for distance in distances:
            part = _score(vectors, protocol, distance, nmi)
            every = QueryScores.concatenate(gather_objects(part, world.group))
            found.query_scores[protocol.name, distance.name] = every
            if nmi or whole:
                _keep(found, vectors, protocol, distance)
            summary = summarise(every)
            if nmi and world.is_first:
                summary = _summary_with_passes(found, protocol, distance, config)
            prefix = f"{protocol.name}/{distance.name}"
            found.scores.update({f"{prefix}/{key}": value for key, value in summary.items()})
        if nmi and world.is_first:
            for distance in distances:
                found.scores.update(_agreement(found, protocol, distance, distances))
    if model.classifier is not None:
        for text in config.evaluation.certificates:
            split = config.evaluation.certificate_split
            known = vectors.everywhere(split, named_distance("l2"))
            _certify(found, known, model.classifier, text, split)
    found.left_out.update(vectors.left_out)
    for split, count in found.left_out.items():
        if count:
            found.scores[f"data/left_out/{split}"] = float(count)
    scores = gather_objects(found.scores, world.group)[0]
    return replace(found, scores=scores)


def _keep(
    found: Measurement, vectors: SplitVectors, protocol: ProtocolConfig, distance: Distance
) -> None:
    """Leave what the distance compares, and the embeddings behind, with the first worker."""
    for split in filter(None, (protocol.query, protocol.gallery)):
        for each in (distance, named_distance("l2")):
            kept = vectors.on_first(split, each)
            if kept is not None:
                found.vectors[key_of(split, each)] = kept


def _summary_with_passes(
    found: Measurement, protocol: ProtocolConfig, distance: Distance, config: Config
) -> dict[str, float]:
    """All scores of one distance, and what only the first worker measures."""
    every = found.query_scores[protocol.name, distance.name]
    queries = found.of(protocol.query, distance)
    gallery = found.of(protocol.gallery, distance) if protocol.gallery else None
    # Intervals are the report's: they follow from `query_scores`.
    options = ScoreOptions(config.evaluation.recall_at, nmi=True, seed=config.run.seed, resamples=0)
    full = scores_of_queries(every, queries, gallery, distance, options)
    if full.verification is not None:
        found.verifications[protocol.name, distance.name] = full.verification
    return full.scores


def _score(
    vectors: SplitVectors, protocol: ProtocolConfig, distance: Distance, nmi: bool
) -> QueryScores:
    """The scores of this worker's queries."""
    config, world = vectors.config, vectors.world
    recall_at, settings = config.evaluation.recall_at, search_settings(config, world)
    if distance.space == "embedding":
        queries = vectors.mine(protocol.query)
        gallery = vectors.mine(protocol.gallery) if protocol.gallery else None
        part = score_sharded(queries, gallery, distance, recall_at, world.group, settings)
        if nmi:
            part = complete_sharded_hits(
                part, queries, gallery, distance, world.group, settings.device
            )
        return part
    queries = vectors.everywhere(protocol.query, distance)
    gallery = vectors.everywhere(protocol.gallery, distance) if protocol.gallery else None
    mine = worker_slice(len(queries), world.rank, world.size)
    part = score_slice(queries, gallery, mine, distance, recall_at, settings)
    if nmi:
        searched = queries if gallery is None else gallery
        part = complete_first_hits(part, queries.rows(mine), searched, distance)
    return part


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
    agreement = top_agreement(queries.rows(slice(0, None, step)), gallery, distance)
    prefix = f"{protocol.name}/{distance.name}"
    return {f"{prefix}/{key}": value for key, value in agreement.items()}


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
    free = usable_memory()
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
