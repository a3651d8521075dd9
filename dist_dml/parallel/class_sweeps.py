"""What a backend of kernels does: two sweeps over one worker's classes, for losses of softmax form.

Logits are `s_ij = f_j w_j . z_i + b_j`, with `f_j = scale / |w_j|` for cosines and 1 otherwise. A
loss of softmax form (`losses.softmax.SoftmaxForm`) depends on the other classes of a row through
their largest logit and a sum of exponentials, and has, for j other than the label,

    dL_i/ds_ij = factor_i * exp(s_ij - normaliser_i) - offset_i,      dL_i/ds_iy = label_i.

Hence one exponential a logit and sweep, which a kernel does beside the matrix product. Backends:
`sweep_native` (CPU), `sweep_triton` (CUDA). `sweep_torch` does every loss.

Dimensions: R rows, N rows of all micro-batches, c classes of this worker, n of them that take part,
D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Below this norm a class weight has no direction; dividing by the floor keeps everything finite.
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class KernelClasses:
    """The classes of a sweep, as kernels take them.

    Attributes:
        weight: (c, D), contiguous, float32 or bfloat16; an update writes it.
        bias: (n,) float32, added to the logits of the classes that take part: trainable bias, prior
            and the logarithm of sampling corrections together; None for zeros.
        scale: factor of cosines, or None for inner products.
        active: (n,) int64, ascending: the local ids of the classes that take part; None: all c.
        operand_dtype: operands of the matrix products are rounded to it; sums are float32.
        split_operands: float32 operands may be split into two bfloat16 each, and three products be
            made of one (high x high, high x rest, rest x high: 16 bits of mantissa), except for the
            labels' logits and those that hold a large share of a row's exponentials: these and what
            they add to gradients are computed in float32. A backend without units for bfloat16
            takes float32 for all.
        tile_classes: classes of a tile, 0 for the backend's choice.
        row_chunk: rows of a chunk, 0 for the backend's choice.
        filter_below: tiles whose probabilities are all smaller give no gradient; 0 filters nothing.
        with_bias_gradient: whether the biases' gradient is wanted; without, the report may hold an
            empty one, and nothing grows with the number of classes.
    """

    weight: Float[Tensor, "c D"]
    bias: Float[Tensor, " n"] | None = None
    scale: float | None = None
    active: Int[Tensor, " n"] | None = None
    operand_dtype: torch.dtype = torch.float32
    split_operands: bool = False
    tile_classes: int = 0
    row_chunk: int = 0
    filter_below: float = 0.0
    with_bias_gradient: bool = True

    @property
    def num_classes(self) -> int:
        """n."""
        return len(self.weight) if self.active is None else len(self.active)


class SoftmaxSums(NamedTuple):
    """What the forward sweep says of each row, over the n classes that take part."""

    label: Float[Tensor, " R"]
    """The label's logit; -inf where the label is not among the n classes."""
    rival: Float[Tensor, " R"]
    """Largest logit of another class, at least `finfo(float32).min / 4`, which it is without
    any."""
    mass: Float[Tensor, " R"]
    """Sum of exp(s - rival) over the other classes."""
    gap: Float[Tensor, " R"]
    """Sum of (rival - s) over the other classes if asked for, else 0."""
    pull: Float[Tensor, "R D"] | None
    """Sum over the other classes of exp(s_ij - rival_i) f_j w_j if asked for and the backend's
    `pulls` is true: what the row's gradient is made of, once all workers' sums are known."""
    kept: Tensor | None
    """Logits for the backward sweep (`keep`), in the backend's own layout, else None."""


class RowCoefficients(NamedTuple):
    """Of the gradient rule; `label` counts only on the owner of the label."""

    normaliser: Float[Tensor, " N"]
    factor: Float[Tensor, " N"]
    offset: Float[Tensor, " N"]
    label: Float[Tensor, " N"]


@dataclass(frozen=True)
class ClassStep:
    """One update of class weights: what every tile's update needs to know.

    With g the gradient of a row of weights w (after clipping to `clip_norm`, if above 0), in
    float32, t = `step` counted from 1, state in place:

    - `sgd`: g += weight_decay * w; without momentum w -= lr g. With: v = momentum v + g (v = g at
      t = 1); w -= lr v, or lr (g + momentum v) with `nesterov`. State `momentum_buffer` (c, D).
    - `adam`: g += weight_decay * w; m, v as usual, bias-corrected by t;
      w -= lr m^ / (sqrt(v^) + epsilon). State `exp_avg`, `exp_avg_sq` (c, D).
    - `adamw`: w *= 1 - lr weight_decay first, then as `adam` without decay.
    - `adagrad`: g += weight_decay * w; s += mean(g^2) over the row; w -= lr g / (sqrt(s) +
    epsilon).
      State `sum` (c,) float32.

    `momentum_buffer` and `exp_avg` may be bfloat16, also beside float32 weights: rounded by chance
    with `rounding="stochastic"`, else to nearest even.

    bfloat16 weights: `stochastic`: a float32 x becomes the bfloat16 below or above it (by bits:
    add 16 random bits to x's, then cut the lower 16), the chance of `above` being the share of the
    distance. The bits come from a hash that knows no workers, tiles and threads: in 32-bit
    arithmetic, with mix(x): x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b;
    x ^= x >> 16, and the global class id j = first_class + local id,
    row = mix(mix(mix(seed ^ step) ^ low32(j)) ^ high32(j)) and h = mix(row ^ feature): the lower
    16 bits of h are the weight's, the upper 16 those of `momentum_buffer` or `exp_avg`.
    `kahan`: state `compensation` (c, D) bfloat16 holds what rounding took:
    w' = w + compensation - update in float32, w = round(w'), compensation = round(w' - w), to
    nearest even. `nearest` is for float32 weights and for tests.
    """

    kind: Literal["sgd", "adam", "adamw", "adagrad"]
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_norm: float = 0.0
    step: int = 1
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"
    seed: int = 0
    first_class: int = 0


