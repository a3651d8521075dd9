"""The vectors of the splits that an evaluation compares, each made once.

Embeddings stay on the worker that computed them until somebody needs the whole split.
Log-probabilities of classes need all rows on every worker, because the classes are divided.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.parallel.class_scores import log_probabilities, top_log_probabilities
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World
from dist_dml.retrieval.distances import Distance, named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.split_embedding import Embed, embed_slice, everywhere, on_first

Key = tuple[str, str, int]
"""Split, space and number of kept classes."""


def key_of(split: str, distance: Distance) -> Key:
    """Under which a split's vectors for a distance are kept."""
    return split, distance.space, distance.top


@dataclass(frozen=True)
class Model:
    """What is measured: images to embeddings and, where there is one, the classifier behind."""

    embed: Embed
    classifier: ClassParallelClassifier | None = None


@dataclass(frozen=True)
class SplitVectors:
    """Makes and keeps vectors; every method is called by all workers together."""

    model: Model
    index: Index
    config: Config
    world: World
    left_out: dict[str, int] = field(default_factory=dict)
    """Damaged images of each split that was embedded, of all workers."""
    _mine: dict[str, Embeddings] = field(default_factory=dict)
    _everywhere: dict[Key, Embeddings] = field(default_factory=dict)
    _first: dict[Key, Embeddings | None] = field(default_factory=dict)

    def mine(self, split: str) -> Embeddings:
        """Embeddings of this worker's slice."""
        if split not in self._mine:
            made = embed_slice(self.model.embed, self.index, split, self.config, self.world)
            readable = sum(gather_objects(len(made), self.world.group))
            self.left_out[split] = len(self.index.select(split)) - readable
            self._mine[split] = made
        return self._mine[split]

    def everywhere(self, split: str, distance: Distance) -> Embeddings:
        """What the distance compares, of the whole split, on every worker."""
        key = key_of(split, distance)
        if key not in self._everywhere:
            if distance.space == "embedding":
                made = everywhere(self.mine(split), self.index, self.world)
            else:
                plain = self.everywhere(split, named_distance("l2"))
                made = _class_vectors(plain, self.model.classifier, distance)
            self._everywhere[key] = made
        return self._everywhere[key]

    def on_first(self, split: str, distance: Distance) -> Embeddings | None:
        """The same on the first worker; on the others None, unless they have it anyway."""
        key = key_of(split, distance)
        if key in self._everywhere or distance.space != "embedding":
            return self.everywhere(split, distance)
        if key not in self._first:
            self._first[key] = on_first(self.mine(split), self.index, self.world)
        return self._first[key]


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
