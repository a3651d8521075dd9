"""Damaged training images: replaced by others of their class, counted, listed; too many refused.

Everything here is of one worker. What replaces an image is a pure function of the seed, the step
and the position, so that any layout trains on the same pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import get_args

import numpy as np
import torch

from dist_dml.data.batch_making import BadImage, Batch, BatchMaker, Made
from dist_dml.data.faults import BadKind, BadSample, StorageFault
from dist_dml.data.index import Index
from dist_dml.data.quarantine import QuarantineEntry
from dist_dml.data.reader import bad_sample_error, storage_error
from dist_dml.data_config import DataConfig
from dist_dml.errors import RunError
from dist_dml.keyed_random import generator, key_of

KINDS: tuple[str, ...] = (*get_args(BadKind), "no_replacement")
"""What `Damage.counts` has an entry for, in this order."""
# Images read before a share of damaged ones says anything.
_ENOUGH_IMAGES = 1000
# Members of a class that are tried in the place of a damaged one.
_MOST_TRIED = 16


class Damage:
    """The damaged images that this worker has met in this run.

    Attributes:
        num_images: training images that were asked for.
        counts: damaged ones by kind; `no_replacement` counts rows that stayed without an image.
        entries: each damaged image once.
    """

    def __init__(
        self, index: Index, sample_ids: np.ndarray, config: DataConfig, seed: int, ignored: int
    ) -> None:
        """
        Args:
            index: the data set.
            sample_ids: the samples that are trained on: where replacements come from.
            config: strictness and limits.
            seed: of the replacements.
            ignored: label of a row that the loss leaves out.
        """
        self._index, self._sample_ids, self._config = index, sample_ids, config
        self._seed, self._ignored = seed, ignored
        self._in_a_row = 0
        self.num_images = 0
        self.counts: Counter[str] = Counter()
        self.entries: dict[int, QuarantineEntry] = {}

    def mend(self, made: Made, maker: BatchMaker) -> Batch:
        """The batch with every damaged image replaced by another of its class.

        Where none of the class can be read, the row stays black and gets the ignored label, which
        the loss leaves out: one bad class does not end a run over millions.

        Raises:
            RunError: an image is damaged under `data.strict`, there are too many, or the storage
                failed, which nothing replaces.
        """
        if made.fault:
            raise storage_error(self._index, made.fault_sample, made.fault)
        self._count(len(made.batch.labels), made.bad)
        if not made.bad:
            return made.batch
        batch = made.batch
        images, labels = batch.images.clone(), batch.labels.clone()
        mirrored, sample_ids = batch.mirrored.clone(), batch.sample_ids.clone()
        for bad in made.bad:
            found = self._replacement(bad, batch, maker)
            if found is None:
                self.counts["no_replacement"] += 1
                labels[bad.row] = self._ignored
                continue
            sample_ids[bad.row], view, mirrored[bad.row] = found
            images[bad.row] = torch.from_numpy(view.transpose(2, 0, 1).copy())
        return replace(
            batch,
            images=images,
            labels=labels,
            mirrored=mirrored,
            sample_ids=sample_ids,
            readable=torch.ones_like(batch.readable),
        )

    def _count(self, num_rows: int, bad: Sequence[BadImage]) -> None:
        self.num_images += num_rows
        before = 0
        for image in bad:
            self._in_a_row = self._in_a_row + 1 if image.row == before else 1
            before = image.row + 1
            self._note(image)
            if self._config.strict:
                raise bad_sample_error(self._index, image.sample_id, image.reason)
            self._refuse_too_many(image)
        if before < num_rows:
            self._in_a_row = 0

    def _note(self, image: BadImage) -> None:
        self.counts[image.kind] += 1
        self.entries.setdefault(
            image.sample_id,
            QuarantineEntry.of(self._index, image.sample_id, image.kind, image.reason),
        )

    def _refuse_too_many(self, image: BadImage) -> None:
        config, total = self._config, sum(self.counts[kind] for kind in get_args(BadKind))
        if self._in_a_row >= config.max_bad_in_a_row:
            what = f"{self._in_a_row} images in a row"
            key = f"data.max_bad_in_a_row={config.max_bad_in_a_row}"
        elif self.num_images >= _ENOUGH_IMAGES and total > config.max_bad_share * self.num_images:
            what = f"{total:,} of {self.num_images:,} images"
            key = f"data.max_bad_share={config.max_bad_share}"
        else:
            return
        last = bad_sample_error(self._index, image.sample_id, image.reason)
        raise RunError(
            f"{what} are damaged, more than {key} allows; the last: {last}; "
            f"`dist-dml verify {self._index.folder} --fix` lists and leaves out all of them"
        )

    def _replacement(
        self, bad: BadImage, batch: Batch, maker: BatchMaker
    ) -> tuple[int, np.ndarray, bool] | None:
        """Sample id and view of another member of the class; None if none can be read."""
        members = self._members(int(batch.labels[bad.row]))
        position = int(batch.positions[bad.row])
        key = key_of(self._seed, "replacement", batch.step, position)
        for member in members[generator(key).permutation(len(members))][:_MOST_TRIED].tolist():
            if member == bad.sample_id:
                continue
            index = self._index
            columns = (index.shard, index.offset, index.size, index.checksum)
            place = [int(column[member]) for column in columns]
            try:
                return member, *maker.view(place, batch.step, position)
            except BadSample as error:
                self._note(BadImage(bad.row, member, error.kind, error.reason))
            except StorageFault as error:
                raise storage_error(index, member, str(error)) from None
        return None

    def _members(self, class_id: int) -> np.ndarray:
        classes, order = self._by_class
        first, last = np.searchsorted(classes, [class_id, class_id + 1])
        return self._sample_ids[order[first:last]]

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """The samples in the order of their classes, made when the first damaged image is met."""
        classes = self._index.class_id[self._sample_ids]
        order = np.argsort(classes, kind="stable")
        return classes[order], order
