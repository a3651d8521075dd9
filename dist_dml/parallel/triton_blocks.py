"""Sizes of the Triton kernels' blocks, by features and bytes of an operand.

Chosen by arithmetic for Hopper (132 cores, 227 KiB of shared memory and 65,536 registers each, L2
of 50 MiB) and checked by compiling for sm_90 with triton 3.7.1. NOT MEASURED on a GPU.

What the assembler spills there (bfloat16 operands and weights, SGD with momentum): nothing in the
loops up to D = 128; per turn of the backward kernel's loop 26 words a thread at D = 256 and 11 at
512; of the forward kernel's at 512, 13. The update after the loop, once a block, spills 2 KiB a
thread at D >= 256. float32 operands spill much from D = 256 on (3 to 5 KiB): they are for checks.

Dimensions: D features, b classes and r rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Beyond it a block's weights and gradient no longer fit one core.
MOST_FEATURES = 512


class Blocks(NamedTuple):
    """Sizes of one kernel's blocks."""

    rows: int
    classes: int
    features: int
    warps: int
    stages: int


def padded_features(num_features: int) -> int:
    """The power of two that a block's features are padded to; a product needs 16."""
    return max(16, 1 << (num_features - 1).bit_length())


def forward_blocks(num_features: int, operands: torch.dtype, interpreted: bool) -> Blocks:
    """Of the forward kernel.

    bfloat16, D <= 256: rows stay on the chip and only weights are read, so that a byte from the L2
    serves r = 128 multiplications; blocks of weights are fetched 2 or 3 ahead. D = 512: rows would
    leave no room for that, and a plain product in slices of 64 features is best, with larger blocks
    because both operands are read: 85 multiplications a byte. float32 runs on the ordinary units,
    whose blocks are small.
    """
    padded = padded_features(num_features)
    if interpreted:  # Several blocks each way in small tests.
        return Blocks(64, 128, min(padded, 64), 4, 1)
    if operands.itemsize == 4:
        return Blocks(64, 64, min(padded, 32), 8, 2)
    if padded <= 128:
        return Blocks(128, 128, padded, 8, 3)
    return Blocks(128, 128, 256, 8, 2) if padded == 256 else Blocks(128, 256, 64, 8, 3)


def backward_blocks(num_features: int, operands: torch.dtype, interpreted: bool) -> Blocks:
    """Of the backward kernel.

    The gradient of a block, b x D float32, lives in registers: 64 a thread at 128 x 128, 128 at
    128 x 256 and 64 x 512. Rows are read by every block: 2b multiplications a byte of the L2.
    """
    padded = padded_features(num_features)
    if interpreted:
        return Blocks(64, 128, padded, 4, 1)
    if operands.itemsize == 4:
        return Blocks(32, max(16, min(64, 8192 // padded)), padded, 8, 1)
    if padded <= 256:
        return Blocks(64, 128, padded, 8, 3 if padded <= 128 else 2)
    return Blocks(64, 64, padded, 8, 2)


def launch_classes(
    num_pulled: int, row_bytes: int, class_bytes: int, cores: int, block: int, cache_bytes: int
) -> int:
    """Classes of one launch of the backward kernel where rows want their gradient.

    What it leaves for the product that follows (per class: `num_pulled` entries of `row_bytes` and
    its weights, `class_bytes`) should still be in the L2: 40% of it, as the weights' own state
    streams through. But each core gets a block: an idle half of the machine costs as much as
    the spill at D = 128 (both about 0.95 ps a logit: 4 bytes at 4.3 TB/s, 6 D at 790 TFLOP/s), and
    four times as much at D = 512.
    """
    wave = cores * block
    within = int(0.4 * cache_bytes) // (num_pulled * row_bytes + class_bytes)
    return max(1, within // wave) * wave
