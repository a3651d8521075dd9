"""What every backend of kernels is tested with: cases, and checks against the dense float64 twin.

A backend's own test file runs `check_forward` and `check_backward` over the cases, and from
`kernel_update_cases` `check_updates` and `check_filter`; a check moves its inputs to the backend's
device, and compares on the CPU. Bounds are elementwise: a relative error for what is rounded, times
what the twin says an element is the sum of, so that neither cancellation nor a large neighbour
hides or fakes an error.

Dimensions: R rows, N rows of all micro-batches, c classes, n of them that take part, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from dense_kernels import (
    DenseGradient,
    dense_forward,
    dense_gradient,
    factors,
    gradient_bound,
    participating,
)
from torch import Tensor

from dist_dml.parallel.class_sweeps import (
    GradientTarget,
    KernelBackend,
    KernelClasses,
    RowCoefficients,
    SoftmaxSums,
    row_gradient_of_pull,
)


@dataclass(frozen=True)
class Tolerance:
    """Errors relative to what is computed with.

    Attributes:
        logits: of a logit, relative to |z| f |w| + |b|; exponentials inherit it as it is.
        products: of the terms of later products, which kernels may round to `operand_dtype`.
    """

    logits: float
    products: float


# float32 has 2^-24 = 6e-8, and sums of up to 1000 terms; bfloat16 rounds by 2^-9 = 2e-3, twice.
TOLERANCES = {
    torch.float32: Tolerance(logits=4e-7, products=4e-6),
    torch.bfloat16: Tolerance(logits=4e-7, products=2**-7),
}
# float32 as two bfloat16 keeps 2^-17 of each operand.
SPLIT_TOLERANCE = Tolerance(logits=2**-16, products=2**-15)


@dataclass(frozen=True)
class KernelCase:
    """A problem's sizes and kind; `tensors` makes it."""

    num_rows: int
    num_classes: int  # n: those that take part.
    num_features: int
    cosine: bool = True
    bias: bool = False
    active: bool = False
    logit_size: float = 8.0
    smoothing: float = 0.0
    operand_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    num_pulled: int | None = None  # Of the backward sweep; None: all rows.
    split_operands: bool = False
    tile_classes: int = 0
    row_chunk: int = 0

    def __str__(self) -> str:
        """The test's id: all that differs from the defaults."""
        parts = [f"{self.num_rows}x{self.num_classes}x{self.num_features}"]
        parts.append("cosine" if self.cosine else "linear")
        parts += [name for name in ("bias", "active") if getattr(self, name)]
        parts += [f"logits{self.logit_size:g}"] if self.logit_size != 8 else []
        parts += [f"smoothing{self.smoothing:g}"] if self.smoothing else []
        names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
        parts += [names[self.operand_dtype]] if self.operand_dtype != torch.float32 else []
        parts += ["stored bfloat16"] if self.weight_dtype != torch.float32 else []
        parts += [f"pulled{self.num_pulled}"] if self.num_pulled is not None else []
        parts += [f"tile{self.tile_classes}"] if self.tile_classes else []
        parts += [f"chunk{self.row_chunk}"] if self.row_chunk else []
        return " ".join(parts)

    def tensors(self) -> tuple[Tensor, Tensor, KernelClasses]:
        """Rows, columns and classes on the CPU, the same for the same case.

        Every second row has been drawn to its label; every fourth label is elsewhere (-1), and two
        rows share one.
        """
        generator = torch.Generator().manual_seed(hash_of(self))
        count = 2 * self.num_classes + 1 if self.active else self.num_classes
        weight = torch.randn(count, self.num_features, generator=generator)
        weight *= torch.linspace(0.3, 2.0, count)[:, None] / self.num_features**0.5
        active = None
        if self.active:
            active = torch.randperm(count, generator=generator)[: self.num_classes].sort().values
        ids = torch.arange(count) if active is None else active
        columns = torch.randint(0, self.num_classes, (self.num_rows,), generator=generator)
        columns[1:3] = columns[0]
        rows = torch.randn(self.num_rows, self.num_features, generator=generator)
        rows[::2] += 2 * F.normalize(weight[ids[columns[::2]]], dim=1)
        columns[3::4] = -1
        if self.cosine:
            rows = F.normalize(rows, dim=1)
        else:
            weight *= self.logit_size
        bias = torch.randn(self.num_classes, generator=generator) if self.bias else None
        classes = KernelClasses(
            weight.to(self.weight_dtype),
            bias,
            self.logit_size if self.cosine else None,
            active,
            self.operand_dtype,
            self.split_operands,
            self.tile_classes,
            self.row_chunk,
        )
        return rows, columns, classes


