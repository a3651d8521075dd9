"""The backward kernel of `sweep_triton`: logits again, both gradients' operands, the update.

A program owns a block of classes and walks all rows, as FlashAttention's backward pass walks
queries for its keys: the block's weights and their gradient stay on the chip, the weights are
updated from there, and no gradient of the weights' size exists. Norms cost nothing here, the block
being read anyway. For the rows' gradient the program leaves f G of the rows that want it, and the
weights from before their update, in two buffers that stay in the L2 for the product that follows.
No atomics: every sum has one owner and one order.

This module imports triton; import it inside functions only.

Dimensions: N rows, r of a block, n classes that take part, b of a block, D features.
"""

from typing import no_type_check

import triton
import triton.language as tl

from dist_dml.parallel.triton_kernels import LOG2_E, SMALLEST_NORM, dot, local_ids
from dist_dml.parallel.triton_update import rounded, update


@triton.jit
@no_type_check
def logit_gradient(logits, column, row, terms, columns, num_rows, has_label):
    """p, G and |factor|, of a block (b, r) but for the labels' own entries, which are 0.

    The labels' entries are added later in float32: rounded to bfloat16, p_y - 1 would lose what
    makes the gradients of a row cancel.
    """
    there = row < num_rows
    normaliser = tl.load(terms + row, mask=there, other=float("inf"))  # Of no row: p = 0.
    factor = tl.load(terms + num_rows + row, mask=there, other=0.0)
    offset = tl.load(terms + 2 * num_rows + row, mask=there, other=0.0)
    p = tl.exp2(logits - normaliser[None, :])
    gradient = p * factor[None, :] - offset[None, :]
    if has_label:
        label = tl.load(columns + row, mask=there, other=-1)
        is_label = label[None, :] == column[:, None]
        p = tl.where(is_label, 0.0, p)
        gradient = tl.where(is_label, 0.0, gradient)
    return p, gradient, tl.abs(factor)