class SweepReport(NamedTuple):
    """What a backward sweep tells."""

    row_gradient: Float[Tensor, "R D"] | None
    """This worker's part of the gradient of the last R rows, from backends that do not pull."""
    bias_gradient: Float[Tensor, " n"]
    """Sum of dL/ds over rows, for each class that takes part."""
    filtered_classes: int | Int[Tensor, ""]
    """Classes whose gradient was left out by `filter_below`."""
    filtered_mass: float | Float[Tensor, ""]
    """Sum over rows of |factor_i| times the probability of what was left out, an upper bound."""


@runtime_checkable  # The tests execute all annotations.
class KernelBackend(Protocol):
    """The two sweeps."""

    @property
    def pulls(self) -> bool:
        """Whether the forward sweep can give `pull`, so that rows need no backward sweep."""
        ...

    def forward(
        self,
        rows: Float[Tensor, "R D"],
        columns: Int[Tensor, " R"],
        classes: KernelClasses,
        with_gap: bool,
        with_pull: bool,
        keep: bool,
    ) -> SoftmaxSums:
        """The first sweep.

        Args:
            rows: float32, of unit length where `classes.scale` is given.
            columns: each label's position among the n classes that take part, -1 if elsewhere.
            classes: not changed.
            with_gap: whether `gap` is needed (label smoothing).
            with_pull: whether `pull` is needed.
            keep: whether to keep the logits for `backward`.
        """
        ...

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
        """The second sweep: the weights' gradient, tile by tile, used at once.

        With G = dL/ds (N, n) and a_j = sum_i G_ij z_i, the gradient of class j's weights is a_j for
        inner products and f_j (a_j - (a_j . w_j) w_j / |w_j|^2) for cosines.

        Args:
            rows: of all micro-batches, one after the other.
            columns: as in `forward`.
            coefficients: of each row.
            classes: as in `forward`.
            num_pulled: the last R rows whose gradient sum_j G_ij f_j w_j (from the weights before
                their update) is wanted; 0 for none. Backends that pull take 0 only.
            kept: `SoftmaxSums.kept` if N = R, else None.
            target: what becomes of the weights' gradient; None for none.
        """
        ...


@dataclass(frozen=True)
class GradientTarget:
    """Write, or add, the weights' gradient. With `active`, only those rows are touched.

    Attributes:
        gradient: (c, D) float32.
        accumulate: add instead of overwriting.
    """

    gradient: Float[Tensor, "c D"]
    accumulate: bool = False


@dataclass(frozen=True)
class UpdateTarget:
    """Update the weights in place; no gradient of their size exists.

    Attributes:
        step: the rule.
        state: its tensors by name, see `ClassStep`; updated in place, active rows only.
        apply: () bool on the weights' device: false leaves weights and state as they are. On CUDA
            it is read by the device, never by the host.
    """

    step: ClassStep
    state: Mapping[str, Tensor]
    apply: Bool[Tensor, ""]


def row_gradient_of_pull(
    pull: Float[Tensor, "R D"],
    columns: Int[Tensor, " R"],
    rival: Float[Tensor, " R"],
    coefficients: RowCoefficients,
    classes: KernelClasses,
    pull_of_all: Callable[[], Float[Tensor, " D"]] | None = None,
) -> Float[Tensor, "R D"]:
    """This worker's part of the rows' gradient, sum_j G_ij f_j w_j, from the forward sweep's pull.

    Args:
        pull: `SoftmaxSums.pull`.
        columns: as in the sweep.
        rival: this worker's own `SoftmaxSums.rival`.
        coefficients: made from all workers' sums.
        classes: with the weights of the forward sweep.
        pull_of_all: sum_j f_j w_j over the n classes; needed where offsets are not 0.
    """
    weight = (coefficients.factor * (rival - coefficients.normaliser).exp())[:, None]
    gradient = pull * weight
    of_label = coefficients.label
    if pull_of_all is not None:
        gradient.sub_(coefficients.offset[:, None] * pull_of_all())
        of_label = of_label + coefficients.offset
    present = columns >= 0
    local = columns.clamp_min(0)
    local = local if classes.active is None else classes.active[local]
    own = classes.weight[local].to(gradient.dtype)
    if classes.scale is not None:
        norm = torch.linalg.vector_norm(own, dim=1).clamp_min(SMALLEST_NORM)
        of_label = of_label * classes.scale / norm
    return gradient.addcmul_(own, torch.where(present, of_label, 0.0)[:, None])
