"""Checks of a backend's in-place updates and of its filter against the dense float64 twin.

Each step is compared from the state that the backend itself has reached, so that errors do not
pile up, and a wrong state shows in the step that writes it.

Dimensions: R rows, c classes, n of them that take part, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from dense_kernels import dense_forward, dense_gradient, dense_update, factors, participating
from kernel_cases import KernelCase, assert_within, coefficients_of, on
from torch import Tensor

from dist_dml.parallel.class_sweeps import (
    ClassStep,
    GradientTarget,
    KernelBackend,
    KernelClasses,
    RowCoefficients,
    UpdateTarget,
)


@dataclass(frozen=True)
class UpdateCase:
    """One rule with its dtypes, over a small problem with or without `active`."""

    step: ClassStep
    weight_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    operand_dtype: torch.dtype = torch.float32
    active: bool = False
    cosine: bool = True
    num_features: int = 40

    def __str__(self) -> str:
        """The test's id."""
        step = self.step
        parts = [step.kind, "cosine" if self.cosine else "linear", step.rounding]
        parts += [f"D{self.num_features}"]
        parts += [f"momentum{step.momentum:g}"] if step.momentum else []
        parts += ["nesterov"] if step.nesterov else []
        parts += ["clipped"] if step.clip_norm else []
        parts += ["active"] if self.active else []
        for name in ("weight", "state", "operand"):
            bf16 = getattr(self, f"{name}_dtype") == torch.bfloat16
            parts += [f"{name} bf16"] if bf16 else []
        return " ".join(parts)

    def problem(self) -> tuple[Tensor, Tensor, KernelClasses, RowCoefficients]:
        """Rows, columns, classes and coefficients on the CPU."""
        case = KernelCase(
            num_rows=37,
            num_classes=150,
            num_features=self.num_features,
            cosine=self.cosine,
            bias=True,
            active=self.active,
            operand_dtype=self.operand_dtype,
            weight_dtype=self.weight_dtype,
        )
        rows, columns, classes = case.tensors()
        sums = dense_forward(rows, columns, classes, False)
        return rows, columns, classes, coefficients_of(sums, 0.1, case.num_classes)

    def state(self, count: int) -> dict[str, Tensor]:
        """Of zeros, as a classifier makes it."""
        shape = (count, self.num_features)
        state: dict[str, Tensor] = {}
        if self.step.kind == "sgd" and self.step.momentum:
            state["momentum_buffer"] = torch.zeros(shape, dtype=self.state_dtype)
        elif self.step.kind in ("adam", "adamw"):
            state["exp_avg"] = torch.zeros(shape, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros(shape)
        elif self.step.kind == "adagrad":
            state["sum"] = torch.zeros(count)
        if self.step.rounding == "kahan":
            state["compensation"] = torch.zeros(shape, dtype=torch.bfloat16)
        return state


_BF16 = torch.bfloat16
# Steps of about a bfloat16 spacing of the weights (2^-8), so that rounding decides; ids beyond 32
# bits; an epsilon of the size of the gradients, so that its place in the formula is seen.
_SGD = ClassStep("sgd", 2.0, weight_decay=0.01, momentum=0.9, seed=2**31 + 5, first_class=2**32 - 9)
_ADAM = ClassStep("adam", 0.01, weight_decay=0.01, betas=(0.8, 0.95), epsilon=1e-3, seed=7)
_ADAGRAD = ClassStep("adagrad", 0.02, weight_decay=0.01, epsilon=1e-3, first_class=1000)
_CHANCE, _KAHAN = replace(_SGD, rounding="stochastic"), replace(_SGD, rounding="kahan")
UPDATE_CASES = [
    UpdateCase(replace(_SGD, momentum=0.0), active=True, num_features=7),
    UpdateCase(_SGD, cosine=False),
    UpdateCase(replace(_SGD, nesterov=True, clip_norm=0.01), active=True),
    UpdateCase(_ADAM, active=True),
    UpdateCase(replace(_ADAM, kind="adamw", clip_norm=0.01), cosine=False),
    UpdateCase(_ADAGRAD, active=True),
    UpdateCase(replace(_SGD, rounding="stochastic", nesterov=True), state_dtype=_BF16),
    UpdateCase(_SGD, state_dtype=_BF16),
    UpdateCase(_CHANCE, weight_dtype=_BF16, active=True),
    UpdateCase(_CHANCE, weight_dtype=_BF16, state_dtype=_BF16, num_features=7),
    UpdateCase(_SGD, weight_dtype=_BF16, state_dtype=_BF16),
    UpdateCase(_KAHAN, weight_dtype=_BF16, state_dtype=_BF16, active=True),
    UpdateCase(replace(_ADAM, kind="adamw", rounding="kahan"), weight_dtype=_BF16),
    UpdateCase(
        replace(_ADAM, kind="adamw", rounding="stochastic"), weight_dtype=_BF16, state_dtype=_BF16
    ),
    UpdateCase(replace(_ADAGRAD, rounding="stochastic"), weight_dtype=_BF16),
    UpdateCase(replace(_ADAGRAD, rounding="kahan"), weight_dtype=_BF16, cosine=False),
    UpdateCase(_CHANCE, weight_dtype=_BF16, state_dtype=_BF16, operand_dtype=_BF16),
]


def check_updates(
    backend: KernelBackend,
    case: UpdateCase,
    num_steps: int = 4,
    device: str | torch.device = "cpu",
) -> None:
    """Several steps in place; rows that take no part, and all of them where `apply` is false, stay.

    The last step is refused by `apply`: nothing may move, and the gradients must still come back.
    """
    rows, columns, classes, coefficients = case.problem()
    moved, terms = on(device, classes), on(device, coefficients)
    state = {name: on(device, value) for name, value in case.state(len(classes.weight)).items()}
    inputs = on(device, rows), on(device, columns)
    num_pulled = 0 if backend.pulls else len(rows)
    for t in range(1, num_steps + 2):
        step = replace(case.step, step=t)
        before = on("cpu", moved)
        old_state = {name: on("cpu", value) for name, value in state.items()}
        wanted = dense_gradient(rows, columns, coefficients, before)
        apply = torch.tensor(t <= num_steps, device=device)
        target = UpdateTarget(step, state, apply)
        report = backend.backward(*inputs, terms, moved, num_pulled, None, target)
        rough = 2e-2 if case.operand_dtype == _BF16 else 1e-4
        _close("bias gradient", report.bias_gradient, wanted.bias, rough)
        if report.row_gradient is not None:  # From the weights before their update.
            _close("row gradient", report.row_gradient, wanted.row, rough)
        new, new_state = before.weight, old_state
        if t <= num_steps:
            new, new_state = dense_update(new, wanted.weight, old_state, step, before.active)
        _check_stored("weight", moved.weight.cpu(), new, before.weight, rough)
        assert state.keys() == new_state.keys()
        for name, value in new_state.items():
            _check_stored(name, state[name].cpu(), value, old_state[name], rough)
        if before.active is not None:
            idle = torch.ones(len(new), dtype=torch.bool)
            idle[before.active] = False
            assert torch.equal(moved.weight.cpu()[idle], before.weight[idle])
            assert all(torch.equal(state[key].cpu()[idle], old_state[key][idle]) for key in state)


def _close(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (found.cpu().double() - wanted.double()).norm()
    assert error <= tolerance * wanted.double().norm(), f"{name}: {error} of {wanted.norm()}"


def _check_stored(name: str, found: Tensor, wanted: Tensor, old: Tensor, tolerance: float) -> None:
    """Rounded numbers are the twin's, but for few whose float32 lay within an error of a threshold.

    With the wrong random bits about half of what lies between two bfloat16 numbers would differ.
    A compensation is what is left of a difference, so a flipped weight flips it too.
    """
    assert found.dtype == wanted.dtype
    if torch.equal(wanted, old):
        assert torch.equal(found, old), f"{name} moved"
        return
    change = (wanted.double() - old.double()).norm()
    if found.dtype == torch.float32:
        error = (found.double() - wanted.double()).norm()
        spacing = 2e-7 * wanted.double().norm()
        assert error <= tolerance * change + spacing, f"{name}: {error} of a change of {change}"
        return
    if name == "compensation":
        # Compared with the spacing 2^-16 of what it adds to the weight's own 8 bits.
        differ = (found.double() - wanted.double()).abs() > 2**-6 * wanted.abs().max()
    else:
        differ = found != wanted
        size = wanted.double().abs() + float(change) / wanted.numel() ** 0.5
        limit = (2**-5 if tolerance > 1e-3 else 2**-7) * size
        assert_within(name, found, wanted, limit)
    # bfloat16 operands alone move a moment by half of its spacing, and a weight by less.
    rough_limit = 0.15 if name == "weight" else 0.6
    share = differ.double().mean().item()
    assert share < (rough_limit if tolerance > 1e-3 else 0.01), f"{name}: {share:.2%} differ"


def check_filter(backend: KernelBackend, device: str | torch.device = "cpu") -> None:
    """Tiles far from all rows are left out, and what that costs is within the report.

    Two groups of 512 classes, on opposite sides; rows lie in the first one. A few labels lie in
    the second: their probabilities are tiny, but their gradients -1, and must not be lost.
    """
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1024, 16, generator=generator) * 0.1
    weight[:512, 0] += 1.0
    weight[512:, 0] -= 1.0
    rows = torch.randn(48, 16, generator=generator) * 0.1
    rows[:, 0] += 1.0
    rows = rows / rows.norm(dim=1, keepdim=True)
    columns = torch.randint(0, 512, (48,), generator=generator)
    columns[:2] = torch.tensor([600, 600])
    classes = KernelClasses(weight, scale=6.0, tile_classes=64, filter_below=1e-6)
    coefficients = coefficients_of(dense_forward(rows, columns, classes, False), 0.0, 1024)
    wanted = dense_gradient(rows, columns, coefficients, classes)
    gradient = torch.full((1024, 16), 7.0, device=device)
    num_pulled = 0 if backend.pulls else 48
    inputs = on(device, rows), on(device, columns), on(device, coefficients)
    target = GradientTarget(gradient)
    report = backend.backward(*inputs, on(device, classes), num_pulled, None, target)
    left_out, mass = int(report.filtered_classes), float(report.filtered_mass)
    assert 0 < left_out <= 512
    assert 0 < mass <= 48 * left_out * 1e-6 * float(coefficients.factor.max())
    longest = float((participating(classes) * factors(classes)[:, None]).norm(dim=1).max())
    error = (gradient.cpu().double() - wanted.weight).norm(dim=1)
    # Where nothing is left out the usual rounding remains.
    assert float(error.sum()) <= mass * float(factors(classes).max()) + 1e-5
    assert float(error[:512].max()) <= 1e-5
    assert float((report.bias_gradient.cpu().double() - wanted.bias).abs().sum()) <= mass + 1e-5
    if report.row_gradient is not None:
        lost = (report.row_gradient.cpu().double() - wanted.row).norm(dim=1).sum()
        assert float(lost) <= mass * longest + 1e-5
