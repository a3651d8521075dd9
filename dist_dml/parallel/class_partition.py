"""Which classes a worker owns."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from dist_dml.errors import UsageError


@dataclass(frozen=True)
class ClassPartition:
    """The contiguous class ids `start..stop-1` of `num_classes`, one part of `group`'s whole.

    `group` is None where one process owns all classes.
    """

    start: int
    stop: int
    num_classes: int
    group: ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Classes of this worker (c)."""
        return self.stop - self.start

    @staticmethod
    def of_worker(
        rank: int, num_workers: int, num_classes: int, group: ProcessGroup | None = None
    ) -> ClassPartition:
        """Worker `rank`'s part; parts differ by at most one class, the first ones being larger.

        Raises:
            UsageError: if there are fewer classes than workers.
        """
        if num_classes < num_workers:
            raise UsageError(
                f"the classifier has {num_classes} classes for {num_workers} workers, and "
                f"each must own one; start at most {num_classes} workers or train on more classes"
            )
        start, stop = part_bounds(rank, num_workers, num_classes)
        return ClassPartition(start, stop, num_classes, group)


def part_bounds(rank: int, num_parts: int, length: int) -> tuple[int, int]:
    """Start and stop of part `rank` of `length` things cut into near-equal contiguous parts."""
    quotient, remainder = divmod(length, num_parts)
    start = rank * quotient + min(rank, remainder)
    return start, start + quotient + (rank < remainder)
