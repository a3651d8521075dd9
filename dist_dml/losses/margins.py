"""Margins: what a cosine loss puts in the place of the label's cosine. Pure functions of cosines.

All are cases of cos(m1 t + m2) - m3 with t the angle between row and class weight: CosFace has m3,
ArcFace m2, the combined margin of the ArcFace paper all of them. Dynamic margins take m2 from the
class, AdaFace m2 and m3 from the row's norm.

Dimensions: R rows, c classes of this worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.softmax import TileTarget

# sin t is at least this: at t = 0 the derivative by the cosine, sin(t + m) / sin t, is infinite.
# 1 - cos^2 is known to 1e-7 in float32, its root to 3e-4.
_SMALLEST_SINE = {torch.float32: 1e-3, torch.float64: 1e-7}
_NORM_RANGE = (1e-3, 100.0)


@runtime_checkable
class Margin(Protocol):
    """Replaces the label's cosine."""

    def apply(
        self, cosine: Float[Tensor, " R"], target: TileTarget
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """The cosine with its margin, and the derivative of that by the cosine.

        Rows whose label lies in another tile are computed with and thrown away.
        """
        ...


@dataclass(frozen=True)
class AngularMargin:
    """cos(m1 t + m2) - m3 (Deng et al., ArcFace, eq. 4), one for all rows or each its own.

    What happens where m1 t + m2 leaves 0..pi: `linear` is the field's for m1 = 1, cos t - m2 sin m2
    (insightface, pytorch-metric-learning); `clip` keeps the angle inside (AdaFace's code). For
    m1 > 1 the cosine goes on falling, (-1)^n cos(m1 t + m2) - 2 n (SphereFace), n = floor(./pi).
    """

    multiplier: float = 1.0
    angle: float | Float[Tensor, " R"] = 0.0
    cosine: float | Float[Tensor, " R"] = 0.0
    beyond: Literal["linear", "clip"] = "linear"

    @property
    def is_of_rows(self) -> bool:
        """Whether each row has its own, so that rows and margins must be cut alike."""
        return isinstance(self.angle, Tensor) or isinstance(self.cosine, Tensor)

    def apply(
        self, cosine: Float[Tensor, " R"], target: TileTarget
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """See the class."""
        if self.multiplier == 1.0 and isinstance(self.angle, float) and self.angle == 0.0:
            return cosine - self.cosine, torch.ones_like(cosine)  # CosFace needs no angle.
        inside = cosine.clamp(-1, 1)
        sine = (1 - inside.square()).clamp_min(0).sqrt()
        angle = self.multiplier * torch.atan2(sine, inside) + self.angle
        sine = sine.clamp_min(_SMALLEST_SINE[cosine.dtype])
        # d cos(m1 t + m2) / d cos t = m1 sin(m1 t + m2) / sin t.
        slope = self.multiplier * angle.sin() / sine
        if self.multiplier > 1:
            turns = torch.floor(angle / math.pi)
            sign = 1 - 2 * (turns % 2)
            return sign * angle.cos() - 2 * turns - self.cosine, sign * slope
        value = angle.cos()
        outside = angle > math.pi
        if self.beyond == "linear":
            shift = torch.as_tensor(self.angle, dtype=cosine.dtype, device=cosine.device)
            value = torch.where(outside, inside - shift * shift.sin(), value)
            slope = torch.where(outside, torch.ones_like(slope), slope)
        else:
            outside = outside | (angle < 0)
            value = torch.where(outside, angle.clamp(0, math.pi).cos(), value)
            slope = torch.where(outside, torch.zeros_like(slope), slope)
        return value - self.cosine, slope


@dataclass(frozen=True)
class ClassMargin:
    """An angular margin for each class: ArcFace's with m2 of the label.

    Attributes:
        angles: (c,) of this worker's classes; only a label's owner applies its margin.
    """

    angles: Float[Tensor, " c"]

    def apply(
        self, cosine: Float[Tensor, " R"], target: TileTarget
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """See the class."""
        return AngularMargin(angle=self.angles[target.local][target.column]).apply(cosine, target)


def dynamic_angles(
    class_counts: Int[Tensor, " c"], a: float, b: float, exponent: float
) -> Float[Tensor, " c"]:
    """a n^-exponent + b for a class of n training images: rare classes get wider margins.

    Google Landmark Recognition 2020, third place (Ha et al., arXiv 2010.05350), with exponent 1/4.
    """
    return a * class_counts.clamp_min(1).double().pow(-exponent) + b


def adaptive_margin(
    norms: Float[Tensor, " R"],
    mean: Float[Tensor, ""],
    deviation: Float[Tensor, ""],
    margin: float,
    concentration: float,
) -> AngularMargin:
    """AdaFace (Kim et al., CVPR 2022, eqs. 14-16): rows with large norms count as good images.

    With z = (norm - mean) / (deviation / h) clipped to -1..1: the angle gets -m z, the cosine loses
    m z + m. The norms are constants: no gradient goes through them.

    Args:
        norms: lengths of the embeddings.
        mean: running mean of norms, `deviation` their running standard deviation.
        margin: m.
        concentration: h.
    """
    scaled = (norms.clamp(*_NORM_RANGE) - mean) / (deviation + 1e-3) * concentration
    scaled = scaled.clamp(-1, 1)
    return AngularMargin(1.0, -margin * scaled, margin + margin * scaled, beyond="clip")


def running_norms(
    norms: Float[Tensor, " R"],
    counted: Bool[Tensor, " R"],
    mean: Float[Tensor, ""],
    deviation: Float[Tensor, ""],
    momentum: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """AdaFace's running mean and standard deviation after a batch, whose weight is `momentum`.

    Rows that are not counted (`loss.ignore_index`) are left out, without waiting for the device to
    count the others. A batch without rows changes nothing.
    """
    norms, weights = norms.clamp(*_NORM_RANGE), counted.to(norms.dtype)
    number = weights.sum()
    centre = (norms * weights).sum() / number.clamp_min(1)
    squares = ((norms - centre).square() * weights).sum()
    spread = (squares / (number - 1).clamp_min(1)).sqrt()
    # A bool times a Python float would be float32, whatever the others are.
    share = (number > 0).to(mean.dtype) * momentum
    return torch.lerp(mean, centre, share), torch.lerp(deviation, spread, share)
