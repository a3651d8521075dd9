"""What "near" means: what is compared, and by which formula.

One type for losses, evaluation, reports and search. A distance with parameters, such as paper A's
`metric(k, p)`, is parsed from its text into a `Distance`.

Dimensions: `n` embeddings of width `D`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters, parse_metric

_ROWS = 8192
Vectors = Float32[np.ndarray, "n D"]
Space = Literal["embedding", "log_probability", "top_log_probability"]


@dataclass(frozen=True)
class Distance:
    """A way to rank a gallery for a query."""

    name: str
    """First part of the names of its scores."""
    prepare: Callable[[np.ndarray], np.ndarray]
    """Maps vectors (n, D) float32 to those FAISS gets, for search or k-means; row i depends on row
    i alone."""
    faiss_metric: str
    """Name of FAISS's constant; FAISS itself is imported only where a search starts. Empty where
    FAISS does not search: everything computed from probabilities."""
    larger_is_nearer: bool
    """True for similarities."""
    space: Space = "embedding"
    """What `Embeddings.vectors` must hold: the embeddings; the log-probabilities of all classes;
    or the `top` largest ones, with the class ids in `Embeddings.support`."""
    top: int = 0
    """How many log-probabilities a row of `top_log_probability` keeps; 0 elsewhere."""
    parameters: MetricParameters | None = None
    """k and p of the learned metric; None for all other distances."""

    @property
    def farthest(self) -> float:
        """The value behind every other one: it stands where there is no neighbour."""
        return -np.inf if self.larger_is_nearer else np.inf

    @property
    def has_nmi(self) -> bool:
        """Whether `cluster_nmi` is defined: vectors with a support of their own have no mean."""
        return self.space != "top_log_probability"


def unit_length(vectors: Vectors) -> Vectors:
    """Each row divided by its l2 norm, which is taken in float64; a zero row stays zero."""
    result = np.empty_like(vectors)
    # Part by part: numpy would hold a float64 copy of a whole gallery.
    for start in range(0, len(vectors), _ROWS):
        rows = vectors[start : start + _ROWS]
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
        norms = np.where(norms > 0, norms, 1.0)[:, None]
        np.divide(rows, norms, out=result[start : start + _ROWS], casting="same_kind")
    return result


def unchanged(vectors: Vectors) -> Vectors:
    """The rows themselves."""
    return vectors


def probabilities(log_probabilities: Vectors) -> Vectors:
    """e^x. Only k-means uses them: float32 has neither 1 - 1e-9 nor 1e-50."""
    return np.exp(log_probabilities)


DISTANCES: dict[str, Distance] = {
    # The value is the cosine itself.
    "cosine": Distance("cosine", unit_length, "METRIC_INNER_PRODUCT", larger_is_nearer=True),
    # The value is the *squared* Euclidean distance, as FAISS returns it: the order is the same, and
    # a root would magnify its rounding error (about 1e-7 times the squared norms) near zero.
    "l2": Distance("l2", unchanged, "METRIC_L2", larger_is_nearer=False),
    # Squared as well; paper A's row "L2" (reference 2.9). Not through FAISS: its expanded square
    # would be uncertain by 1e-7, more than the distances within a class of a confident classifier.
    "probability_l2": Distance(
        "probability_l2", probabilities, "", larger_is_nearer=False, space="log_probability"
    ),
}


def named_distance(text: str) -> Distance:
    """The distance of that name: `cosine`, `l2`, `probability_l2`, or `metric(...)`.

    `metric(p=0.1)` is paper A's L_m between probability vectors (eq. 16); with `top=T` the other
    distance that compares only the T largest probabilities of each. See `parse_metric`.

    Raises:
        UsageError: if there is none, or its parameters are outside the definition.
    """
    if text.strip().startswith("metric"):
        spec = parse_metric(text)
        return Distance(
            spec.name,
            probabilities,
            "",
            larger_is_nearer=False,
            space="top_log_probability" if spec.top else "log_probability",
            top=spec.top,
            parameters=spec.parameters,
        )
    if text not in DISTANCES:
        known = ", ".join(DISTANCES)
        raise UsageError(
            f"evaluation.distances has {text!r}, which is unknown; use {known} or metric(p=0.1)"
        )
    return DISTANCES[text]