@triton.jit
@no_type_check
def add_labels(
    of_weight, of_bias, f, column, feature, begin, end, order, columns, terms, rows, num_rows,
    D: tl.constexpr, WITH_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Add the labels' entries of G, whose rows are `order[begin:end]`, in float32, row by row.

    Together over all programs N x b x D operations: nothing beside a sweep.
    """
    for entry in range(begin, end):
        row = tl.load(order + entry)
        value = tl.load(terms + 3 * num_rows + row)
        here = tl.where(column == tl.load(columns + row), value, 0.0)
        of_bias += here
        if WITH_WEIGHT:
            z = tl.load(rows + row * D + feature, mask=feature < D, other=0.0)
            of_weight += (here * f)[:, None] * z[None, :]
    return of_weight, of_bias


@triton.jit
@no_type_check
def use_gradient(
    of_weight, weight, target, first_state, second_state, compensation, numbers, seeds,
    apply, local, feature, is_ours,
    D: tl.constexpr, COSINE: tl.constexpr, TARGET: tl.constexpr, KIND: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLIPPED: tl.constexpr,
    STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr,
):  # fmt: skip
    """Project the gradient f a of a block (b, D) for cosines, and write, add or apply it."""
    place = local[:, None] * D + feature[None, :]
    is_feature = (feature < D)[None, :]
    mask = is_ours[:, None] & is_feature
    # Read again, from the L2: the rows' loop has the registers for itself.
    old = tl.load(weight + place, mask=is_feature, other=0.0).to(tl.float32)
    if COSINE:
        square = tl.maximum(tl.sum(old * old, 1), SMALLEST_NORM * SMALLEST_NORM)
        along = tl.sum(of_weight * old, 1) / square
        of_weight = of_weight - along[:, None] * old
    if TARGET == "update":
        may = tl.load(apply) != 0
        update(
            old, of_weight, weight, first_state, second_state, compensation, numbers, seeds,
            local, feature, is_ours & may, mask & may,
            KIND, HAS_MOMENTUM, NESTEROV, CLIPPED, STOCHASTIC, KAHAN, D,
        )  # fmt: skip
    else:
        if TARGET == "add":
            of_weight += tl.load(target + place, mask=mask, other=0.0)
        tl.store(target + place, of_weight, mask=mask)


@triton.jit(do_not_specialize=["first", "num_classes", "num_rows", "num_pulled"])
@no_type_check
def backward_kernel(
    rows, operand_rows, columns, terms, order, bounds,
    weight, active, bias, gradients, old_weights, bias_gradient, target,
    first_state, second_state, compensation, numbers, seeds, apply,
    left_out_classes, left_out_mass,
    first, num_classes, num_rows, num_pulled, scale, filter_below,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, HAS_ACTIVE: tl.constexpr, COSINE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PULLED: tl.constexpr, STORE_OLD: tl.constexpr, FILTERED: tl.constexpr, TARGET: tl.constexpr,
    KIND: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    CLIPPED: tl.constexpr, STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr,
):  # fmt: skip
    """The sweep over classes `first..` of one launch; blocks are counted from class 0.

    Args:
        rows: (N, D) float32; `operand_rows` the same as operands of products.
        columns: (N,) int32 labels' columns; `terms` (4, N): normaliser in base 2, factor, offset,
            label.
        order: (N,) rows in the order of their columns; `bounds[k]` is the first whose column is
            in block k or later.
        gradients: (launch's classes, num_pulled): f G of the last rows, if PULLED.
        old_weights: (launch's classes, D): the weights as operands, if STORE_OLD.
        target: gradient buffer for TARGET "write" and "add", unused for "update" and "none".
        apply: uint8; 0 keeps weights and state.
    """
    block = first // BLOCK_C + tl.program_id(0)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_ours = column < num_classes
    inside = tl.minimum(column, num_classes - 1)
    local = local_ids(active, inside, HAS_ACTIVE)
    feature = tl.arange(0, D_PAD)
    is_feature = (feature < D)[None, :]
    place = local[:, None] * D + feature[None, :]
    raw = tl.load(weight + place, mask=is_feature, other=0.0)
    w = rounded(raw.to(tl.float32), OPERAND)
    in_launch = (column - first).to(tl.int64)
    if STORE_OLD:
        to = old_weights + in_launch[:, None] * D + feature[None, :]
        tl.store(to, w, mask=is_ours[:, None] & is_feature)
    f = tl.full((BLOCK_C,), 1.0, tl.float32)
    if COSINE:
        squares = raw.to(tl.float32) * raw.to(tl.float32)
        f = scale / tl.maximum(tl.sqrt(tl.sum(squares, 1)), SMALLEST_NORM)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + inside) * LOG2_E
    begin = tl.load(bounds + block)
    end = tl.load(bounds + block + 1)
    has_label = end > begin

    of_weight = tl.zeros((BLOCK_C, D_PAD), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    blocks_left = 0
    mass_left = 0.0
    for start in range(0, num_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place_of_row = tl.minimum(row, num_rows - 1).to(tl.int64) * D
        z = tl.load(
            operand_rows + place_of_row[:, None] + feature[None, :], mask=is_feature, other=0.0
        )
        logits = dot(w, tl.trans(z), tl.zeros((BLOCK_C, BLOCK_R), tl.float32))
        logits = logits * (f * LOG2_E)[:, None] + shift[:, None]
        p, g, size = logit_gradient(logits, column, row, terms, columns, num_rows, has_label)
        if FILTERED:
            p = tl.where(is_ours[:, None], p, 0.0)
            skipped = tl.max(tl.max(p, 1), 0) < filter_below
            g = tl.where(skipped, 0.0, g)
            mass_left += tl.where(skipped, tl.sum(tl.sum(p * size[None, :], 1), 0), 0.0)
            blocks_left += skipped.to(tl.int32)
        of_bias += tl.sum(g, 1)
        if COSINE:
            g = g * f[:, None]
        g = rounded(g, OPERAND)
        if PULLED:
            pulled = row - (num_rows - num_pulled)
            to_row = gradients + in_launch[:, None] * num_pulled + pulled[None, :]
            tl.store(to_row, g, mask=is_ours[:, None] & ((pulled >= 0) & (row < num_rows))[None, :])
        if TARGET != "none":
            if FILTERED:
                if skipped == 0:
                    of_weight = dot(g, z, of_weight)
            else:
                of_weight = dot(g, z, of_weight)

    of_weight, of_bias = add_labels(
        of_weight, of_bias, f, column, feature, begin, end, order, columns, terms, rows, num_rows,
        D, TARGET != "none",
    )  # fmt: skip
    tl.store(bias_gradient + column, of_bias, mask=is_ours)
    if FILTERED:
        all_left = blocks_left == tl.cdiv(num_rows, BLOCK_R)
        tl.store(left_out_classes + block, tl.where(all_left, tl.sum(is_ours.to(tl.int32), 0), 0))
        tl.store(left_out_mass + block, mass_left)
    if TARGET != "none":
        use_gradient(
            of_weight, weight, target, first_state, second_state, compensation, numbers, seeds,
            apply, local, feature, is_ours,
            D, COSINE, TARGET, KIND, HAS_MOMENTUM, NESTEROV, CLIPPED, STOCHASTIC, KAHAN,
        )  # fmt: skip
