"""NMI and AMI: how well k-means finds the classes again. They look at the space as a whole.

Dimensions: `n` embeddings of width `D`, `C` classes among them.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.faiss_threads import faiss_with_worker_threads

NUM_ITERATIONS = 20
MOST_POINTS_PER_CLUSTER = 256


def cluster_scores(
    vectors: Float32[np.ndarray, "n D"],
    labels: Int64[np.ndarray, " n"],
    distance: Distance,
    seed: int,
) -> dict[str, float]:
    """`nmi` and `ami` between the classes and one k-means clustering with one cluster a class.

    The same for the same seed on one machine. Costs 2*n*C*D operations for each of 20 iterations:
    for many classes far more than the search itself, so it is measured at the last evaluation only.
    For distances between probability vectors, the plain k-means of these vectors: a mean minimises
    squared Euclidean distances, no other ones.

    Raises:
        UsageError: for a top-k variant: vectors with a support of their own have no mean.
    """
    clusters = _clusters_of_classes(vectors, labels, distance, seed)
    return {
        "nmi": normalised_mutual_information(labels, clusters),
        "ami": adjusted_mutual_information(labels, clusters),
    }


def cluster_nmi(
    vectors: Float32[np.ndarray, "n D"],
    labels: Int64[np.ndarray, " n"],
    distance: Distance,
    seed: int,
) -> float:
    """The `nmi` of `cluster_scores`, with its costs and errors."""
    clusters = _clusters_of_classes(vectors, labels, distance, seed)
    return normalised_mutual_information(labels, clusters)


def _clusters_of_classes(
    vectors: np.ndarray, labels: np.ndarray, distance: Distance, seed: int
) -> np.ndarray:
    if not distance.has_nmi:
        raise UsageError(
            f"{distance.name} has no NMI: truncated vectors have no mean to cluster by"
        )
    return kmeans_clusters(vectors, len(np.unique(labels)), distance, seed)


def kmeans_clusters(
    vectors: Float32[np.ndarray, "n D"], num_clusters: int, distance: Distance, seed: int
) -> Int64[np.ndarray, " n"]:
    """FAISS k-means from randomly chosen points; spherical (unit centroids) for the cosine.

    Centroids are fitted on at most 256 points a cluster (drawn with the seed; only closed sets with
    few, large classes have more) in 20 iterations, then every point goes to the nearest centroid.
    """
    faiss = faiss_with_worker_threads()
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        num_clusters,
        niter=NUM_ITERATIONS,
        # FAISS's seed is a C int, the run's has 63 bits.
        seed=key_of(seed, "kmeans") & 0x7FFFFFFF,
        spherical=distance.faiss_metric == "METRIC_INNER_PRODUCT",
        # FAISS asks for 39 points a cluster and complains below; classes of a handful are the rule.
        min_points_per_centroid=1,
        max_points_per_centroid=MOST_POINTS_PER_CLUSTER,
    )
    prepared = np.ascontiguousarray(distance.prepare(vectors))
    kmeans.train(prepared)
    _, clusters = kmeans.assign(prepared)
    return clusters


def normalised_mutual_information(
    first: Int64[np.ndarray, " n"], second: Int64[np.ndarray, " n"]
) -> float:
    """Mutual information of two partitions over the arithmetic mean of their entropies, in 0..1.

    Equal to `sklearn.metrics.normalized_mutual_info_score(first, second)`: 1 where both partitions
    are one single cluster. Only occupied cells of the table exist, so C x C cells never do.
    """
    information, entropy, _, _ = _information(first, second)
    if entropy == 0:
        return 1.0
    return min(1.0, max(0.0, information / entropy))


def adjusted_mutual_information(
    first: Int64[np.ndarray, " n"], second: Int64[np.ndarray, " n"]
) -> float:
    """Mutual information beyond that of chance: about 0 for a random clustering, 1 for the classes.

    `(I - E) / (mean entropy - E)`, with E the expected mutual information of partitions with these
    sizes (hypergeometric model; Vinh, Epps, Bailey, JMLR 2010). NMI of a random clustering is high
    where classes are many and small; this one is not. Equal to
    `sklearn.metrics.adjusted_mutual_info_score(first, second)`, which visits C x C cells where this
    visits pairs of *distinct* sizes: 10^6 classes of a few dozen sizes cost next to nothing.
    """
    information, entropy, sizes, other_sizes = _information(first, second)
    if len(sizes) == len(other_sizes) == 1:
        return 1.0
    if len(sizes) == 1 or len(other_sizes) == 1:
        return 0.0
    expected = expected_mutual_information(sizes, other_sizes)
    # Where chance explains everything (each item its own part in both), 0 / 0 counts as 1.
    smallest = float(np.finfo(np.float64).eps)
    above, most = (
        max(value, smallest) if value >= 0 else min(value, -smallest)
        for value in (information - expected, entropy - expected)
    )
    return above / most


def _information(
    first: np.ndarray, second: np.ndarray
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Mutual information, mean entropy (nats), and the sizes of both partitions' parts."""
    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    sizes, other_sizes = np.bincount(rows), np.bincount(columns)
    row_share, column_share = sizes / len(rows), other_sizes / len(rows)
    # A pair of class positions as one number: C squared stays below 2^63 for C up to 3e9.
    cells, counts = np.unique(rows * len(column_share) + columns, return_counts=True)
    share = counts / len(rows)
    independent = row_share[cells // len(column_share)] * column_share[cells % len(column_share)]
    information = float(np.sum(share * np.log(share / independent)))
    entropies = -float(np.sum(row_share * np.log(row_share))) - float(
        np.sum(column_share * np.log(column_share))
    )
    return information, entropies / 2, sizes, other_sizes


def expected_mutual_information(
    sizes: Int64[np.ndarray, " r"], other_sizes: Int64[np.ndarray, " c"]
) -> float:
    """Mean mutual information (nats) of two random partitions with parts of these sizes.

    The sum over cells depends on the two sizes alone, so each pair of distinct sizes is computed
    once. Costs at most n numbers for each distinct size.
    """
    total = int(sizes.sum())
    distinct, repeats = np.unique(sizes, return_counts=True)
    others, other_repeats = np.unique(other_sizes, return_counts=True)
    log_others = _log_factorial(others) + _log_factorial(total - others)
    expected = 0.0
    for size, repeat in zip(distinct.tolist(), repeats.tolist(), strict=True):
        # All overlaps of a part of `size` with a part of each other size, one after the other.
        least, most = np.maximum(1, size + others - total), np.minimum(size, others)
        lengths = most - least + 1
        part = np.repeat(np.arange(len(others)), lengths)
        ends = np.cumsum(lengths)
        overlap = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths) + least[part]
        log_chance = (
            _log_factorial(np.array([size, total - size])).sum()
            + log_others[part]
            - float(_log_factorial(np.array([total]))[0])
            - _log_factorial(overlap)
            - _log_factorial(size - overlap)
            - _log_factorial(others[part] - overlap)
            - _log_factorial(total - size - others[part] + overlap)
        )
        term = np.log(total * overlap / (size * others[part])) * overlap / total
        expected += repeat * float(np.sum(other_repeats[part] * term * np.exp(log_chance)))
    return expected


def _log_factorial(numbers: np.ndarray) -> Float64[np.ndarray, " n"]:
    return torch.lgamma(torch.from_numpy(numbers + 1.0)).numpy()
