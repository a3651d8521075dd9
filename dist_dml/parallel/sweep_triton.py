"""Backend of kernels for CUDA, in Triton: `class_sweeps.KernelBackend`.

The forward sweep is one launch (and one pass for norms): its programs leave statistics of their
classes, merged here. The backward sweep is, for a few thousand classes at a time, one launch of the
kernel that makes the weights' gradient and uses it, and one cuBLAS product that adds those classes'
part to the rows' gradient from operands that are still in the L2. Together 8 R n D operations.

Deterministic: no atomics. Nothing waits for the device, nothing is allocated per launch, and what
changes from step to step is read from device memory. Logits are never kept: a float32 written and
read back (8 bytes at 4.3 TB/s) takes as long as the product that it saves at D = 735 (2 D at
790 TFLOP/s), beyond the 512 features that these kernels take. Beside its results it holds n numbers
of norms (cosines), some of R x P, and a launch's part of G and of the weights.

With `TRITON_INTERPRET=1` the kernels run on CPU tensors, slowly, for tests. They compile for Hopper
(`tests/compile_triton.py`), but NOTHING IS MEASURED on a GPU yet: neither rates, nor block sizes,
nor the gaps between launches that a captured graph would close.

Dimensions: R or N rows, n classes that take part, D features, P programs of the forward sweep.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.parallel.class_sweeps import (
    GradientTarget,
    KernelClasses,
    RowCoefficients,
    SoftmaxSums,
    SweepReport,
    UpdateTarget,
)
from dist_dml.parallel.triton_blocks import (
    MOST_FEATURES,
    Blocks,
    backward_blocks,
    forward_blocks,
    launch_classes,
    padded_features,
)
from dist_dml.parallel.triton_launch import (
    BackwardLaunch,
    Buffers,
    add_product_,
    cache_bytes,
    gradient_of_labels,
    interpreted,
    merged_sums,
    num_cores,
    triton_dtype,
)

# Programs of the forward sweep for each core: the last ones leave cores idle for 1/16 of it.
_PROGRAMS_PER_CORE = 8


def triton_backend() -> TritonBackend | str:
    """The backend, or why there is none."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; it comes with the CUDA build of torch"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device"
    return TritonBackend()


