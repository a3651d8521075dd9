"""What new classes begin with: the directions of a few of their images, or random ones.

Dimensions: n classes, m of them with images, D features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.checkpoint import load_embedder_tensors
from dist_dml.class_mapping import NONE, ClassMapping
from dist_dml.class_store import StoredClasses
from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.data.loader import image_batches
from dist_dml.data.progress import ProgressLine
from dist_dml.keyed_random import generator, key_of
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_init import initial_rows
from dist_dml.parallel.world import Ranks, start_world
from dist_dml.split_embedding import embed_with

# Old weights whose norms tell how long a new one is.
_NORM_ROWS = 4096
# Centres of a class that begin alike would stay alike: relative to the row.
_CENTRE_NOISE = 0.01
_WEIGHT, _BIAS = "weight", "bias"


class NewRows:
    """Weights and biases that new classes begin with; all else of theirs is zeros.

    Args:
        config: of the run.
        stored: the old classes, whose norms and biases are the measure.
        mapping: which are new.
        index: the new data set.
        checkpoint: holds the embedder.
        images: of each new class, 0 for none.
    """

    def __init__(
        self,
        config: Config,
        stored: StoredClasses,
        mapping: ClassMapping,
        index: Index,
        checkpoint: Path,
        images: int,
    ) -> None:
        self._config, self._stored = config, stored
        self._directions: Float[Tensor, "n D"] | None = None
        self._place = np.full(len(mapping.source), NONE, np.int64)
        if _WEIGHT not in stored.layout or not len(mapping.new):
            return
        sample = np.unique(np.linspace(0, stored.num_classes - 1, _NORM_ROWS).astype(np.int64))
        rows = stored.take(_WEIGHT, sample).float()
        self._norm = float(rows.norm(dim=-1).mean())
        self._bias = float(stored.take(_BIAS, sample).mean()) if _BIAS in stored.layout else 0.0
        if images > 0:
            found, self._directions = class_directions(
                config, index, mapping.new, images, checkpoint
            )
            self._place[found] = np.arange(len(found))

    def rows(self, key: str, ids: Int[np.ndarray, " n"]) -> Tensor | None:
        """Of new classes; None for what begins with zeros."""
        dtype, shape = self._stored.layout[key]
        if key == _BIAS:
            return torch.full((len(ids),), self._bias, dtype=dtype)
        if key != _WEIGHT:
            return None
        # As a training that begins would draw them, but as long as the trained ones.
        std, seed = self._config.loss.init_std or 1.0, self._config.run.seed
        drawn = initial_rows(torch.from_numpy(ids), int(np.prod(shape)), std, seed)
        drawn = F.normalize(drawn.unflatten(1, shape), dim=-1)
        known = self._place[ids] != NONE
        if self._directions is not None and known.any():
            at = torch.from_numpy(np.flatnonzero(known))
            found = self._directions[torch.from_numpy(self._place[ids][known])]
            if len(shape) == 2:
                found = F.normalize(found[:, None] + _CENTRE_NOISE * drawn[at], dim=-1)
            drawn[at] = found
        return (self._norm * drawn).to(dtype)


def class_directions(
    config: Config, index: Index, classes: Int[np.ndarray, " n"], images: int, checkpoint: Path
) -> tuple[Int[np.ndarray, " m"], Float[Tensor, "m D"]]:
    """The direction of the mean embedding of a few training images of each class, as unit vectors.

    Costs images * n forward passes in inference mode, in this process.

    Args:
        config: of the run.
        index: the data set.
        classes: their ids, ascending.
        images: of each class, drawn by `run.seed` and class id.
        checkpoint: holds the embedder.

    Returns:
        The classes that have readable images, and their directions.
    """
    world = start_world(config.engine, Ranks())
    embedder = build_embedder(config.model, config.data.image, config.run.seed, None)
    embedder.load_state_dict(load_embedder_tensors(checkpoint))
    embed = embed_with(embedder.to(world.device).eval(), config, world)
    samples = _few_samples(index, config, classes, images)
    # Of these classes alone: there may be many times as many others.
    sums = torch.zeros(len(classes), embedder.embedding_dim)
    counts = torch.zeros(len(classes), dtype=torch.int64)
    progress = ProgressLine("new classes", len(samples), "images")
    start = 0
    for batch in image_batches(index, samples, config.data, config.evaluation.batch_size):
        of_batch = index.class_id[samples[start : start + len(batch.images)]]
        ids = torch.from_numpy(np.searchsorted(classes, of_batch))
        start += len(batch.images)
        vectors = F.normalize(embed(batch.images).float().cpu(), dim=1)
        sums.index_add_(0, ids[batch.readable], vectors[batch.readable])
        counts.index_add_(0, ids[batch.readable], torch.ones_like(ids[batch.readable]))
        progress.advance(len(batch.images))
    progress.finish()
    found = counts > 0
    return classes[found.numpy()], F.normalize(sums[found], dim=1)


def _few_samples(
    index: Index, config: Config, classes: Int[np.ndarray, " n"], images: int
) -> Int[np.ndarray, " m"]:
    """Up to `images` training samples of each class, in the order of their classes."""
    ids = index.select(config.data.split)
    ids = ids[np.isin(index.class_id[ids], classes)]
    draw = generator(key_of(config.run.seed, "images of new classes"))
    ids = ids[draw.permutation(len(ids))]
    ids = ids[np.argsort(index.class_id[ids], kind="stable")]
    of_class = index.class_id[ids]
    nth = np.arange(len(ids)) - np.searchsorted(of_class, of_class)
    return np.ascontiguousarray(ids[nth < images])
