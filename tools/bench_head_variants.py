"""What `bench_head` compares: sizes, variants by name, and this project's heads.

A variant is a name that a process of its own can build again. Every head answers to `step`: loss,
gradients of rows and weights, and the update of the weights.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
# Logits of a standard deviation of about 3, as in training, not the flat ones of a start.
LOGIT_STD = 3.0
# CosFace as Partial FC's recipes use it.
SCALE, MARGIN = 64.0, 0.4
# On a CPU within the 64 MiB that the table of goals allows.
TILE_MEBIBYTES = {"cpu": 48.0, "cuda": 1024.0}
# `keep` asks for all logits of a batch, which is what it is for.
KEEP_MEBIBYTES = 4096.0

_OPERANDS = {
    "float32": "float32",
    "float32_ieee": "IEEE float32",
    "bfloat16x3": "float32 by 3 bf16",
    "bfloat16": "bf16 tiles",
}

Backend = Literal["auto", "torch", "native", "triton"]
Sweep = Literal["auto", "keep", "recompute", "row_chunked"]


@dataclass(frozen=True)
class Size:
    """C, D and R of one comparison."""

    num_classes: int
    embedding_dim: int
    rows: int

    def __str__(self) -> str:
        """As tables say it."""
        return f"C={self.num_classes:,} D={self.embedding_dim} R={self.rows}"


@dataclass(frozen=True)
class Variant:
    """One of this project's ways to do a step.

    Attributes:
        operand: of the matrix products (`loss.tile_dtype`); sums are float32.
        loss: `cross_entropy` of inner products, or `cosface`, which is what Partial FC computes.
        sample: share of the classes that take part; 1 is exact.
    """

    backend: Backend = "auto"
    sweep: Sweep = "auto"
    operand: Literal["float32", "float32_ieee", "bfloat16x3", "bfloat16"] = "float32"
    loss: Literal["cross_entropy", "cosface"] = "cross_entropy"
    optimizer: Literal["sgd", "adamw", "adagrad"] = "sgd"
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    sample: float = 1.0

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = ["dist_dml" if self.backend == "auto" else f"dist_dml {self.backend}"]
        if self.sweep != "auto":
            parts[0] += f" {self.sweep}"
        parts.append(_OPERANDS[self.operand])
        parts += [self.loss] if self.loss != "cross_entropy" else []
        parts += [self.optimizer] if self.optimizer != "sgd" else []
        parts += ["bf16 weights"] if self.weight_dtype == "bfloat16" else []
        parts += [f"r = {self.sample:g}"] if self.sample < 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Head:
    """Class weights with one way to do a step.

    Attributes:
        weight: (C, D), updated in place.
        step: the whole step on rows (R, D), which gives the loss and leaves the rows' gradient in
            `rows.grad` where they ask for one.
        state: gives the optimizer's tensors, which exist after the first step at the latest.
        runs: says which backend, sweep and tiles were chosen, where there was a choice.
    """

    weight: Tensor
    step: Callable[[Tensor, Tensor], Tensor]
    state: Callable[[], dict[str, Tensor]]
    runs: Callable[[], str] = str

    @property
    def resident_bytes(self) -> int:
        """Weights and state."""
        tensors = [self.weight, *self.state().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# What a user gets without a word, in both dtypes: the verdicts are about these.
DEFAULTS = {operand: Variant(operand=operand) for operand in ("float32", "bfloat16")}
# What float32 would cost if every product were one of float32 numbers.
IEEE = Variant(operand="float32_ieee")
COSFACE = {operand: replace(v, loss="cosface") for operand, v in DEFAULTS.items()}
EXTRAS: dict[str, tuple[Variant, ...]] = {
    "adamw": tuple(replace(v, optimizer="adamw") for v in DEFAULTS.values()),
    "adagrad": tuple(replace(v, optimizer="adagrad") for v in DEFAULTS.values()),
    "bf16-weights": (replace(DEFAULTS["bfloat16"], weight_dtype="bfloat16"),),
    "sampled": tuple(replace(v, sample=0.1) for v in COSFACE.values()),
}
BACKENDS: dict[str, tuple[Backend, ...]] = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}
SWEEPS: tuple[Sweep, ...] = ("recompute", "keep", "row_chunked")


def project_variants(device: torch.device, also: tuple[str, ...] = ()) -> dict[str, Variant]:
    """The defaults, each backend with each sweep, and what was asked for besides, by name."""
    found = [*DEFAULTS.values(), *COSFACE.values()]
    found += [IEEE] if device.type == "cpu" else []
    for backend in BACKENDS[device.type]:
        for sweep in SWEEPS:
            found += [replace(v, backend=backend, sweep=sweep) for v in DEFAULTS.values()]
    for name in also:
        found += EXTRAS[name]
    return {variant.name: variant for variant in found}


def every_variant() -> dict[str, Variant]:
    """All that can be named, on any device: how a process of its own finds its variant."""
    found: dict[str, Variant] = {}
    for kind in BACKENDS:
        found |= project_variants(torch.device(kind), tuple(EXTRAS))
    return found


def draw_weights_(weight: Tensor) -> None:
    """Normal weights, quickly: the classifier's own, drawn by class id, take longer to start."""
    generator = torch.Generator(weight.device).manual_seed(0)
    with torch.no_grad():
        weight.normal_(0.0, LOGIT_STD / weight.shape[1] ** 0.5, generator=generator)


def batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random rows and labels."""
    # Another seed than the weights': rows equal to weights would have one class each to themselves.
    generator = torch.Generator().manual_seed(2**20)
    rows = torch.randn(size.rows, size.embedding_dim, generator=generator)
    labels = torch.randint(0, size.num_classes, (size.rows,), generator=generator)
    return rows.to(device), labels.to(device)


def build_classifier(
    variant: Variant,
    size: Size,
    partition: ClassPartition,
    device: torch.device,
    learning_rate: float = LEARNING_RATE,
) -> ClassParallelClassifier:
    """This project's classifier with weights of zero, on the classes of `partition`.

    Raises:
        UsageError: if this machine or this size does not allow the variant.
    """
    budget = TILE_MEBIBYTES[device.type]
    loss = LossConfig(
        tile_mebibytes=KEEP_MEBIBYTES if variant.sweep == "keep" else budget,
        tile_dtype=variant.operand,
        # Weights are drawn or shared afterwards, but cosines refuse to start from zeros.
        **{
            "cross_entropy": {"bias": False, "init_std": 0.0},
            "cosface": {"name": "cosface", "scale": SCALE, "cosine_margin": MARGIN},
        }[variant.loss],  # pyright: ignore[reportArgumentType]
    )
    sampling: dict[str, Any] = {"sample": "random", "sample_rate": variant.sample}
    sampling = sampling if variant.sample < 1 else {}
    optimizer = OptimizerConfig(
        name="adamw" if variant.optimizer == "adamw" else "sgd",
        learning_rate=learning_rate,
        momentum=MOMENTUM,
        class_weight_decay=0.0,
    )
    classes = ClassesConfig(
        backend=variant.backend,
        sweep=variant.sweep,
        optimizer="adagrad" if variant.optimizer == "adagrad" else "same",
        weight_dtype=variant.weight_dtype,
        **sampling,
    )
    return ClassParallelClassifier(
        size.embedding_dim, partition, loss, optimizer, 0, size.rows, device, classes=classes
    )


def project_step(
    classifier: ClassParallelClassifier,
    rows: Tensor,
    labels: Tensor,
    row_counts: tuple[int, ...],
) -> Tensor:
    """The whole step of this project: loss, gradient of the rows, update of the weights."""
    loss = classifier(rows, labels, row_counts, sum(row_counts), factor=1.0).loss
    loss.backward()
    return loss.detach()


def project_head(
    variant: Variant,
    size: Size,
    device: torch.device,
    learning_rate: float = LEARNING_RATE,
    owner: Head | None = None,
) -> Head:
    """This project's head on one worker.

    Args:
        owner: a head whose weights and state to use instead of own ones, so that many variants can
            take turns in the memory of one.

    Raises:
        UsageError: if this machine or this size does not allow the variant.
    """
    partition = ClassPartition.of_worker(0, 1, size.num_classes)
    classifier = build_classifier(variant, size, partition, device, learning_rate)

    def step(rows: Tensor, labels: Tensor) -> Tensor:
        return project_step(classifier, rows, labels, (len(rows),))

    def state() -> dict[str, Tensor]:
        tensors = classifier.shard_tensors()
        return {name: value for name, value in tensors.items() if value.ndim and "|" in name}

    if owner is None:
        draw_weights_(classifier.weight.detach())
    else:
        classifier.weight.data = owner.weight.detach()
        theirs = owner.state()
        for name, tensor in state().items():
            tensor.set_(theirs[name])  # pyright: ignore[reportArgumentType]  (its stub)
    return Head(classifier.weight, step, state, lambda: _what_runs(classifier))


def _what_runs(classifier: ClassParallelClassifier) -> str:
    plan, backend = classifier.plan, classifier.backend
    name = "torch" if backend is None else type(backend).__name__
    tiles = f"tiles of {plan.tile_classes:,} classes" if plan.tile_classes else "its own tiles"
    chunk = f", {plan.row_chunk:,} rows at a time" if plan.row_chunk else ""
    split = ", float32 as three products of bfloat16" if classifier.split else ""
    return f"{name}, {plan.sweep}, {tiles}{chunk}{split}"