def hash_of(case: KernelCase) -> int:
    """A seed from the sizes; Python's own hash of strings differs between processes."""
    return case.num_rows * 1_000_003 + case.num_classes * 1009 + case.num_features


_BF16 = torch.bfloat16
FORWARD_CASES = [
    KernelCase(1, 1, 1),
    KernelCase(1, 1, 7, cosine=False, bias=True),
    KernelCase(5, 3, 7),
    KernelCase(5, 37, 16, cosine=False, bias=True),
    KernelCase(5, 300, 128, active=True),
    KernelCase(64, 37, 40, bias=True, active=True),
    KernelCase(64, 300, 40, logit_size=64.0, smoothing=0.1),
    KernelCase(64, 300, 1, cosine=False, tile_classes=64, row_chunk=16),
    KernelCase(130, 1000, 16, smoothing=0.1, bias=True),
    KernelCase(130, 300, 7, cosine=False, active=True, smoothing=0.1),
    KernelCase(130, 37, 128, logit_size=1e4),
    KernelCase(64, 1000, 16, cosine=False, logit_size=1e4, bias=True, smoothing=0.1),
    KernelCase(5, 37, 40, weight_dtype=_BF16),
    KernelCase(64, 300, 128, operand_dtype=_BF16, bias=True),
    KernelCase(130, 300, 16, cosine=False, operand_dtype=_BF16, weight_dtype=_BF16),
    KernelCase(64, 1000, 40, operand_dtype=_BF16, active=True, weight_dtype=_BF16, smoothing=0.1),
    KernelCase(64, 37, 7, operand_dtype=_BF16, logit_size=1e4),
]
BACKWARD_CASES = [
    *FORWARD_CASES,
    KernelCase(130, 300, 40, num_pulled=0),
    KernelCase(130, 37, 16, num_pulled=64, bias=True, active=True),
    KernelCase(130, 300, 7, cosine=False, num_pulled=5, row_chunk=32, tile_classes=64),
]


def on(device: str | torch.device, value: Any) -> Any:
    """A tensor, or the tensors of a `KernelClasses` or `RowCoefficients`, on a device."""
    if isinstance(value, RowCoefficients):
        return RowCoefficients(*(part.to(device) for part in value))
    if isinstance(value, KernelClasses):
        parts = {key: on(device, getattr(value, key)) for key in ("weight", "bias", "active")}
        return replace(value, **parts)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def coefficients_of(sums: SoftmaxSums, smoothing: float, num_classes: int) -> RowCoefficients:
    """Those of the mean cross-entropy, of weighted rows of which the first counts nothing.

    float32, as kernels get them: what rounding takes from the normaliser (5e-4 at logits of 1e4)
    goes into the factor, as `losses.softmax.CrossEntropy.gradient_terms` does.
    """
    exact = torch.logaddexp(sums.label, sums.rival + sums.mass.log())
    upstream = torch.linspace(0.0, 2.0, len(exact), dtype=torch.float64) / len(exact)
    if len(exact) == 1:
        upstream = torch.ones(1, dtype=torch.float64)
    normaliser = exact.float()
    factor = upstream * (normaliser.double() - exact).exp()
    of_other = smoothing / num_classes
    label = upstream * ((sums.label - exact).exp() - (1 - smoothing + of_other))
    return RowCoefficients(normaliser, factor.float(), (upstream * of_other).float(), label.float())


def logit_bound(rows: Tensor, classes: KernelClasses) -> Tensor:
    """(R,): the most that |z_i| f_j |w_j| + |b_j| can be, and 1."""
    longest = (participating(classes).norm(dim=1) * factors(classes)).max()
    bias = 0.0 if classes.bias is None else classes.bias.abs().max().double()
    return rows.double().norm(dim=1) * longest + bias + 1.0


