"""Functions of probabilities near 0 and 1, from differences of logits, that keep their digits.

A probability P is given by its `gap`, P = sigmoid(gap): the logit minus the log-sum-exp of all
others. 1 - P is then as exact as P, also where it is 1e-4000.

Dimensions: R rows, t classes of a tile.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dist_dml.metric_parameters import MetricParameters

# Beyond this gap, 1 - P is e^-gap to 1e-13 and may underflow: expressions in the gap itself take
# over.
_FAR = 30.0


def log_one_minus_exp(exponent: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """log(1 - e^x) for x <= 0, by the form that keeps its digits on either side of -log 2."""
    small = torch.log1p(-exponent.exp())
    return torch.where(exponent > -math.log(2), (-torch.expm1(exponent)).log(), small)


def label_term(gap: Float[Tensor, " R"], parameters: MetricParameters) -> Float[Tensor, " R"]:
    """-log(1 - k P^p): finite for every finite gap, also with k = 1."""
    value = -log_one_minus_exp(_exponent(gap, parameters))
    if parameters.k < 1:
        return value
    # 1 - P^p is p (1 - P) = p e^-gap there.
    return torch.where(gap > _FAR, gap - math.log(parameters.p), value)


def slope(gap: Float[Tensor, " R"], parameters: MetricParameters) -> Float[Tensor, " R"]:
    """G(P) = (1 - P) k P^p / (1 - k P^p): the derivative of `label_term` by the gap, over p."""
    exponent = _exponent(gap, parameters)
    logarithm = exponent - log_one_minus_exp(exponent) - F.softplus(gap, threshold=_FAR)
    if parameters.k < 1:
        return logarithm.exp()
    return torch.where(gap > _FAR, 1 / parameters.p, logarithm.exp())


def _exponent(gap: Tensor, parameters: MetricParameters) -> Tensor:
    """log(k P^p)."""
    return math.log(parameters.k) - parameters.p * F.softplus(-gap, threshold=_FAR)


def exp_from(
    values: Float[Tensor, "*m R"], reference: Float[Tensor, " R"], power: float
) -> Float[Tensor, "*m R"]:
    """e^(power (values - reference)), and 0 where a value is -inf, whatever the reference."""
    return ((values - reference) * power).exp().masked_fill(values == float("-inf"), 0.0)


def first_power_sums(values: Float[Tensor, "R t"]) -> list[Float[Tensor, " R"]]:
    """Sums over each row of the first four powers, with one more buffer of the same size."""
    square = values * values
    sums = [values.sum(1), square.sum(1)]
    fourth = torch.linalg.vector_norm(square, dim=1).square()
    # In place: `vecdot` would make a further buffer of products.
    return [*sums, square.mul_(values).sum(1), fourth]
