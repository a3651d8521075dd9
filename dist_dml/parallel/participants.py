"""Which classes of this worker take part in a step, as `classes.sample` says.

Dimensions: R rows of all workers, c classes of this worker, D features.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from dist_dml.class_config import ClassesConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.sampling import ActiveClasses, neighbour_classes, random_classes
from dist_dml.retrieval.class_index import ClassIndex, ExactClassIndex, build_class_index


class Participants:
    """Draws classes, or finds neighbours in an index that it owns.

    Args:
        partition: this worker's classes.
        classes: which of them.
        seed: of the draws.
        cosine: whether neighbours are those of the largest cosine.
    """

    def __init__(
        self, partition: ClassPartition, classes: ClassesConfig, seed: int, cosine: bool
    ) -> None:
        self._partition, self._classes, self._seed = partition, classes, seed
        self._cosine = cosine
        self._index: ClassIndex | ExactClassIndex | None = None

    def of_step(self, labels: Int[Tensor, " R"], weight: Tensor, step: int) -> ActiveClasses | None:
        """The classes of a step, None for all; called by all workers together.

        Args:
            labels: of all rows, global class ids.
            weight: (c, D), or (c, K, D) where all take part.
            step: steps done before.
        """
        classes = self._classes
        if classes.sample == "all":
            return None
        if classes.sample == "random":
            return random_classes(
                labels,
                self._partition,
                classes.sample_rate,
                classes.sample_correction,
                self._seed,
                step,
                weight.device,
            )
        if self._index is None:
            self._index = build_class_index(weight, self._cosine, classes.rebuild_steps, step)
        self._index.advance(step, weight)
        return neighbour_classes(
            labels, weight, self._index.search, self._partition, classes.num_neighbours
        )

    @property
    def waited_seconds(self) -> float | None:
        """How long steps have waited for the index; None without one."""
        return None if self._index is None else self._index.waited_seconds

    def close(self) -> None:
        """End the thread that rebuilds the index, if there is one."""
        if self._index is not None:
            self._index.close()
