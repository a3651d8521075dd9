"""From a model to the embeddings of a split: every worker embeds, and keeps, its slice.

Whoever needs a whole split gathers it, on the first worker where that is enough: a search among
all images does not need it (`retrieval/sharded_gallery.py`).

Dimensions: `N` images of a split, embeddings of width `D`, W workers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.data.loader import evaluation_batches
from dist_dml.data.plan import worker_slice
from dist_dml.engine import autocast
from dist_dml.errors import RunError
from dist_dml.models.embedder import Embedder
from dist_dml.parallel.collectives import gather_objects, gather_to_first, gather_uneven
from dist_dml.parallel.world import World
from dist_dml.retrieval.embeddings import Embeddings

Embed = Callable[[Tensor], Tensor]
_BLOCK_BYTES = 2**26
"""Of one worker's rows on their way to the first."""


def embed_with(embedder: Embedder, config: Config, world: World) -> Embed:
    """Retrieval features of uint8 images, under the precision of training, without dropout."""

    def embed(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(config, world.device):
            return embedder(images.to(world.device, non_blocking=True))

    return embed


def embed_pixels(images: Tensor) -> Tensor:
    """The baseline without a network: the image itself as a vector."""
    return images.flatten(1).float() / 255


def embed_slice(embed: Embed, index: Index, split: str, config: Config, world: World) -> Embeddings:
    """Embeddings of this worker's slice of a split; called by all workers.

    Damaged images are left out, never replaced. Costs one pass over the slice.

    Raises:
        RunError: on every worker, if no image of the split can be read.
    """
    ids = index.select(split)
    mine = ids[worker_slice(len(ids), world.rank, world.size)]
    batches = evaluation_batches(
        index, split, config.data, config.evaluation.batch_size, world.rank, world.size
    )
    parts, readable = [], []
    for batch in batches:
        parts.append(embed(batch.images).float().cpu().numpy())
        readable.append(batch.readable.numpy())
    if not parts:  # More workers than images: learn the width from a blank one.
        image = config.data.image
        blank = torch.zeros(1, image.channels, image.size, image.size, dtype=torch.uint8)
        parts, readable = [embed(blank).float().cpu().numpy()[:0]], [np.zeros(0, dtype=bool)]
    kept = np.concatenate(readable).astype(bool)
    if not any(gather_objects(bool(kept.any()), world.group)):
        raise RunError(
            f"none of the {len(ids)} images of split {split} can be read; `dist-dml verify "
            f"{index.folder}` tells why"
        )
    mine = mine[kept].astype(np.int64)
    return Embeddings(np.concatenate(parts)[kept], index.class_id[mine], mine)


def embed_split(embed: Embed, index: Index, split: str, config: Config, world: World) -> Embeddings:
    """Embeddings of a whole split, on every worker; each embeds its slice.

    As `embed_slice`, and an all-gather of the embeddings: N * D * 4 bytes a worker.
    """
    return everywhere(embed_slice(embed, index, split, config, world), index, world)


def everywhere(mine: Embeddings, index: Index, world: World) -> Embeddings:
    """All workers' embeddings, in worker order, on every worker."""
    if world.size == 1:
        return mine
    counts = tuple(gather_objects(len(mine), world.group))
    sent = torch.from_numpy(mine.vectors).to(world.device)
    vectors = gather_uneven(sent, counts, world.group).cpu().numpy()
    return Embeddings(vectors, *_of_rows(mine, index, world))


def on_first(mine: Embeddings, index: Index, world: World) -> Embeddings | None:
    """All workers' embeddings, in worker order, on the first worker; None on the others.

    Rows travel in blocks of 64 MiB a worker.
    """
    if world.size == 1:
        return mine
    counts = gather_objects(len(mine), world.group)
    labels, ids = _of_rows(mine, index, world)
    step = max(1, _BLOCK_BYTES // (4 * max(1, mine.vectors.shape[1])))
    # Straight to their places: a second copy of the whole would double what it takes.
    width = mine.vectors.shape[1]
    whole = np.empty((len(ids) if world.is_first else 0, width), dtype=np.float32)
    ends = np.cumsum(counts)
    for start in range(0, max(counts), step):
        part = torch.from_numpy(mine.vectors[start : start + step]).to(world.device)
        sizes = tuple(max(0, min(step, count - start)) for count in counts)
        received = gather_to_first(part, sizes, world.group)
        for worker, rows in enumerate(received):
            at = ends[worker] - counts[worker] + start
            whole[at : at + len(rows)] = rows.cpu().numpy()
    return Embeddings(whole, labels, ids) if world.is_first else None


def _of_rows(mine: Embeddings, index: Index, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Labels and ids of all workers' rows."""
    ids = np.concatenate(gather_objects(mine.ids, world.group))
    return index.class_id[ids], ids