def assert_within(name: str, found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Elementwise; infinities must be where they are wanted."""
    found, wanted = found.detach().cpu().double(), wanted.double()
    assert found.shape == wanted.shape, f"{name}: shape {found.shape} instead of {wanted.shape}"
    same = found == wanted
    excess = torch.where(same, 0.0, (found - wanted).abs() / (bound + 1e-30))
    worst = float(excess.nan_to_num(nan=float("inf")).max()) if excess.numel() else 0.0
    assert worst <= 1.0, f"{name}: error is {worst:.3g} times the bound"


def check_forward(
    backend: KernelBackend,
    case: KernelCase,
    tolerance: Tolerance | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """The sums of the forward sweep, with and without logits that are kept."""
    rows, columns, classes = case.tensors()
    tolerance = tolerance or TOLERANCES[case.operand_dtype]
    with_gap = case.smoothing > 0
    wanted = dense_forward(rows, columns, classes, with_gap)
    moved = on(device, rows), on(device, columns), on(device, classes)
    of_logit = tolerance.logits * logit_bound(rows, classes)
    for keep in (False, True):
        found = backend.forward(*moved, with_gap, backend.pulls, keep)
        assert_within("label", found.label, wanted.label, of_logit)
        assert_within("rival", found.rival, wanted.rival, of_logit)
        exponential = 2 * of_logit + 4e-6
        assert_within("mass", found.mass, wanted.mass, exponential * wanted.mass)
        gap_bound = 2 * of_logit * case.num_classes + 4e-6 * wanted.gap
        assert_within("gap", found.gap, wanted.gap, gap_bound)
        assert (found.pull is not None) == backend.pulls
        if found.pull is not None:
            assert wanted.pull is not None
            assert_within("pull", found.pull, wanted.pull, _pull_bound(case, tolerance, wanted))
    assert torch.equal(moved[2].weight.cpu(), classes.weight), "a forward sweep changed weights"


def _pull_bound(case: KernelCase, tolerance: Tolerance, sums: SoftmaxSums) -> Tensor:
    """A bound from sizes: the sum of exponentials times the largest element of f w."""
    rows, _, classes = case.tensors()
    largest = (participating(classes) * factors(classes)[:, None]).abs().amax(0)
    relative = tolerance.products + 2 * tolerance.logits * logit_bound(rows, classes)
    return (relative * sums.mass)[:, None] * largest


def check_backward(
    backend: KernelBackend,
    case: KernelCase,
    tolerance: Tolerance | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """All gradients, from recomputed and from kept logits, written and added, or none of weights.

    Rows of weights that take no part keep what stood in the gradient's buffer. Of backends that
    pull, the rows' gradient comes from the forward sweep.
    """
    rows, columns, classes = case.tensors()
    tolerance = tolerance or TOLERANCES[case.operand_dtype]
    sums = dense_forward(rows, columns, classes, False)
    coefficients = coefficients_of(sums, case.smoothing, case.num_classes)
    wanted = dense_gradient(rows, columns, coefficients, classes)
    bound = gradient_bound(rows, columns, coefficients, classes)
    # An exponential inherits the errors of a logit and of a normaliser of its size.
    worst = tolerance.logits * float(logit_bound(rows, classes).max())
    relative = tolerance.products + 3 * worst
    bound = DenseGradient(*(relative * part for part in bound))
    ids = torch.arange(len(classes.weight)) if classes.active is None else classes.active
    num_pulled = 0 if backend.pulls else case.num_rows
    num_pulled = num_pulled if backend.pulls or case.num_pulled is None else case.num_pulled
    inputs = on(device, rows), on(device, columns)
    moved, terms = on(device, classes), on(device, coefficients)
    for keep, accumulate in ((False, False), (True, True), (False, None)):
        found = backend.forward(*inputs, moved, False, backend.pulls, keep)
        if backend.pulls:
            _check_pulled(found, case, terms, moved, wanted.row, bound.row)
        buffer = torch.full(classes.weight.shape, 0.5, device=device)
        target = None if accumulate is None else GradientTarget(buffer, accumulate)
        report = backend.backward(*inputs, terms, moved, num_pulled, found.kept, target)
        assert_within("bias gradient", report.bias_gradient, wanted.bias, bound.bias)
        assert (report.row_gradient is not None) == (num_pulled > 0)
        if report.row_gradient is not None:
            last = slice(case.num_rows - num_pulled, None)
            assert_within("row gradient", report.row_gradient, wanted.row[last], bound.row[last])
        expected, allowed = torch.full(buffer.shape, 0.5).double(), torch.zeros(buffer.shape)
        if accumulate is not None:
            expected[ids] = wanted.weight + 0.5 * accumulate
            allowed[ids] = (bound.weight + 1e-7 * accumulate).float()
        assert_within("weight gradient", buffer, expected, allowed)
        assert int(report.filtered_classes) == 0
        assert float(report.filtered_mass) == 0.0
    assert torch.equal(moved.weight.cpu(), classes.weight), "a gradient sweep changed weights"


def _check_pulled(
    sums: SoftmaxSums,
    case: KernelCase,
    coefficients: RowCoefficients,
    classes: KernelClasses,
    wanted: Tensor,
    bound: Tensor,
) -> None:
    """`row_gradient_of_pull` of a backend's own pull and rival."""
    assert sums.pull is not None
    _, columns, on_cpu = case.tensors()
    all_pulls = (participating(on_cpu) * factors(on_cpu)[:, None]).sum(0).float()
    found = row_gradient_of_pull(
        sums.pull,
        columns.to(sums.rival.device),
        sums.rival,
        coefficients,
        classes,
        (lambda: all_pulls.to(sums.rival.device)) if case.smoothing else None,
    )
    assert_within("row gradient of pull", found, wanted, bound)
