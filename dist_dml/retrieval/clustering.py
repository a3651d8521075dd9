"""NMI: how well k-means finds the classes again. It looks at the space as a whole, not at ranks.

Dimensions: `n` embeddings of width `D`, `C` classes among them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.neighbours import faiss_with_worker_threads

NUM_ITERATIONS = 20
MOST_POINTS_PER_CLUSTER = 256


def cluster_nmi(
    vectors: Float32[np.ndarray, "n D"],
    labels: Int64[np.ndarray, " n"],
    distance: Distance,
    seed: int,
) -> float:
    """NMI between the classes and a k-means clustering with one cluster a class.

    The same for the same seed on one machine. Costs 2*n*C*D operations for each of 20 iterations:
    for many classes far more than the search itself, so it is measured at the last evaluation only.
    For distances between probability vectors, the plain k-means of these vectors: a mean minimises
    squared Euclidean distances, no other ones.

    Raises:
        UsageError: for a top-k variant: vectors with a support of their own have no mean.
    """
    if not distance.has_nmi:
        raise UsageError(
            f"{distance.name} has no NMI: truncated vectors have no mean to cluster by"
        )
    num_classes = len(np.unique(labels))
    clusters = kmeans_clusters(vectors, num_classes, distance, seed)
    return normalised_mutual_information(labels, clusters)


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
    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    row_share = np.bincount(rows) / len(rows)
    column_share = np.bincount(columns) / len(columns)
    # A pair of class positions as one number: C squared stays below 2^63 for C up to 3e9.
    cells, counts = np.unique(rows * len(column_share) + columns, return_counts=True)
    share = counts / len(rows)
    independent = row_share[cells // len(column_share)] * column_share[cells % len(column_share)]
    information = float(np.sum(share * np.log(share / independent)))
    entropies = -float(np.sum(row_share * np.log(row_share))) - float(
        np.sum(column_share * np.log(column_share))
    )
    if entropies == 0:
        return 1.0
    return min(1.0, max(0.0, 2 * information / entropies))
