"""The cost model against hand-worked numbers, counted operations and tensors that exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.cost import (
    BACKENDS,
    HeadShape,
    SweepPlan,
    link_bytes,
    link_messages,
    sweep_cost,
)
from dist_dml.parallel.head_memory import (
    USABLE,
    largest_num_classes,
    memory_of,
    row_bytes,
    tile_bytes,
    total_bytes,
)
from dist_dml.parallel.machine import DECLARED, Level, Machine
from dist_dml.parallel.sweep_choice import choose_sweep

CPU, H200 = DECLARED["cpu"], DECLARED["h200"]
MIB = 2**20
# A machine in whose rates everything can be worked out on paper.
PAPER = replace(
    H200,
    gemm={"float32": 790e12, "bfloat16": 790e12},
    levels=(Level(48 * MIB, 4.3e12, 4.3e12), Level(float("inf"), 4.3e12, 4.3e12)),
)
IDEAL = replace(BACKENDS["triton"], share=1.0, backward_reads=0.0, backward_updates=0.0)


def plan_of(shape: HeadShape, sweep: Any = "recompute") -> SweepPlan:
    return SweepPlan(sweep, 1024, shape.sweep_rows, "")


@pytest.mark.parametrize(
    ("num_classes", "width", "rows", "products_ms", "float32_ms", "bfloat16_ms", "plain_ms"),
    [
        (1_000_000, 128, 512, 0.66, 0.60, 0.30, 0.18),
        (10_000_000, 512, 1024, 53.09, 23.81, 11.91, 7.14),
        (100_000_000, 128, 4096, 530.92, 59.53, 29.77, 17.86),
    ],
)
def test_products_and_traffic_are_the_floors_worked_out_by_hand(
    num_classes: int,
    width: int,
    rows: int,
    products_ms: float,
    float32_ms: float,
    bfloat16_ms: float,
    plain_ms: float,
) -> None:
    """8BCD at 790 TFLOP/s; 20, 10 and 6 bytes a weight at 4.3 TB/s."""
    wide = HeadShape(num_classes, width, rows)
    small = replace(wide, weight_dtype="bfloat16", state_dtype="bfloat16")
    for shape, traffic in (
        (wide, float32_ms),
        (small, bfloat16_ms),
        (replace(small, momentum=False), plain_ms),
    ):
        seconds = sweep_cost(shape, PAPER, plan_of(shape), IDEAL).seconds
        assert seconds["products"] * 1e3 == pytest.approx(products_ms, abs=0.006)
        assert seconds["traffic"] * 1e3 == pytest.approx(traffic, abs=0.006)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize(
    ("sweep", "loss"),
    [
        ("recompute", LossConfig()),
        ("keep", LossConfig()),
        ("row_chunked", LossConfig()),
        ("recompute", LossConfig(name="l1", sums="sweep")),
        ("recompute", LossConfig(name="sub_centre_arcface", centres=2)),
    ],
)
def test_operations_are_those_that_a_step_does(
    micro_batches: int, sweep: Any, loss: LossConfig
) -> None:
    if sweep == "keep" and micro_batches > 1:
        return  # Refused by the classifier's own tests.
    num_classes, width, rows = 300, 16, 12 * micro_batches
    classifier = ClassParallelClassifier(
        width,
        ClassPartition.of_worker(0, 1, num_classes),
        # Rounded operands: the counter knows `mm`, not the in-place `addmm_` of plain ones.
        loss.model_copy(update={"tile_dtype": "bfloat16"}),
        OptimizerConfig(name="sgd"),
        0,
        12,
        classes=ClassesConfig(
            backend="torch", sweep=sweep, row_chunk=6 if sweep == "row_chunked" else 0
        ),
        micro_batches=micro_batches,
    )
    with FlopCounterMode(display=False) as counter:
        for micro in range(micro_batches):
            embeddings = torch.randn(12, width, requires_grad=True)
            last = micro == micro_batches - 1
            output = classifier(embeddings, torch.arange(12), (12,), rows, factor=1.0, last=last)
            output.loss.backward()
    shape = HeadShape(
        num_classes,
        width,
        rows,
        micro_batches=micro_batches,
        centres=classifier.objective.centres,
        operand_dtype="bfloat16",
        refined=getattr(classifier.objective.loss, "refined", False),
    )
    assert sweep_cost(shape, CPU, plan_of(shape, sweep)).flops == counter.get_total_flops()


def test_backends_that_pull_do_the_same_work_for_every_number_of_micro_batches() -> None:
    shape = HeadShape(1000, 8, 60)
    for micro, of_others in ((1, 8.0), (2, 9.0), (4, 9.5)):
        cut = replace(shape, micro_batches=micro)
        of_logit = 60 * 1000 * 8
        pulls = sweep_cost(cut, CPU, plan_of(cut), BACKENDS["native"]).flops
        others = sweep_cost(cut, CPU, plan_of(cut), BACKENDS["torch"]).flops
        assert pulls == 8 * of_logit
        assert others == pytest.approx(of_others * of_logit)


def test_each_worker_has_its_part_and_sampling_shrinks_it() -> None:
    whole = HeadShape(1000, 8, 64)
    of_four = replace(whole, workers=4)
    sampled = replace(of_four, active_share=0.1)
    flops = [sweep_cost(shape, CPU, plan_of(shape)).flops for shape in (whole, of_four, sampled)]
    assert flops == [4 * flops[1], flops[1], flops[1] / 10]
    # All weights stay where they are; the ids of those that take part are added.
    extra = total_bytes(memory_of(sampled, plan_of(sampled)))
    assert extra == total_bytes(memory_of(of_four, plan_of(of_four))) + 8 * 25


def test_bytes_over_the_links_are_the_hand_counted_ones() -> None:
    shape = HeadShape(1000, 8, 60, workers=3, row_numbers=5)
    found = link_bytes(shape)
    # 40 rows of others arrive, 5 numbers of own rows from 2 others and the sums of 40 others back,
    # the gradient of 20 own rows from 2 others.
    assert found == (40 * 8 * 4, 40 * 8, (20 * 2 + 40) * 5 * 4, 20 * 2 * 8 * 4)
    assert link_messages(shape) == 5 * 2
    assert (
        sum(link_bytes(replace(shape, workers=1))) == link_messages(replace(shape, workers=1)) == 0
    )
    inside, between = (
        sweep_cost(shape, replace(PAPER, workers_per_node=n), plan_of(shape)).seconds["links"]
        for n in (3, 2)
    )
    assert inside == pytest.approx(sum(found) / 450e9 + 10 * 10e-6)
    assert between == pytest.approx(sum(found) / 50e9 + 10 * 20e-6)


@pytest.mark.parametrize(
    ("optimizer", "classes"),
    [
        ("sgd", {}),
        ("sgd", {"state_dtype": "bfloat16"}),
        ("adamw", {}),
        ("sgd", {"optimizer": "adagrad"}),
        ("adam", {"weight_dtype": "bfloat16", "state_dtype": "bfloat16"}),
        ("sgd", {"weight_dtype": "bfloat16", "rounding": "kahan"}),
    ],
)
def test_weights_and_state_have_the_size_of_the_tensors_that_exist(
    optimizer: Any, classes: dict[str, Any]
) -> None:
    num_classes, width = 300, 16
    config = ClassesConfig(backend="torch", **classes)
    classifier = ClassParallelClassifier(
        width,
        ClassPartition.of_worker(0, 1, num_classes),
        LossConfig(),
        OptimizerConfig(name=optimizer),
        0,
        4,
        classes=config,
    )
    rows = torch.randn(4, width, requires_grad=True)
    classifier(rows, torch.arange(4), (4,), 4, factor=1.0).loss.backward()
    tensors = classifier.shard_tensors()
    held = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in tensors.items()
        if tensor.ndim and "bias" not in name
    )
    kind = optimizer if config.optimizer == "same" else config.optimizer
    shape = HeadShape(
        num_classes,
        width,
        4,
        weight_dtype=config.weight_dtype,
        state_dtype=config.state_dtype,
        optimizer=kind,
        kahan=config.weight_dtype == "bfloat16" and config.rounding == "kahan",
    )
    items = [item for item in memory_of(shape, plan_of(shape)) if item.name.startswith("class ")]
    assert total_bytes(items) == held


def test_the_most_classes_fit_and_one_more_for_each_worker_does_not() -> None:
    shape = HeadShape(1, 128, 1024, workers=8, bias=True)
    budget, other = 2.0**30, 5.0 * 2**30
    most = largest_num_classes(shape, H200, budget, other)
    there = USABLE * H200.memory_bytes - other - budget
    numbers = {most: True, most + 8: False}
    for count, fits in numbers.items():
        own = -(-count // 8)
        assert (own * (128 * 8 + 12) <= there) == fits
    assert largest_num_classes(shape, replace(H200, memory_bytes=MIB), budget) == 0


def test_logits_are_kept_where_they_fit_and_recomputing_is_slower() -> None:
    shape = HeadShape(2000, 128, 128)
    native = BACKENDS["native"]
    fast = replace(CPU, levels=(Level(float("inf"), 1e13, 1e13),))

    def chosen(budget: float = 256.0 * MIB, machine: Machine = fast, **keys: Any) -> SweepPlan:
        return choose_sweep(replace(shape, **keys), machine, budget, native)

    assert chosen().sweep == "keep"
    assert choose_sweep(shape, fast, 256 * MIB, native, sweep="recompute").sweep == "recompute"
    # 1 MiB of logits, and rows, leave no room.
    assert chosen(0.9 * MIB).sweep == "recompute"
    # With several micro-batches the early ones' logits are gone.
    assert chosen(micro_batches=2).sweep == "recompute"
    # The memory of this machine is so slow that computing again is faster.
    slow = chosen(machine=replace(CPU, levels=(Level(float("inf"), 1e9, 1e9),)))
    assert slow.sweep == "recompute"
    assert "not worth its memory" in slow.reason


def test_rows_are_cut_where_a_tile_of_all_of_them_leaves_the_cache() -> None:
    many = HeadShape(100_000, 128, 65_536)
    plan = choose_sweep(many, CPU, 2**30, BACKENDS["native"])
    assert plan.sweep == "row_chunked"
    assert plan.row_chunk < 65_536
    size = tile_bytes(many, plan.tile_classes, plan.row_chunk)
    assert size <= CPU.cache_bytes
    few = choose_sweep(replace(many, rows=256), CPU, 64 * MIB, BACKENDS["native"])
    assert (few.sweep, few.row_chunk) == ("recompute", 256)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_the_chosen_plan_fits_and_no_other_tile_is_much_faster(backend: str) -> None:
    shape, machine = HeadShape(50_000, 64, 512), H200 if backend == "triton" else CPU
    budget = 64.0 * MIB
    plan = choose_sweep(shape, machine, budget, BACKENDS[backend])
    best = sweep_cost(shape, machine, plan, BACKENDS[backend]).total_seconds
    size = tile_bytes(shape, plan.tile_classes, plan.row_chunk, BACKENDS[backend])
    assert row_bytes(shape) + size <= budget
    for tile in (256, 1024, 4096, 16_384):
        try:
            other = choose_sweep(shape, machine, budget, BACKENDS[backend], tile_classes=tile)
        except UsageError:
            continue
        cost = sweep_cost(shape, machine, other, BACKENDS[backend])
        if backend == "torch":  # The others never leave the cache by themselves.
            assert best <= 1.03 * cost.total_seconds
        assert other.tile_classes == tile


def test_a_budget_that_is_too_small_says_how_much_would_do() -> None:
    shape = HeadShape(50_000, 64, 512)
    with pytest.raises(UsageError, match=r"loss\.tile_mebibytes=0\.25 .* set it to ") as caught:
        choose_sweep(shape, CPU, 0.25 * MIB)
    needed = float(str(caught.value).split("set it to ")[1].split()[0])
    assert choose_sweep(shape, CPU, (needed + 0.1) * MIB).tile_classes <= 128
    with pytest.raises(UsageError, match="set it to"):
        choose_sweep(shape, CPU, (needed - 0.1) * MIB)
    with pytest.raises(UsageError, match=r"classes\.sweep=keep"):
        choose_sweep(shape, CPU, 8 * MIB, sweep="keep")
    with pytest.raises(UsageError, match=r"training\.accumulate above 1"):
        choose_sweep(replace(shape, micro_batches=2), CPU, 2**30, sweep="keep")


def test_a_plan_that_was_asked_for_is_kept() -> None:
    shape = HeadShape(50_000, 64, 512)
    plan = choose_sweep(shape, CPU, 2**30, sweep="row_chunked", tile_classes=700, row_chunk=100)
    assert plan[:3] == ("row_chunked", 700, 100)
