"""New proxies when the algorithm asks for them: the pool of each class, and the choice from it.

Each worker embeds images of its own classes only, so that a pool needs no exchange. Which image of
a class, and how it is augmented, is drawn by seed, problem, draw and class id.

Dimensions: c classes of this worker, b places of a class's pool, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.config import Config
from dist_dml.data.batch_making import Batch, BatchMaker, Request
from dist_dml.data.damage import Damage
from dist_dml.data.index import Index
from dist_dml.data.progress import ProgressLine
from dist_dml.data.reader import open_reader
from dist_dml.keyed_random import key_of, keyed_uniform, row_keys
from dist_dml.losses.ccp_states import PoolDrawn
from dist_dml.models.embedder import Embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.proxy_head import ProxyHead
from dist_dml.parallel.world import World
from dist_dml.split_embedding import Embed, embed_with

# Of images without any that can be read in their class.
_NONE = -1


def prepare_proxies(
    head: ProxyHead,
    embedder: Embedder,
    index: Index,
    sample_ids: Int[np.ndarray, " n"],
    config: Config,
    world: World,
) -> bool:
    """Before each step, by all workers together: choose new proxies if a problem is to begin.

    Without one it costs nothing. With passes it embeds b images of each class of this worker, with
    the live weights in inference mode.

    Args:
        head: the proxies.
        embedder: the live one; left in training mode.
        index: the data set.
        sample_ids: the samples that are trained on.
        config: of the run.
        world: the workers.

    Returns:
        Whether there are new proxies.

    Raises:
        RunError: the storage failed, or too many images are damaged.
    """
    phases = head.phases
    if not phases.choosing:
        return False
    problem, plan = phases.state.problem, phases.plan
    if head.bank is not None and plan.from_bank(problem):
        rows, filled = head.bank.rows, head.bank.filled
    else:
        embedder.eval()
        embed = embed_with(embedder, config, world)
        rows, filled = _pool_by_passes(embed, head, index, sample_ids, config, problem, world)
        embedder.train()
    # A checkpoint lies between steps: a resumed run begins a pool anew.
    for _ in range(plan.draws_at(problem) - phases.state.draws):
        phases.advance(PoolDrawn())
    head.choose(rows, filled)
    return True


def _pool_by_passes(
    embed: Embed,
    head: ProxyHead,
    index: Index,
    sample_ids: Int[np.ndarray, " n"],
    config: Config,
    problem: int,
    world: World,
) -> tuple[Float[Tensor, "c b D"], Bool[Tensor, "c b"]]:
    """Embeddings of b augmented images of each class of this worker, and which there are."""
    partition, places = head.partition, head.phases.plan.pool_places
    shape = (partition.size, places)
    rows = torch.zeros(*shape, head.proxies.shape[2], dtype=head.proxies.dtype, device=head.device)
    filled = torch.zeros(*shape, dtype=torch.bool, device=head.device)
    progress = None
    if world.is_first:
        label = f"pool of proxies {problem + 1}"
        progress = ProgressLine(label, partition.size * places, "images")
    for draw, batch in _pool_batches(index, sample_ids, config, partition, problem, places):
        at = (batch.positions - partition.start).to(head.device)
        rows[at, draw] = embed(batch.images).to(rows)
        filled[at, draw] = (batch.labels != _NONE).to(head.device)
        if progress is not None:
            progress.advance(len(batch.labels))
    if progress is not None:
        progress.finish()
    return rows, filled


def _pool_batches(
    index: Index,
    sample_ids: Int[np.ndarray, " n"],
    config: Config,
    partition: ClassPartition,
    problem: int,
    places: int,
) -> Iterator[tuple[int, Batch]]:
    """The images, by draw; a batch's positions are the class ids."""
    classes, members = members_of(index.class_id[sample_ids], sample_ids, partition)
    seed = config.run.seed
    reader = open_reader(index, config.data.image.channels, config.data.storage)
    # The seed, draw and class id are the key of an image's augmentation.
    maker = BatchMaker(reader, config.data, key_of(seed, "proxy augment", problem), False)
    damage = Damage(index, sample_ids, config.data, seed, _NONE)
    for draw in range(places):
        chosen = drawn_members(members, classes, seed, problem, draw)
        for start in range(0, len(classes), config.evaluation.batch_size):
            part = slice(start, start + config.evaluation.batch_size)
            ids = chosen[part]
            columns = (index.shard, index.offset, index.size, index.checksum)
            stored = np.stack([column[ids].astype(np.int64) for column in columns], axis=1)
            labels = index.class_id[ids].astype(np.int64)
            request = Request(ids, classes[part], labels, stored, (len(ids),), draw, 0)
            yield draw, damage.mend(maker[request], maker)


def members_of(
    class_ids: Int[np.ndarray, " n"], sample_ids: Int[np.ndarray, " n"], partition: ClassPartition
) -> tuple[Int[np.ndarray, " m"], list[Int[np.ndarray, "_"]]]:
    """This worker's classes that have samples, and the samples of each.

    Args:
        class_ids: of the samples.
        sample_ids: the samples that are trained on.
        partition: this worker's classes.
    """
    own = np.flatnonzero((class_ids >= partition.start) & (class_ids < partition.stop))
    own = own[np.lexsort((sample_ids[own], class_ids[own]))]
    classes, first = np.unique(class_ids[own], return_index=True)
    parts = np.split(sample_ids[own].astype(np.int64), first[1:]) if len(classes) else []
    return classes.astype(np.int64), parts


def drawn_members(
    members: list[Int[np.ndarray, "_"]],
    classes: Int[np.ndarray, " m"],
    seed: int,
    problem: int,
    draw: int,
) -> Int[np.ndarray, " m"]:
    """One sample of each class, drawn by seed, problem, draw and class id: with replacement."""
    keys = row_keys(key_of(seed, "proxy pool", problem, draw), torch.from_numpy(classes))
    shares = keyed_uniform(keys, 1)[:, 0].double().numpy()
    pairs = zip(members, shares, strict=True)
    return np.array([of[int(share * len(of))] for of, share in pairs], np.int64)
