"""What "near" means: how embeddings are prepared, and how FAISS compares them.

One type for losses, evaluation, reports and search. A distance with parameters, such as paper A's
`metric(k, p)`, becomes a function that returns a `Distance`.

Dimensions: `n` embeddings of width `D`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from dist_dml.errors import UsageError

Vectors = Float32[np.ndarray, "n D"]


@dataclass(frozen=True)
class Distance:
    """A way to rank a gallery for a query."""

    name: str
    """First part of the names of its scores."""
    prepare: Callable[[np.ndarray], np.ndarray]
    """Maps embeddings (n, D) float32 to those that are compared; row i depends on row i alone."""
    faiss_metric: str
    """Name of FAISS's constant; FAISS itself is imported only where a search starts."""
    larger_is_nearer: bool
    """True for similarities."""

    @property
    def farthest(self) -> float:
        """The value behind every other one: it stands where there is no neighbour."""
        return -np.inf if self.larger_is_nearer else np.inf


def unit_length(vectors: Vectors) -> Vectors:
    """Each row divided by its l2 norm, which is taken in float64; a zero row stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    norms = np.where(norms > 0, norms, 1.0)[:, None]
    # Casting while dividing avoids a float64 copy of a large gallery.
    return np.divide(vectors, norms, out=np.empty_like(vectors), casting="same_kind")


def unchanged(vectors: Vectors) -> Vectors:
    """The rows themselves."""
    return vectors


DISTANCES: dict[str, Distance] = {
    # The value is the cosine itself.
    "cosine": Distance("cosine", unit_length, "METRIC_INNER_PRODUCT", larger_is_nearer=True),
    # The value is the *squared* Euclidean distance, as FAISS returns it: the order is the same, and
    # a root would magnify its rounding error (about 1e-7 times the squared norms) near zero.
    "l2": Distance("l2", unchanged, "METRIC_L2", larger_is_nearer=False),
}


def named_distance(name: str) -> Distance:
    """The distance of that name.

    Raises:
        UsageError: if there is none.
    """
    if name not in DISTANCES:
        known = ", ".join(DISTANCES)
        raise UsageError(f"evaluation.distances has {name!r}, which is unknown; use {known}")
    return DISTANCES[name]
