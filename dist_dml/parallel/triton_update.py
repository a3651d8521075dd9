"""In-place updates of a block of class weights, as device functions of the backward kernel.

They are `class_sweeps.ClassStep` in float32. This module imports triton; import it inside functions
only. No annotations of strings: Triton reads them as objects.

Dimensions: b classes of a block, d features, padded to a power of two.
"""

import os
from typing import Any, no_type_check

import triton
import triton.language as tl

# Triton's interpreter on a CPU converts float32 to bfloat16 by cutting (or wrongly, where the
# mantissa overflows), and multiplies bfloat16 matrices by their bits (checked with 3.7.1).
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Places in `numbers`, float32, in device memory: as arguments they would have Triton compile again
# wherever one of them equals 1, and a captured graph would repeat one step's values for ever.
LEARNING_RATE = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
KEPT_MOMENTUM = tl.constexpr(3)  # 0 in the first step, in which v = g.
BETA = tl.constexpr(4)
BETA_REST = tl.constexpr(5)  # 1 - beta, taken in float64: float32 would lose 4 of its digits.
BETA_SQ = tl.constexpr(6)
BETA_SQ_REST = tl.constexpr(7)
BIAS_CORRECTION = tl.constexpr(8)  # 1 / (1 - beta^t)
BIAS_CORRECTION_SQ = tl.constexpr(9)
EPSILON = tl.constexpr(10)
CLIP_NORM = tl.constexpr(11)
NUM_NUMBERS = 12


@triton.jit
@no_type_check
def nearest_bfloat16(x):
    """A float32 that is a bfloat16, to nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def rounded(x, dtype: tl.constexpr):
    """x (float32) in another dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = nearest_bfloat16(x)
    return x.to(dtype)


