"""Embeddings that are easy to get wrong, and what scores are by definition: plain loops."""

import numpy as np

from dist_dml.retrieval.embeddings import Embeddings


def samples(vectors, labels, first_id: int = 0, ids=None) -> Embeddings:
    labels = np.asarray(labels, dtype=np.int64)
    ids = first_id + np.arange(len(labels)) if ids is None else np.asarray(ids, dtype=np.int64)
    return Embeddings(np.asarray(vectors, dtype=np.float32), labels, ids)


def noisy(seed: int, count: int, classes: int, width: int = 8, noise: float = 1.2) -> Embeddings:
    """Points about one centre a class; ids are a permutation."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    vectors = centres[labels] + noise * rng.standard_normal((count, width))
    return samples(vectors, labels, ids=1000 * seed + rng.permutation(count))


def integers(seed: int, count: int, classes: int, width: int = 3) -> Embeddings:
    """Points of a small grid, whose squared distances are exact: ties and duplicates abound."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (count, width))
    ids = 1000 * seed + rng.permutation(count)
    return samples(vectors, rng.integers(0, classes, count), ids=ids)


def value_of(a: np.ndarray, b: np.ndarray, name: str) -> float:
    """Cosine or squared distance, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if name == "l2":
        return float(((a - b) ** 2).sum())
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / lengths if lengths else 0.0


def rankings(queries: Embeddings, gallery: Embeddings | None, name: str) -> list[list[int]]:
    """Rows of the gallery for each query, by value and then id, without the query's own id."""
    gallery = queries if gallery is None else gallery
    found = []
    for vector, own in zip(queries.vectors, queries.ids, strict=True):
        keys = []
        for j in range(len(gallery)):
            value = value_of(vector, gallery.vectors[j], name)
            # Cosines of parallel vectors differ in their last bits.
            far = round(value if name == "l2" else -value, 9)
            keys.append((far, int(gallery.ids[j]), j))
        found.append([j for _, number, j in sorted(keys) if number != own])
    return found


def twin_scores(
    queries: Embeddings, gallery: Embeddings | None, name: str, recall_at=(1, 2, 4)
) -> dict[str, float]:
    """The definitions of docs/evaluation.md, query by query."""
    searched = queries if gallery is None else gallery
    rows, truth, nearest = [], [], []
    for i, ranking in enumerate(rankings(queries, gallery, name)):
        hits = [bool(searched.labels[j] == queries.labels[i]) for j in ranking]
        r = sum(hits)
        if not r:
            continue
        precisions = [sum(hits[: j + 1]) / (j + 1) for j in range(r)]
        average = sum(p for p, hit in zip(precisions, hits, strict=False) if hit) / r
        row = [*[any(hits[:k]) for k in recall_at], hits[0], sum(hits[:r]) / r, average]
        rows.append([*row, 1 / (hits.index(True) + 1)])
        truth.append(int(queries.labels[i]))
        nearest.append(int(searched.labels[ranking[0]]))
    f1 = []
    for one in sorted(set(truth)):
        both = sum(t == p == one for t, p in zip(truth, nearest, strict=True))
        f1.append(2 * both / (truth.count(one) + nearest.count(one)))
    names = [f"recall_at_{k}" for k in recall_at]
    names += ["precision_at_1", "r_precision", "map_at_r", "mean_reciprocal_rank"]
    found = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    counts = {"num_queries": len(queries), "num_queries_without_match": len(queries) - len(rows)}
    return {**found, "f1_at_1": float(np.mean(f1)), **counts}


def twin_pairs(
    queries: Embeddings, gallery: Embeddings | None, name: str
) -> tuple[list[float], list[float]]:
    """Values of genuine and of impostor pairs, each ascending."""
    kinds: tuple[list[float], list[float]] = ([], [])
    for i in range(len(queries)):
        searched = queries if gallery is None else gallery
        for j in range(i + 1 if gallery is None else 0, len(searched)):
            if queries.ids[i] != searched.ids[j]:
                value = value_of(queries.vectors[i], searched.vectors[j], name)
                kinds[int(queries.labels[i] != searched.labels[j])].append(value)
    return sorted(kinds[0]), sorted(kinds[1])


TIES = {
    "grid": (integers(0, 60, 8), None),
    "grid and its gallery": (integers(1, 30, 6), integers(2, 70, 5)),
    "all at one point": (
        samples(np.ones((24, 4)), np.arange(24) // 3, ids=np.arange(24) * 7),
        None,
    ),
    "a gallery that holds the queries": (
        integers(3, 60, 8).rows(np.arange(5, 30)),
        integers(3, 60, 8),
    ),
    "all zero": (samples(np.zeros((12, 4)), np.arange(12) % 4), None),
}
