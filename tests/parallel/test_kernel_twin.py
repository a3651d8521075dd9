"""The kernels' dense twin against PyTorch: cross-entropy by autograd, optimizers, rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dense_kernels import (
    dense_forward,
    dense_gradient,
    dense_update,
    factors,
    participating,
    random_bits,
    round_by_chance,
)
from kernel_cases import BACKWARD_CASES, KernelCase, coefficients_of
from torch import Tensor

from dist_dml.parallel.class_sweeps import ClassStep, KernelClasses, row_gradient_of_pull

EXACT = [case for case in BACKWARD_CASES if case.operand_dtype == torch.float32]


def autograd(
    case: KernelCase, rows: Tensor, columns: Tensor, classes: KernelClasses
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weighted mean cross-entropy by weights, biases and rows, in float64.

    The loss of a row whose label is elsewhere is what this worker's classes add to it: the
    normaliser's logarithm, less the smoothed label's share of their logits.
    """
    weight = participating(classes).requires_grad_()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    bias = (bias if classes.bias is None else classes.bias.double()).clone().requires_grad_()
    leaf = rows.double().requires_grad_()
    logits = leaf @ (weight if classes.scale is None else F.normalize(weight, dim=1)).T
    logits = logits * (classes.scale or 1.0) + bias
    here = columns >= 0
    smoothing = case.smoothing
    loss = logits.logsumexp(1) - smoothing * logits.mean(1)
    loss = loss.masked_scatter(
        here,
        F.cross_entropy(logits[here], columns[here], reduction="none", label_smoothing=smoothing),
    )
    upstream = torch.ones(1, dtype=torch.float64)
    if len(rows) > 1:
        upstream = torch.linspace(0.0, 2.0, len(rows), dtype=torch.float64) / len(rows)
    (loss * upstream).sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert leaf.grad is not None
    return weight.grad, bias.grad, leaf.grad


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_the_twins_gradients_are_autograds_of_cross_entropy(case: KernelCase) -> None:
    rows, columns, classes = case.tensors()
    sums = dense_forward(rows, columns, classes, True)
    terms = coefficients_of(sums, case.smoothing, case.num_classes)
    found = dense_gradient(rows, columns, terms, classes)
    assert sums.pull is not None
    all_pulls = (participating(classes) * factors(classes)[:, None]).sum(0)
    # By the package's own function, in float64: what the pull is for.
    pulled = row_gradient_of_pull(sums.pull, columns, sums.rival, terms, classes, lambda: all_pulls)
    for name, part, wanted in zip(
        ("weight", "bias", "row", "row by pull"),
        (*found, pulled),
        (*autograd(case, rows, columns, classes), autograd(case, rows, columns, classes)[2]),
        strict=True,
    ):
        # The coefficients are float32, and most gradients of far labels cancel.
        size = wanted.abs().max() + factors(classes).max() * 1e-2
        assert (part - wanted).abs().max() < 3e-6 * size, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_twins_sums_give_cross_entropy(smoothing: float) -> None:
    case = KernelCase(64, 300, 40, bias=True)
    rows, columns, classes = case.tensors()
    columns = columns.clamp_min(0)
    sums = dense_forward(rows, columns, classes, True)
    exact = torch.logaddexp(sums.label, sums.rival + sums.mass.log())
    # sum over all classes of (normaliser - s_j), from the gap of the others.
    to_all = 300 * exact - (299 * sums.rival - sums.gap) - sums.label
    found = (1 - smoothing) * (exact - sums.label) + smoothing / 300 * to_all
    logits = rows.double() @ F.normalize(classes.weight.double(), dim=1).T * 8.0
    assert classes.bias is not None
    logits = logits + classes.bias.double()
    wanted = F.cross_entropy(logits, columns, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


STEPS = [
    ClassStep("sgd", 0.1, weight_decay=0.01),
    ClassStep("sgd", 0.1, weight_decay=0.01, momentum=0.9),
    ClassStep("sgd", 0.1, weight_decay=0.01, momentum=0.9, nesterov=True),
    ClassStep("adam", 0.1, weight_decay=0.01, betas=(0.8, 0.95), epsilon=1e-3),
    ClassStep("adamw", 0.1, weight_decay=0.01, betas=(0.8, 0.95), epsilon=1e-3),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.kind} {step.momentum}")
def test_fifty_updates_of_the_twin_are_pytorchs(step: ClassStep) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(weight.clone())
    if step.kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [theirs], step.learning_rate, step.momentum, 0.0, step.weight_decay, step.nesterov
        )
    else:
        kind = torch.optim.Adam if step.kind == "adam" else torch.optim.AdamW
        optimizer = kind([theirs], step.learning_rate, step.betas, step.epsilon, step.weight_decay)
    names = ["exp_avg", "exp_avg_sq"] if step.kind != "sgd" else ["momentum_buffer"]
    state = {name: torch.zeros_like(weight) for name in names}
    for t in range(1, 51):
        gradient = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimizer.step()
        weight, state = dense_update(weight, gradient, state, replace(step, step=t))
    torch.testing.assert_close(weight, theirs.detach(), atol=1e-13, rtol=1e-13)


