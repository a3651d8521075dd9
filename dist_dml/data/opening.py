"""The data that a configuration names, as one index and one plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_dml.credentials import expand
from dist_dml.data.folds import fold_of
from dist_dml.data.index import Index, load_index
from dist_dml.data.index_joining import join_indexes
from dist_dml.data.orders import SplitColumns
from dist_dml.data.plan import Plan, build_plan
from dist_dml.data.reader import check_storage
from dist_dml.data_config import DataConfig
from dist_dml.errors import UsageError


def open_index(config: DataConfig) -> Index:
    """The index of `data.path`, joined with those of `data.mixture` or cut to `data.fold`.

    Raises:
        UsageError: a folder is missing, not indexed or stale, is named twice, or its remote shards
            do not fit `data.storage`; `data.folds` do not fit its classes.
    """
    paths = [config.path, *(part.path for part in config.mixture)]
    places = [
        Path(expand(path, "data.mixture.path" if number else "data.path")).resolve()
        for number, path in enumerate(paths)
    ]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UsageError(
                f"data.mixture names {paths[i]} twice (data.path counts too); name each data set "
                "once and give it a weight"
            )
    splits = [config.split, *(part.split for part in config.mixture)]
    indexes = [load_index(path) for path in paths]
    joined = join_indexes(list(zip(indexes, splits, strict=True)), config.mixture_classes)
    # All remote shards of a mixture share one cache.
    check_storage(joined, config.split, config)
    return fold_of(joined, config.split, config.folds, config.fold) if config.folds else joined


def open_plan(index: Index, config: DataConfig, accumulate: int, seed: int) -> Plan:
    """The plan of the training samples of an index.

    Args:
        index: from `open_index`.
        config: order, batch size, locality, weights.
        accumulate: micro-batches of a global batch.
        seed: of the order.

    Raises:
        UsageError: the split is empty, or makes no batch of the size that is asked for.
    """
    ids = index.select(config.split)
    part = np.zeros(len(ids), np.int8) if index.part is None else index.part[ids]
    columns = SplitColumns(index.class_id[ids], index.shard[ids], part)
    return build_plan(ids, columns, config, accumulate, seed)