@triton.jit
@no_type_check
def mix(x):
    """The step of the hash, on uint32, whose products wrap round."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
@no_type_check
def random_bits(seeds, local, feature):
    """h (b, d) of `ClassStep`; `seeds` holds mix(seed ^ step) and the first global class id."""
    class_id = tl.load(seeds + 1) + local
    row = mix(tl.load(seeds).to(tl.uint32) ^ (class_id & 0xFFFFFFFF).to(tl.uint32))
    row = mix(row ^ (class_id >> 32).to(tl.uint32))
    return mix(row[:, None] ^ feature.to(tl.uint32)[None, :])


@triton.jit
@no_type_check
def store_rounded(place, x, bits, mask, STOCHASTIC: tl.constexpr):
    """Store float32 x in the dtype of `place`, bfloat16 by chance where asked for."""
    dtype: tl.constexpr = place.dtype.element_ty
    if dtype == tl.bfloat16 and STOCHASTIC:
        raised = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
        x = (raised & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(place, rounded(x, dtype), mask=mask)


@triton.jit
@no_type_check
def change_by_sgd(
    g, momentum_buffer, place, bits, mask, numbers,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """What SGD subtracts (b, d); writes the momentum."""
    ahead = g
    if HAS_MOMENTUM:
        old = tl.load(momentum_buffer + place, mask=mask, other=0.0).to(tl.float32)
        new = tl.load(numbers + KEPT_MOMENTUM) * old + g
        store_rounded(momentum_buffer + place, new, bits >> 16, mask, STOCHASTIC)
        ahead = g + tl.load(numbers + MOMENTUM) * new if NESTEROV else new
    return tl.load(numbers + LEARNING_RATE) * ahead


@triton.jit
@no_type_check
def change_by_adam(g, exp_avg, exp_avg_sq, place, bits, mask, numbers, STOCHASTIC: tl.constexpr):
    """What Adam subtracts (b, d), without decay; writes both moments."""
    mean = tl.load(exp_avg + place, mask=mask, other=0.0).to(tl.float32)
    square = tl.load(exp_avg_sq + place, mask=mask, other=0.0)
    mean = tl.load(numbers + BETA) * mean + tl.load(numbers + BETA_REST) * g
    square = tl.load(numbers + BETA_SQ) * square + tl.load(numbers + BETA_SQ_REST) * g * g
    store_rounded(exp_avg + place, mean, bits >> 16, mask, STOCHASTIC)
    tl.store(exp_avg_sq + place, square, mask=mask)
    root = tl.sqrt(square * tl.load(numbers + BIAS_CORRECTION_SQ))
    mean = mean * tl.load(numbers + BIAS_CORRECTION)
    return tl.load(numbers + LEARNING_RATE) * mean / (root + tl.load(numbers + EPSILON))


@triton.jit
@no_type_check
def change_by_adagrad(g, row_sum, local, is_ours, numbers, D: tl.constexpr):
    """What row-wise AdaGrad subtracts (b, d); writes its one number a row."""
    total = tl.load(row_sum + local, mask=is_ours, other=0.0) + tl.sum(g * g, 1) / D
    tl.store(row_sum + local, total, mask=is_ours)
    size = tl.sqrt(total) + tl.load(numbers + EPSILON)
    return tl.load(numbers + LEARNING_RATE) * g / size[:, None]


@triton.jit
@no_type_check
def update(
    w, g, weight, first_state, second_state, compensation, numbers, seeds,
    local, feature, is_ours, mask,
    KIND: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    CLIPPED: tl.constexpr, STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Update a block of weights w (b, d) float32 from its gradient g, and its state, in place.

    Padded features have w = g = 0, so that sums over rows are right. `first_state` is the momentum,
    `exp_avg` or `sum`, `second_state` is `exp_avg_sq`; `is_ours` (b,) and `mask` (b, d) say what
    may be written.
    """
    place = local[:, None] * D + feature[None, :]
    if CLIPPED:
        limit = tl.load(numbers + CLIP_NORM)
        norm = tl.sqrt(tl.sum(g * g, 1))
        g = g * (limit / tl.maximum(norm, limit))[:, None]
    decay = tl.load(numbers + WEIGHT_DECAY) * w
    if KIND != "adamw":
        g = g + decay
    # Unused where nothing is rounded by chance; the compiler drops it there.
    bits = random_bits(seeds, local, feature)
    if KIND == "sgd":
        change = change_by_sgd(
            g, first_state, place, bits, mask, numbers, HAS_MOMENTUM, NESTEROV, STOCHASTIC
        )
    elif KIND == "adagrad":
        change = change_by_adagrad(g, first_state, local, is_ours, numbers, D)
    else:
        change = change_by_adam(
            g, first_state, second_state, place, bits, mask, numbers, STOCHASTIC
        )
    if KIND == "adamw":
        change = change + tl.load(numbers + LEARNING_RATE) * decay
    if KAHAN:
        rest = tl.load(compensation + place, mask=mask, other=0.0).to(tl.float32)
        exact = w + rest - change
        kept = nearest_bfloat16(exact)
        tl.store(weight + place, kept.to(tl.bfloat16), mask=mask)
        store_rounded(compensation + place, exact - kept, bits, mask, False)
    else:
        store_rounded(weight + place, w - change, bits, mask, STOCHASTIC)


def update_numbers(step: Any) -> tuple[list[float], list[int]]:
    """`numbers` and `seeds` of a `ClassStep`."""
    beta, beta_sq = step.betas
    numbers = [
        step.learning_rate,
        step.weight_decay,
        step.momentum,
        step.momentum if step.step > 1 else 0.0,
        beta,
        1 - beta,
        beta_sq,
        1 - beta_sq,
        1 / (1 - beta**step.step),
        1 / (1 - beta_sq**step.step),
        step.epsilon,
        step.clip_norm,
    ]
    return numbers, [_mix_on_host((step.seed ^ step.step) & 0xFFFFFFFF), step.first_class]


def _mix_on_host(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16
