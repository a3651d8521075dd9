"""float32 as three products of bfloat16: as exact as float32 where gradients are large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from dense_kernels import dense_forward, dense_gradient
from kernel_cases import coefficients_of
from torch import Tensor

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.class_sweeps import GradientTarget, KernelClasses, row_gradient_of_pull
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.machine import DECLARED, known_machine, split_pays
from dist_dml.parallel.sweep_native import NativeBackend, native_backend

R, C, D = 96, 12_000, 64


@pytest.fixture(scope="module")
def backend() -> NativeBackend:
    """The kernels, on a processor that has products of bfloat16."""
    found = native_backend()
    if isinstance(found, str):
        pytest.skip(found)
    if reason := found.supports(torch.bfloat16):
        pytest.skip(reason)
    return found


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Regime:
    """How the logits of a row are distributed.

    Attributes:
        deviation: of the logits of random classes.
        trained: how far the labels' weights were drawn to their rows.
        rivals: how many other classes were drawn there as well, and stand first, so that a row's
            sum is complete after the first tile.
        strength: how far these were.
    """

    deviation: float = 3.0
    trained: float = 0.0
    rivals: int = 0
    strength: float = 0.0
    scale: float | None = None
    bias: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, KernelClasses]:
        """Rows, columns and classes."""
        generator = torch.Generator().manual_seed(3)
        rows = torch.randn(R, D, generator=generator)
        unit = F.normalize(rows, dim=1)
        rows = rows if self.scale is None else unit
        weight = torch.randn(C, D, generator=generator) * self.deviation / D**0.5
        columns = torch.randint(R * 40, C, (R,), generator=generator)
        weight[columns] += self.trained * unit
        for i in range(self.rivals):
            weight[i * R : (i + 1) * R] += self.strength * unit
        bias = torch.randn(C, generator=generator) if self.bias else None
        return rows, columns, KernelClasses(weight, bias, self.scale)


REGIMES = {
    "as drawn": Regime(),
    "flat": Regime(deviation=0.1),
    "trained": Regime(trained=2.5),
    "one rival each": Regime(trained=2.5, rivals=1, strength=2.4),
    "forty rivals each, first": Regime(trained=1.5, rivals=40, strength=1.5),
    "sharp": Regime(deviation=8.0, trained=3.0),
    "cosines": Regime(scale=64.0, trained=1.0, rivals=3, strength=0.9),
    "cosines, biases": Regime(scale=30.0, bias=True),
}


def errors(
    backend: NativeBackend, rows: Tensor, columns: Tensor, classes: KernelClasses
) -> dict[str, float]:
    """Of loss and gradients, relative to their largest entry (`most`) and as a whole (`all`)."""
    exact = dense_forward(rows, columns, classes, False)
    wanted = dense_gradient(rows, columns, coefficients_of(exact, 0.0, C), classes)
    sums = backend.forward(rows, columns, classes, False, True, False)
    terms = coefficients_of(sums, 0.0, C)
    assert sums.pull is not None
    of_rows = row_gradient_of_pull(sums.pull, columns, sums.rival, terms, classes, None)
    of_classes = torch.zeros(C, D)
    backend.backward(
        rows, columns, terms, classes, 0, None, GradientTarget(of_classes, accumulate=False)
    )
    found = {}
    for name, got, want in (("z", of_rows, wanted.row), ("w", of_classes, wanted.weight)):
        difference = got.double() - want
        found[f"{name} most"] = float(difference.abs().max() / want.abs().max())
        found[f"{name} all"] = float(difference.norm() / want.norm())
    normaliser = torch.logaddexp(exact.label, exact.rival + exact.mass.log())
    got = torch.logaddexp(sums.label.double(), sums.rival + sums.mass.double().log())
    found["normaliser"] = float((got - normaliser).abs().max())
    return found


@pytest.mark.parametrize("name", REGIMES)
def test_split_products_lose_no_more_than_float32(backend: NativeBackend, name: str) -> None:
    rows, columns, classes = REGIMES[name].tensors()
    single = errors(backend, rows, columns, classes)
    split = errors(backend, rows, columns, replace(classes, split_operands=True))
    allowed = {key: max(3.5 * value, 5e-7) for key, value in single.items()}
    allowed["normaliser"] = max(allowed["normaliser"], 1e-5)  # Of about 15.
    assert all(split[key] <= allowed[key] for key in single), (single, split)


def classifier_of(num_classes: int, embedding_dim: int, tile_dtype: str) -> ClassParallelClassifier:
    return ClassParallelClassifier(
        embedding_dim,
        ClassPartition.of_worker(0, 1, num_classes),
        LossConfig.model_validate({"tile_dtype": tile_dtype, "tile_mebibytes": 32.0}),
        OptimizerConfig(name="sgd"),
        0,
        8,
        classes=ClassesConfig(backend="native"),
    )


def test_float32_is_split_where_that_pays(backend: NativeBackend) -> None:
    del backend
    units = split_pays(known_machine(torch.device("cpu"), 1), 10**6, 128)  # This processor's AMX.
    assert classifier_of(40_000, 64, "float32").split == units
    assert not classifier_of(20_000, 64, "float32").split
    assert not classifier_of(40_000, 32, "float32").split
    assert not classifier_of(40_000, 64, "float32_ieee").split
    assert not classifier_of(40_000, 64, "bfloat16").split
    assert classifier_of(1_000, 16, "bfloat16x3").split
    assert not any(split_pays(machine, 10**8, 512) for machine in DECLARED.values())
