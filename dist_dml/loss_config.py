"""The configuration of the objective: which loss, and its parameters.

A key that the chosen loss does not read is refused instead of being ignored. Parameters that are
`null` take the loss's own value, listed in `loss_tables` with their sources.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dist_dml.errors import UsageError
from dist_dml.loss_tables import (
    COMPARISONS,
    COSINE_LOSSES,
    OWN_VALUES,
    PAIR_KEYS,
    PAIR_LOSSES,
    PAIR_READS,
    READS,
)
from dist_dml.metric_parameters import MetricParameters

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class LossConfig(BaseModel):
    """The objective: class-parallel, or of the pairs of a batch."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=False,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    name: Literal[
        "cross_entropy",
        "normalised_softmax",
        "balanced_softmax",
        "cosface",
        "arcface",
        "combined_margin",
        "sub_centre_arcface",
        "dynamic_arcface",
        "adaface",
        "l1",
        "l2",
        "binary_cross_entropy",
        "proxy_nca",
        "proxy_anchor",
        "soft_triple",
        "contrastive",
        "c1",
        "c2",
        "triplet",
        "multi_similarity",
        "snca",
        "fastap",
        "spce",
        "center",
    ] = "cross_entropy"
    """The loss; docs/losses.md says what each equals and which keys it reads."""
    similarity: Literal["auto", "linear", "cosine"] = "auto"
    """Logits: inner products with an optional bias, or cosines times `scale`. `auto`: cosine for
    the losses that are made of cosines, otherwise linear.
    """
    scale: Positive | None = None
    """Factor of the cosines (1 / temperature); null takes the loss's own, 16 for cross-entropy."""
    temperature: Positive | None = None
    """1 / scale, for those who think in temperatures; set one of the two."""
    bias: bool = True
    """One trainable number a class, added to its logit; used with similarity=linear."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """e of the smoothed label."""
    smoothing: Literal["others", "all"] = "others"
    """Who shares e: `others` as in paper B (each e / (C - 1)), `all` as in PyTorch (e / C)."""
    angle_multiplier: Annotated[float, Field(ge=1)] | None = None
    """m1 of cos(m1 t + m2) - m3."""
    angle_margin: Annotated[float, Field(ge=0, lt=math.pi / 2)] | None = None
    """m2, in radians (ArcFace, AdaFace's m)."""
    cosine_margin: NonNegative | None = None
    """m3 (CosFace; delta of Proxy-Anchor and SoftTriple)."""
    dynamic_margin: tuple[NonNegative, NonNegative, Positive] = (0.5, 0.05, 0.25)
    """(a, b, e): the angular margin of a class with n training images is a * n^-e + b."""
    norm_concentration: Positive = 0.333
    """h of AdaFace: how much of the norms' spread changes the margin."""
    norm_momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch in AdaFace's running mean and deviation of norms."""
    centres: Count | None = None
    """Rows of weights of each class (sub-centres, SoftTriple)."""
    centre_temperature: Positive = 0.1
    """gamma of SoftTriple: softness of the choice among a class's centres."""
    centre_spread: NonNegative = 0.2
    """tau of SoftTriple: weight of the term that lets centres of a class merge."""
    p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Exponent of paper A's L2. Below 0.99 its loss does not scale with many classes."""
    k: float | None = None
    """Factor of paper A's L2, 0 < k <= 1; null takes `a`."""
    a: float | None = None
    """k = 1 / (1 + a), the supplement's convention; null is 1e-6 where k is null as well."""
    sums: Literal["auto", "sweep", "powers"] = "auto"
    """How L1 and L2 find their sums over all classes: by a second sweep, or from power sums of the
    first; `auto` takes powers where they are exact to float32 (p >= 0.85, not in float64).
    """
    comparison: Literal["l2", "squared_l2", "cosine", "inner"] | None = None
    """What pairs are compared by; rows are normalised but for `inner`. Null: the loss's own."""
    positive_margin: NonNegative | None = None
    """m+: positives nearer than this cost nothing (contrastive, C2)."""
    negative_margin: NonNegative | None = None
    """m-: negatives farther than this cost nothing; for cosines, with a smaller one (C1: 0.5)."""
    power: Literal[1, 2] | None = None
    """Of the terms of `contrastive`: 2 in paper B, 1 in paper C."""
    reduction: Literal["anchors", "nonzero"] | None = None
    """Mean over anchors, or over the terms above zero of the whole batch."""
    triplet_margin: NonNegative = 0.05
    """Margin of the triplet loss."""
    mining: Literal["all", "semihard", "batch_hard", "easy_positive", "easy_positive_semihard"] = (
        "all"
    )
    """Which triplets of an anchor count."""
    alpha: Positive = 2.0
    """Factor of positives of multi-similarity."""
    beta: Positive = 40.0
    """Factor of negatives of multi-similarity."""
    base: float = 0.5
    """Cosine at which pairs of multi-similarity weigh the same."""
    mining_epsilon: NonNegative | None = None
    """Slack of multi-similarity's miner (0.1 in its paper); null counts all pairs."""
    bins: Count = 10
    """Bins of FastAP's histogram of distances."""
    memory_size: Annotated[int, Field(ge=0)] = 0
    """Rows of a cross-batch memory (XBM) that the pairs' losses compare with as well; 0: none."""
    memory_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps before the memory is filled (paper C: 1000)."""
    block_mebibytes: Positive = 256.0
    """Most memory that a block of pairs takes beyond the rows of the batch."""
    label_sets: str = ""
    """CSV file that puts each class into a set of one or several labellings (`class,NAME,...`), by
    which pairs are then told apart: relative labels, paper B, appendix D. Empty: by class.
    """
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weight of a row by the training images n of its class: 1 / n, or the effective number
    (1 - b) / (1 - b^n) with b = 0.999 (Cui et al. 2019); the mean over training images is 1.
    """
    ignore_index: int = -100
    """Rows with this label have no loss and no gradient."""
    init_std: NonNegative = 0.01
    """Standard deviation of the initial class weights, drawn by class id. Paper B: 0."""
    tile_mebibytes: Positive = 256.0
    """Most memory a step may use beyond class weights, their gradient and optimizer state."""
    tile_dtype: Literal["float32", "float32_ieee", "bfloat16x3", "bfloat16"] = "float32"
    """Operands of the tiles' matrix products; sums, exponentials and updates stay in float32.

    `float32` has the largest error of float32 products, however they are made: on a processor with
    AMX and for tens of thousands of classes a worker the native kernels do as `bfloat16x3`.
    `float32_ieee`: every product is one of float32 numbers.
    `bfloat16x3`: float32 operands are split into two bfloat16 and three products made of one, and
    the logits that carry most of a row are computed in float32; where there are no native kernels
    or no units for bfloat16, all of them.
    `bfloat16`: operands are rounded to 8 bits of mantissa.
    """

    @model_validator(mode="after")
    def _only_keys_that_are_read(self) -> LossConfig:
        always, reads = {"name", "ignore_index"}, READS.get(self.name, ())
        if self.of_pairs:
            always, reads = always | set(PAIR_KEYS), PAIR_READS[self.name]
        else:
            always |= {"similarity", "class_weights", "init_std", "tile_mebibytes", "tile_dtype"}
        for key, field in type(self).model_fields.items():
            if key not in always | set(reads) and getattr(self, key) != field.default:
                raise ValueError(
                    f"loss.{key}={getattr(self, key)} is not read by loss.name={self.name}, which "
                    f"reads {', '.join(reads or sorted(always))}; remove it or choose another loss"
                )
        if self.of_pairs:
            self._check_pairs()
            return self
        if self.similarity == "linear" and self.name in COSINE_LOSSES:
            raise ValueError(
                f"loss.similarity=linear does not fit loss.name={self.name}, which is made of "
                "cosines; use auto or cosine"
            )
        factor = "scale" if self.temperature is None else "temperature"
        if not self.uses_cosine and getattr(self, factor) is not None:
            raise ValueError(
                f"loss.{factor}={getattr(self, factor):g} is a factor of cosines, and loss.name="
                f"{self.name} has inner products; set loss.similarity=cosine or remove it"
            )
        if self.uses_cosine and self.init_std == 0:
            raise ValueError(
                "loss.init_std=0 gives class weights without a direction, which cosines need; set "
                "it above 0"
            )
        if sum(self.dynamic_margin[:2]) >= math.pi / 2:
            a, b, _ = self.dynamic_margin
            raise ValueError(
                f"loss.dynamic_margin has a + b = {a + b:g}, the margin of a class with one image; "
                "keep it below pi / 2"
            )
        if self.scale is not None and self.temperature is not None:
            raise ValueError(
                f"loss.scale={self.scale:g} and loss.temperature={self.temperature:g} say the same "
                "thing; set one of them"
            )
        if self.name == "soft_triple" and (self.centres or 2) < 2:
            raise ValueError("loss.centres=1: soft_triple needs 2 or more; proxy_nca has one")
        if self.k is not None and self.a is not None:
            raise ValueError(f"loss.k={self.k:g} and loss.a={self.a:g}: set one of them")
        try:
            self.metric_parameters  # noqa: B018 (checks)
        except UsageError as error:
            raise ValueError(f"loss: {error}") from None
        if self.sums == "powers" and self.metric_parameters.p < 0.85:
            raise ValueError(
                f"loss.sums=powers with loss.p={self.p:g}: the series does not reach float32 below "
                "p = 0.85; use auto or sweep"
            )
        return self

    def _check_pairs(self) -> None:
        if self.comparison and self.comparison not in COMPARISONS[self.name]:
            raise ValueError(
                f"loss.comparison={self.comparison} does not fit loss.name={self.name}, which "
                f"compares by {', '.join(COMPARISONS[self.name])}"
            )
        if self.scale is not None and self.temperature is not None:
            raise ValueError(
                f"loss.scale={self.scale:g} and loss.temperature={self.temperature:g} say the same "
                "thing; set one of them"
            )
        if self.memory_warmup_steps and not self.memory_size:
            raise ValueError(
                f"loss.memory_warmup_steps={self.memory_warmup_steps} waits for a memory, and "
                "loss.memory_size=0 has none; set the size or remove the steps"
            )

    @property
    def of_pairs(self) -> bool:
        """Whether the loss is one of pairs, without class weights."""
        return self.name in PAIR_LOSSES

    @property
    def uses_cosine(self) -> bool:
        """Whether logits are scaled cosines."""
        return self.similarity == "cosine" or self.name in COSINE_LOSSES

    @property
    def num_centres(self) -> int:
        """Rows of weights of each class."""
        return int(self.setting("centres") or 1)

    @property
    def factor(self) -> float:
        """The scale of the cosines."""
        if self.temperature is not None:
            return 1 / self.temperature
        return float(self.setting("scale") or 16.0)

    @property
    def metric_parameters(self) -> MetricParameters:
        """k and p of `l1` and `l2`.

        Raises:
            UsageError: outside the definition.
        """
        if self.name == "l1":
            return MetricParameters(1.0, 1.0)
        if self.k is not None:
            return MetricParameters(self.k, self.p)
        return MetricParameters.of_offset(1e-6 if self.a is None else self.a, 1.0, self.p)

    def setting(self, key: str) -> Any:
        """The key's value, or the loss's own where it is null."""
        value = getattr(self, key)
        return OWN_VALUES.get(self.name, {}).get(key) if value is None else value
