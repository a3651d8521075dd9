"""Rows against proxies sharded by class: what stays the same for all tiles, and their size.

Dimensions: B rows of all workers, c classes of this worker, K proxies of a class, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import Comparison
from dist_dml.losses.proxy_rules import ProxyRule
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.pair_parallel import NUMBERS_A_PAIR

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ProxyProblem:
    """What stays the same for all tiles.

    Attributes:
        rules: whose losses are added up, each with its own mean: C2's two parts. All compare alike.
        transform: of rows and proxies before they are compared.
        partition: the classes of this worker.
        row_counts: rows of every worker.
        block_mebibytes: of the tensors of rows x proxies, taken to be `NUMBERS_A_PAIR`.
        ignored: label of rows that take no part.
    """

    rules: tuple[ProxyRule, ...]
    transform: Transform
    partition: ClassPartition
    row_counts: tuple[int, ...]
    block_mebibytes: float
    ignored: int

    @property
    def comparison(self) -> Comparison:
        """Of all rules."""
        return self.rules[0].comparison

    def counted(self, labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Rows that take part."""
        return labels != self.ignored

    def block_sizes(
        self, rows: Float[Tensor, "B D"], proxies: Float[Tensor, "c K D"]
    ) -> tuple[int, int]:
        """See the function."""
        num_classes, per_class, _ = proxies.shape
        return block_sizes(
            len(rows), num_classes, per_class, self.block_mebibytes, rows.element_size()
        )


def block_sizes(
    num_rows: int, num_classes: int, per_class: int, block_mebibytes: float, element_size: int
) -> tuple[int, int]:
    """Rows and classes of a block whose `NUMBERS_A_PAIR` numbers a pair fit the budget.

    Raises:
        UsageError: if the budget cannot hold one row against the proxies of one class.
    """
    pairs = int(block_mebibytes * 2**20 / (NUMBERS_A_PAIR * element_size))
    if pairs < per_class:
        least = NUMBERS_A_PAIR * element_size * per_class / 2**20
        raise UsageError(
            f"loss.block_mebibytes={block_mebibytes:g} cannot hold one row against {per_class} "
            f"proxies; set it to {math.ceil(least * 1000) / 1000:g} or more"
        )
    wide = pairs // max(1, num_classes * per_class)
    rows = max(1, min(num_rows, max(wide, math.isqrt(pairs)), pairs // per_class))
    return rows, max(1, min(num_classes, pairs // (rows * per_class)))