def test_row_wise_adagrad_by_hand_clipped_first_and_active_rows_only() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    # The gradient (6, 8) of class 2 is clipped to length 5; (0.3, 0.4) of class 0 is not.
    gradient = torch.tensor([[0.3, 0.4], [6.0, 8.0]], dtype=torch.float64)
    state = {"sum": torch.tensor([1.0, 7.0, 3.5], dtype=torch.float64)}
    step = ClassStep("adagrad", 0.5, weight_decay=0.0, epsilon=0.5, clip_norm=5.0)
    new, state = dense_update(weight, gradient, state, step, torch.tensor([0, 2]))
    sums = [1.0 + 0.25 / 2, 7.0, 3.5 + 25.0 / 2]
    assert state["sum"].tolist() == sums
    torch.testing.assert_close(
        new,
        torch.tensor(
            [
                [1 - 0.15 / (sums[0] ** 0.5 + 0.5), 2 - 0.2 / (sums[0] ** 0.5 + 0.5)],
                [3.0, 4.0],
                [5 - 1.5 / (4.0 + 0.5), 6 - 2.0 / (4.0 + 0.5)],
            ],
            dtype=torch.float64,
        ),
    )


def mix(x: int) -> int:
    """The hash's step in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_random_bits_are_the_documented_hash() -> None:
    step = ClassStep("sgd", 1.0, seed=2**40 + 2**31 + 12345, step=77, first_class=2**32 - 3)
    of_weight, of_moment = random_bits(step, torch.tensor([0, 5]), 3)
    for place, local in enumerate((0, 5)):
        j = 2**32 - 3 + local
        row = mix(mix(mix((step.seed ^ 77) % 2**32) ^ j % 2**32) ^ j >> 32)
        for feature in range(3):
            h = mix(row ^ feature)
            assert of_weight[place, feature] == h % 2**16
            assert of_moment[place, feature] == h >> 16


def test_rounding_by_chance_takes_a_neighbour_and_is_right_in_the_mean() -> None:
    x = torch.tensor([1.0 + 2**-9, -1.0 - 2**-10, 3.14159, 0.0, 1.0])
    bits = torch.arange(2**16)
    rounded = round_by_chance(x[None].expand(2**16, -1), bits[:, None]).float()
    for column, number in enumerate(x.tolist()):
        found = rounded[:, column].unique().tolist()
        assert found[0] <= number <= found[-1]
        assert len(found) <= 2
        # Every one of the 2^16 bits once: the mean is the number itself, as far as 16 bits go.
        assert abs(rounded[:, column].double().mean().item() - number) < 2**-20


def test_kahan_keeps_updates_far_below_the_spacing_of_bfloat16() -> None:
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    state = {"compensation": torch.zeros(1, 1, dtype=torch.bfloat16)}
    step = ClassStep("sgd", 1.0, rounding="kahan")
    for _ in range(1000):
        weight, state = dense_update(weight, torch.full((1, 1), 1e-4), state, step)
    plain, _ = dense_update(
        torch.ones(1, 1).bfloat16(),
        torch.full((1, 1), 1e-4),
        {},
        step=replace(step, rounding="nearest"),
    )
    assert plain.item() == 1.0
    total = weight.double() + state["compensation"].double()
    assert abs(total.item() - 0.9) < 2e-3
