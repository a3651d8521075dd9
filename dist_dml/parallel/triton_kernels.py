"""The forward kernels of `sweep_triton`: norms, and products with online statistics.

Sums of exponentials are taken to base 2 (`ex2` is what the hardware has): logits are scaled by
log2(e) with the factor of their column, which costs nothing, and `x - largest` is the exponent as
it is. At D = 128 a Hopper core's arithmetic units have about 8 operations a logit beside the tensor
cores' product (4.2e3 operations a clock against 128 lanes), so each one counts: what labels and the
last, uneven block need is in a branch that nearly no block takes.

Offsets into weights and rows are 64-bit: 10^8 classes of 128 features do not fit 32.

This module imports triton; import it inside functions only.

Dimensions: R rows, r of a block, n classes that take part, b of a block, D features.
"""

from typing import no_type_check

import triton
import triton.language as tl

from dist_dml.parallel.triton_update import INTERPRETED, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
# What `rival` starts from, in base 2: small, but differences of it stay finite.
NO_RIVAL = tl.constexpr(-8.5e37)
SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
@no_type_check
def dot(a, b, c):
    """a @ b + c in float32.

    "ieee": float32 operands are not cut to TF32's 10 bits, by which logits of 64 would be off by
    0.06; it runs at the rate of the ordinary units, so bfloat16 operands are the fast choice.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
@no_type_check
def local_ids(active, column, HAS_ACTIVE: tl.constexpr):
    """Rows of weights (b,) int64 of the classes that take part: read in place, never gathered."""
    if HAS_ACTIVE:
        return tl.load(active + column)
    return column.to(tl.int64)


@triton.jit(do_not_specialize=["num_classes"])
@no_type_check
def factor_kernel(
    weight, active, factor, scale, num_classes,
    D: tl.constexpr, D_PAD: tl.constexpr, HAS_ACTIVE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """factor[j] = scale / |w_j|: one pass over the weights, n numbers."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < num_classes
    local = local_ids(active, tl.minimum(column, num_classes - 1), HAS_ACTIVE)
    feature = tl.arange(0, D_PAD)
    place = weight + local[:, None] * D + feature[None, :]
    w = tl.load(place, mask=(feature < D)[None, :], other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(w * w, 1)), SMALLEST_NORM)
    tl.store(factor + column, scale / norm, mask=inside)


@triton.jit
@no_type_check
def forward_logits(
    rows, place_of_row, weight, local, whole_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """z w of a block (r, b), without factor and bias."""
    logits = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        inside = (feature < D)[None, :]
        place = weight + local[:, None] * D + feature[None, :]
        w = rounded(tl.load(place, mask=inside, other=0.0).to(tl.float32), OPERAND)
        z = whole_rows
        if BLOCK_D < D:
            z = tl.load(rows + place_of_row[:, None] + feature[None, :], mask=inside, other=0.0)
        logits = dot(z, tl.trans(w), logits)
    return logits


@triton.jit(do_not_specialize=["num_rows", "num_classes", "span"])
@no_type_check
def forward_kernel(
    rows, columns, weight, active, factor, bias, partial, num_rows, num_classes, span,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, WITH_GAP: tl.constexpr,
):  # fmt: skip
    """Label, rival, mass, gap and count of `span` classes into partial[:, program, row], base 2.

    `span` is a multiple of BLOCK_C, so that only the last block of all is uneven.

    Programs of the same classes and other rows are neighbours on the first axis, so that a block of
    weights comes from HBM once and then from the L2. Each walks its blocks of classes with its rows
    kept on the chip (D <= BLOCK_D), or both read in slices of BLOCK_D features.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    place_of_row = tl.minimum(row, num_rows - 1).to(tl.int64) * D
    label_column = tl.load(columns + tl.minimum(row, num_rows - 1))
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, num_classes)
    feature = tl.arange(0, BLOCK_D)
    whole_rows = tl.load(
        rows + place_of_row[:, None] + feature[None, :], mask=(feature < D)[None, :], other=0.0
    )
    label = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    rival = tl.full((BLOCK_R,), NO_RIVAL, tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    gap = tl.zeros((BLOCK_R,), tl.float32)
    count = tl.zeros((BLOCK_R,), tl.float32)
    for begin in range(first, stop, BLOCK_C):
        column = begin + tl.arange(0, BLOCK_C)
        # Beyond the end the last class is read again and masked: loads stay whole.
        inside = tl.minimum(column, stop - 1)
        local = local_ids(active, inside, HAS_ACTIVE)
        logits = forward_logits(
            rows, place_of_row, weight, local, whole_rows, D, BLOCK_D, BLOCK_R, BLOCK_C, OPERAND
        )
        if HAS_FACTOR:
            logits = logits * (tl.load(factor + inside) * LOG2_E)[None, :]
        else:
            logits = logits * LOG2_E
        if HAS_BIAS:
            logits = logits + (tl.load(bias + inside) * LOG2_E)[None, :]
        hit = (label_column >= begin) & (label_column < begin + BLOCK_C)
        if (begin + BLOCK_C > stop) | (tl.max(hit.to(tl.int32), 0) > 0):
            beyond = (column >= stop)[None, :]
            is_label = label_column[:, None] == column[None, :]
            label = tl.maximum(label, tl.max(tl.where(is_label, logits, float("-inf")), 1))
            logits = tl.where(is_label | beyond, float("-inf"), logits)
        largest = tl.maximum(rival, tl.max(logits, 1))
        mass = mass * tl.exp2(rival - largest) + tl.sum(tl.exp2(logits - largest[:, None]), 1)
        if WITH_GAP:
            other = logits > float("-inf")
            own = tl.sum(tl.where(other, largest[:, None] - logits, 0.0), 1)
            gap += count * (largest - rival) + own
            count += tl.sum(other.to(tl.float32), 1)
        rival = largest
    place = tl.program_id(1).to(tl.int64) * num_rows + row
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    written = row < num_rows
    tl.store(partial + place, label, mask=written)
    tl.store(partial + plane + place, rival, mask=written)
    tl.store(partial + 2 * plane + place, mass, mask=written)
    if WITH_GAP:
        tl.store(partial + 3 * plane + place, gap, mask=written)
        tl.store(partial + 4 * plane + place, count, mask=written)
