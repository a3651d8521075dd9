"""Embedded samples as retrieval gets them.

Dimensions: `n` samples; vectors of width `D`: an embedding's, or the number of classes or of kept
classes where the vectors are log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from dist_dml.errors import RunError, UsageError
from dist_dml.retrieval.distances import Distance

_TYPES = (np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int64))
# A float32 log-softmax may exceed 0 by its rounding; anything above this is no log-probability.
_LARGEST_LOG_PROBABILITY = 1e-3


@dataclass(frozen=True)
class Embeddings:
    """Embedded samples: row i of each array is one of them."""

    vectors: Float32[np.ndarray, "n D"]
    """What `Distance.space` says: embeddings, or log-probabilities."""
    labels: Int64[np.ndarray, " n"]
    """Classes, 0 and above."""
    ids: Int64[np.ndarray, " n"]
    """What tells a sample from all others of the data set, in whatever split it is."""
    support: Int64[np.ndarray, "n D"] | None = None
    """Where `vectors` hold only the largest log-probabilities: the classes they belong to. Apart
    from the vectors, because float32 holds no class id above 2^24."""

    def __post_init__(self) -> None:
        shapes = (self.vectors.shape[:1], self.labels.shape, self.ids.shape)
        types = (self.vectors.dtype, self.labels.dtype, self.ids.dtype)
        if len(set(shapes)) != 1 or self.vectors.ndim != 2 or types != _TYPES:
            raise UsageError(
                f"embeddings have vectors {self.vectors.shape} {types[0]}, labels {shapes[1]} "
                f"{types[1]}, ids {shapes[2]} {types[2]}; "
                "give (n, D) float32, (n,) int64, (n,) int64"
            )
        if self.labels.min(initial=0) < 0:
            raise UsageError(f"a label is {self.labels.min()}; labels must be 0 and above")
        # Finite float32 values cannot overflow a float64 sum, and inf - inf is NaN.
        with np.errstate(invalid="ignore"):
            broken = ~np.isfinite(self.vectors.sum(axis=1, dtype=np.float64))
        if broken.any():
            raise RunError(
                f"{broken.sum()} of {len(self)} embeddings are not finite (the first has id "
                f"{self.ids[broken.argmax()]}); the model has diverged, lower "
                "optimizer.learning_rate or go back to an earlier checkpoint"
            )
        if self.support is not None:
            _check_support(self.vectors, self.support)

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, selection: slice | np.ndarray) -> Embeddings:
        """The samples at these rows."""
        support = None if self.support is None else self.support[selection]
        return Embeddings(
            self.vectors[selection], self.labels[selection], self.ids[selection], support
        )


def _check_support(vectors: np.ndarray, support: np.ndarray) -> None:
    if support.shape != vectors.shape or support.dtype != np.int64:
        raise UsageError(
            f"support is {support.shape} {support.dtype} beside vectors {vectors.shape}; give the "
            "class id of each kept log-probability, (n, T) int64"
        )
    if support.min(initial=0) < 0:
        raise UsageError(f"support holds class {support.min()}; class ids must be 0 and above")
    twice = (np.diff(np.sort(support, axis=1), axis=1) == 0).any(axis=1)
    if twice.any():
        raise UsageError(
            f"support has a class twice in row {twice.argmax()}; give the {vectors.shape[1]} "
            "largest log-probabilities of each sample, every class once"
        )


def check_space(embeddings: Embeddings, distance: Distance) -> None:
    """Whether the vectors are what the distance is computed from.

    Raises:
        UsageError: if a support lacks or is too much, the row is wider than `top`, or a value is
            no log-probability.
    """
    partial = distance.space == "top_log_probability"
    if partial != (embeddings.support is not None):
        given = "without" if embeddings.support is None else "with"
        need = "top log-probabilities and their classes" if partial else f"{distance.space} vectors"
        raise UsageError(
            f"{distance.name} got embeddings {given} support; it is computed from {need}"
        )
    if distance.space == "embedding":
        return
    if partial and embeddings.vectors.shape[1] > distance.top:
        raise UsageError(
            f"{distance.name} compares {distance.top} classes and got {embeddings.vectors.shape[1]}"
            " a sample; give the largest ones only"
        )
    largest = embeddings.vectors.max(initial=-np.inf)
    if largest > _LARGEST_LOG_PROBABILITY:
        raise UsageError(
            f"{distance.name} is computed from log-probabilities, which are at most 0, and got "
            f"{largest:g}; give log_softmax of the classifier's logits, not embeddings"
        )
