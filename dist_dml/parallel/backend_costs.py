"""How well each backend of sweeps uses a machine: constants of the cost model, not measurements.

What they predict is compared with real steps by `dist-dml estimate --validate`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """How well a backend uses a machine.

    Attributes:
        name: as in `classes.backend`.
        share: of the machine's rate of matrix products that its sweeps reach.
        forward_reads: float32 numbers only read for each logit of a forward sweep, outside
            products; `backward_reads` of a backward sweep.
        forward_updates: numbers read and written back, each counted as two; `backward_updates`.
        logit_roundings: of a forward sweep, numbers for each logit that change between float32 and
            bfloat16, where the products' operands are rounded; of a backward sweep.
        weight_roundings: the same for each class weight.
        weight_updates: numbers read and written for each weight while its tile is updated, beside
            the traffic that brings and takes it.
        operations: operations that are started for each tile of a forward and a backward sweep.
        logit_bytes: bytes of a logit in a tile's buffer.
        keeps: whether it can keep logits.
        chunks: whether it can cut rows; otherwise it does so inside a kernel, at no cost.
        pulls: whether dL/dz comes out of the forward sweep.
        of_core: whether each core works on tiles of its own.
        hidden: share of what is smaller among products, exponentials and passes that runs beside
            the largest.
        overlap: share of the traffic of weights and state that runs beside the computation.
    """

    name: str
    share: float
    forward_reads: float
    forward_updates: float
    backward_reads: float
    backward_updates: float
    logit_roundings: tuple[float, float]
    weight_roundings: tuple[float, float]
    weight_updates: float
    operations: tuple[int, int]
    logit_bytes: int
    keeps: bool
    chunks: bool
    pulls: bool
    of_core: bool
    hidden: float
    overlap: float


BACKENDS: dict[str, Backend] = {
    # Counted in `torch_sweeps`, `CrossEntropy` and `class_update`. Forward: bias or factor,
    # difference, exponential; maximum and sum are read. Backward: bias or factor, difference,
    # exponential, rows' factor; the bias's gradient is read. Update: momentum twice, weight once.
    "torch": Backend(
        name="torch",
        share=1.0,
        forward_reads=2,
        forward_updates=6,
        backward_reads=1,
        backward_updates=8,
        logit_roundings=(1, 3),
        weight_roundings=(1, 2),
        weight_updates=8,
        operations=(90, 90),
        logit_bytes=4,
        keeps=True,
        chunks=True,
        pulls=False,
        of_core=False,
        hidden=0.0,
        overlap=0.0,
    ),
    # Fused: logits stay in the caches of a core. Its products go faster than `torch.mm`'s on tiles
    # with D = 128 and 256; 1.15 lies between the shapes measured with one AMX core, 2026-11
    # (docs/estimate.md). Traffic adds up in full at 16 rows and hardly at 256.
    "native": Backend(
        name="native",
        share=1.15,
        forward_reads=0,
        forward_updates=0,
        backward_reads=0,
        backward_updates=0,
        logit_roundings=(0, 0),
        weight_roundings=(0, 0),
        weight_updates=0,
        operations=(1, 1),
        logit_bytes=4,
        keeps=True,
        chunks=True,
        pulls=True,
        of_core=True,
        hidden=0.0,
        overlap=0.5,
    ),
    # Fused, and assumed: dL/ds leaves the chip once, as bfloat16, for two products.
    "triton": Backend(
        name="triton",
        share=0.9,
        forward_reads=0,
        forward_updates=0,
        backward_reads=1,
        backward_updates=0.5,
        logit_roundings=(0, 0),
        weight_roundings=(0, 0),
        weight_updates=0,
        operations=(0, 2),
        logit_bytes=2,
        keeps=False,
        chunks=False,
        pulls=False,
        of_core=False,
        hidden=0.5,
        overlap=0.9,
    ),
}