class TritonBackend:
    """The two sweeps on one device; buffers are made once and kept between steps."""

    def __init__(self) -> None:
        self._buffers = Buffers()

    @property
    def pulls(self) -> bool:
        """False: on a GPU a pull would take a third product with its own sums per program."""
        return False

    def forward(
        self,
        rows: Float[Tensor, "R D"],
        columns: Int[Tensor, " R"],
        classes: KernelClasses,
        with_gap: bool,
        with_pull: bool,
        keep: bool,
    ) -> SoftmaxSums:
        """As `KernelBackend.forward`, without `pull` and `kept`: 2 R n D operations.

        Raises:
            UsageError: for rows of more than 512 features.
        """
        assert not with_pull
        from dist_dml.parallel.triton_kernels import forward_kernel

        num_rows, num_features = rows.shape
        _check_features(num_features)
        blocks = forward_blocks(num_features, classes.operand_dtype, interpreted())
        row_programs = -(-num_rows // blocks.rows)
        n, cores = classes.num_classes, num_cores(rows.device)
        programs = max(1, min(_PROGRAMS_PER_CORE * cores // row_programs, -(-n // blocks.classes)))
        span = -(-n // (programs * blocks.classes)) * blocks.classes
        programs = -(-n // span)
        planes = 5 if with_gap else 3
        partial = self._buffers.take(
            "partial", (planes, programs, num_rows), torch.float32, rows.device
        )
        kernel: Any = forward_kernel  # Triton's launch options are in no signature.
        kernel[(row_programs, programs)](
            self._buffers.operands(rows, classes.operand_dtype), columns.to(torch.int32),
            classes.weight, classes.active, self._factors(classes), classes.bias, partial,
            num_rows, n, span,
            D=num_features, BLOCK_D=blocks.features, BLOCK_R=blocks.rows, BLOCK_C=blocks.classes,
            OPERAND=triton_dtype(classes.operand_dtype), HAS_ACTIVE=classes.active is not None,
            HAS_FACTOR=classes.scale is not None, HAS_BIAS=classes.bias is not None,
            WITH_GAP=with_gap, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        return merged_sums(partial)

    def backward(
        self,
        rows: Float[Tensor, "N D"],
        columns: Int[Tensor, " N"],
        coefficients: RowCoefficients,
        classes: KernelClasses,
        num_pulled: int,
        kept: Tensor | None,
        target: GradientTarget | UpdateTarget | None,
    ) -> SweepReport:
        """As `KernelBackend.backward`: 2 N n D operations, 2 more for a target, 2 for rows.

        `filter_below` leaves tiles of rows x classes out of both gradients' products for weights;
        a class counts as left out if all its rows' tiles are. Labels' own entries always count.

        Raises:
            UsageError: for rows of more than 512 features.
        """
        device, num_features = rows.device, rows.shape[1]
        _check_features(num_features)
        n, operands = classes.num_classes, classes.operand_dtype
        blocks = backward_blocks(num_features, operands, interpreted())
        launch = BackwardLaunch(self._buffers, rows, columns, coefficients, classes, target, blocks)
        if num_pulled == 0:
            launch.run(0, n, None, None)
            return SweepReport(None, launch.bias_gradient, *launch.filtered())
        chunk = _launch_classes(classes, num_pulled, blocks, device)
        gradients = self._buffers.take("gradients", (chunk, num_pulled), operands, device)
        old_weights = None
        replaced = isinstance(target, UpdateTarget) or classes.active is not None
        if replaced or classes.weight.dtype != operands:
            old_weights = self._buffers.take("weights", (chunk, num_features), operands, device)
        row_gradient = gradient_of_labels(columns, coefficients, classes, num_pulled)
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            launch.run(start, stop, gradients, old_weights)
            used = classes.weight[start:stop]
            if old_weights is not None:
                used = old_weights[: stop - start]
            add_product_(row_gradient, gradients[: stop - start].T, used)
        return SweepReport(row_gradient, launch.bias_gradient, *launch.filtered())

    def _factors(self, classes: KernelClasses) -> Tensor | None:
        """f (n,) of cosines, by one pass over the weights."""
        from dist_dml.parallel.triton_kernels import factor_kernel

        if classes.scale is None:
            return None
        n, num_features = classes.num_classes, classes.weight.shape[1]
        padded = padded_features(num_features)
        block = max(16, 8192 // padded)
        factor = self._buffers.take("factor", (n,), torch.float32, classes.weight.device)
        factor_kernel[(-(-n // block),)](
            classes.weight, classes.active, factor, float(classes.scale), n, D=num_features,
            D_PAD=padded, HAS_ACTIVE=classes.active is not None, BLOCK_C=block,
        )  # fmt: skip
        return factor


def _launch_classes(
    classes: KernelClasses, num_pulled: int, blocks: Blocks, device: torch.device
) -> int:
    """Classes of one launch, whole blocks: `tile_classes`, or by the L2's size."""
    size = classes.operand_dtype.itemsize
    chunk = classes.tile_classes // blocks.classes * blocks.classes
    chunk = chunk or launch_classes(
        num_pulled,
        size,
        size * classes.weight.shape[1],
        num_cores(device),
        blocks.classes,
        cache_bytes(device),
    )
    return min(chunk, -(-classes.num_classes // blocks.classes) * blocks.classes)


def _check_features(num_features: int) -> None:
    """A block's weights and their gradient must fit one core."""
    if num_features > MOST_FEATURES:
        raise UsageError(
            f"classes.backend=triton takes embeddings of up to {MOST_FEATURES} features, got "
            f"{num_features}; set classes.backend=torch, or lower model.embedding_dim"
        )
