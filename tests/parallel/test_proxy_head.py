"""Chance-constrained proxies on 1, 2 and 3 workers, against one dense process in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.config import OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.losses.ccp_states import PoolDrawn
from dist_dml.losses.chance_constraints import against_proxies, unit_ball
from dist_dml.losses.k_center import k_center
from dist_dml.losses.pair_objectives import build_pair_objective
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.feature_bank import FeatureBank
from dist_dml.parallel.heads import Head
from dist_dml.parallel.pair_parallel import NUMBERS_A_PAIR, pair_parallel_loss
from dist_dml.parallel.proxy_head import ProxyHead
from dist_dml.parallel.proxy_problem import block_sizes
from dist_dml.proxy_config import ProxyConfig

B, C, K, D, IGNORED = 14, 7, 3, 5, -100
ABSENT = 4  # A class without embeddings, hence without proxies.
ROW_COUNTS = {1: [(14,)], 2: [(7, 7), (3, 11), (0, 14)], 3: [(5, 5, 4), (9, 0, 5)]}
LOSSES = {
    "c1": LossConfig(name="c1", negative_margin=0.1),
    "c2": LossConfig(name="c2", positive_margin=0.5, negative_margin=1.1),
    "triplet": LossConfig(name="triplet", triplet_margin=0.2),
    "triplet of anchors": LossConfig(name="triplet", triplet_margin=0.3, reduction="anchors"),
    "triplet of cosines": LossConfig(name="triplet", triplet_margin=0.2, comparison="cosine"),
    "triplet of squares": LossConfig(name="triplet", comparison="squared_l2"),
    "multi_similarity": LossConfig(name="multi_similarity", alpha=3, beta=12, base=0.2),
}
ADAM = OptimizerConfig(name="adam", learning_rate=0.05, class_weight_decay=0.01)
# Blocks of three rows against two classes, or thereabouts.
SMALL = NUMBERS_A_PAIR * 8 * 18 / 2**20


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in and out of the unit ball, labels of which one is ignored, a pool, which is filled."""
    generator = torch.Generator().manual_seed(3)
    rows = 0.6 * torch.randn(B, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (B,), generator=generator)
    labels[[2, 5]] = torch.tensor([IGNORED, ABSENT])
    pool = 0.6 * torch.randn(C, 6, D, generator=generator, dtype=torch.float64)
    filled = torch.ones(C, 6, dtype=torch.bool)
    filled[1, 2:], filled[ABSENT] = False, False
    return rows, labels, pool, filled


def build_head(
    loss: LossConfig, partition: ClassPartition, mebibytes: float = SMALL, **keys: Any
) -> ProxyHead:
    config = ProxyConfig.model_validate({"per_class": K, "pool_size": 6} | keys)
    loss = loss.model_copy(update={"block_mebibytes": mebibytes})
    return ProxyHead(config, loss, ADAM, D, partition, B, dtype=torch.float64)


def begin(head: ProxyHead) -> None:
    """Proxies out of the pool of `problem`."""
    _, _, pool, filled = problem()
    for _ in range(head.phases.plan.draws_at(head.phases.state.problem)):
        head.phases.advance(PoolDrawn())
    own = slice(head.partition.start, head.partition.stop)
    head.choose(pool[own], filled[own])


def dense_loss(loss: LossConfig, rows: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
    """0.1 * loss(batch, batch) + loss(batch, proxies) of one process, by autograd."""
    moved, there = unit_ball(rows), torch.tensor([c for c in range(C) if c != ABSENT])
    # The absent class is renamed away: its rows have negatives only.
    ids = torch.full((C,), 10_000).index_copy(0, there, torch.arange(C - 1))
    renamed = torch.where(labels == IGNORED, IGNORED, ids[labels.clamp_min(0)])
    total = torch.zeros((), dtype=torch.float64)
    counted = labels != IGNORED
    for part in build_pair_objective(loss, C).losses:
        found = against_proxies(moved, renamed, unit_ball(proxies[there]), part, IGNORED)
        total = total + found.values[counted].sum() / found.weights[counted].sum().clamp_min(1)
        among = pair_parallel_loss(moved, labels, (B,), part, None, None, 64.0, IGNORED)
        total = total + 0.1 * among
    return total


def dense_proxies() -> Tensor:
    """The pool's k centers."""
    _, _, pool, filled = problem()
    chosen = k_center(pool, K, filled=filled).chosen.clamp_min(0)
    found = pool.gather(1, chosen[..., None].expand(-1, -1, D))
    found[ABSENT] = 0
    return found


def dense(loss: LossConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradients of rows and proxies, and the proxies after a step of `torch.optim.Adam`."""
    rows, labels, _, _ = problem()
    leaf, proxies = rows.clone().requires_grad_(), dense_proxies().requires_grad_()
    value = dense_loss(loss, leaf, labels, proxies)
    value.backward()
    assert leaf.grad is not None
    assert proxies.grad is not None
    before = proxies.grad.clone()
    adam = torch.optim.Adam([proxies], ADAM.learning_rate / 2, weight_decay=0.01)
    adam.step()
    return value.detach(), leaf.grad, before, proxies.detach()


def step(head: ProxyHead, rows: Tensor, labels: Tensor, counts: tuple[int, ...]) -> Any:
    """One step of this worker's rows: value, gradients of rows and proxies."""
    leaf = rows.clone().requires_grad_()
    found = head(leaf, labels, counts, sum(counts), factor=0.5, last=True)
    found.loss.backward()
    assert head.proxies.grad is not None
    gradient = head.proxies.grad.clone()
    head.step_done()
    return found.loss.detach(), leaf.grad, gradient


def shared(rank: int, num_workers: int, group: ProcessGroup) -> dict[Any, tuple[Tensor, ...]]:
    rows, labels, _, _ = problem()
    partition = ClassPartition.of_worker(rank, num_workers, C, group)
    results = {}
    for counts in ROW_COUNTS[num_workers]:
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for name, loss in LOSSES.items():
            head = build_head(loss, partition)
            begin(head)
            found = step(head, rows[own], labels[own], counts)
            results[counts, name] = (*found, head.proxies.detach(), torch.tensor(head._radius))
    return results


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_with_shares_of_the_proxies_equal_one_dense_process(
    num_workers: int, tmp_path: Path
) -> None:
    found = run_workers(shared, num_workers, tmp_path)
    for case in found[0]:
        value, of_rows, of_proxies, updated = dense(LOSSES[case[1]])
        assert all(torch.equal(worker[case][0], found[0][case][0]) for worker in found)
        close(found[0][case][0], value)
        assert value > 1e-3
        # What engines average over workers: the rows' gradient is times their number.
        close(torch.cat([worker[case][1] for worker in found]), num_workers * of_rows)
        close(torch.cat([worker[case][2] for worker in found]), of_proxies)
        after = torch.cat([worker[case][3] for worker in found])
        torch.testing.assert_close(after, updated, rtol=1e-6, atol=1e-8)
        assert all(torch.equal(worker[case][4], found[0][case][4]) for worker in found)


ALONE = ClassPartition(0, C, C)


def two_steps(rank: int, num_workers: int, group: ProcessGroup) -> tuple[dict[str, Tensor], ...]:
    """The state after a step, and value, gradients and proxies of the next."""
    rows, labels, _, _ = problem()
    counts = (5, 5, 4)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    head = build_head(LOSSES["c2"], ClassPartition.of_worker(rank, num_workers, C, group))
    begin(head)
    step(head, rows[own], labels[own], counts)
    shards, shared = head.shard_tensors(), head.shared_tensors()
    saved = [{name: value.clone() for name, value in every.items()} for every in (shards, shared)]
    value, _, gradient = step(head, rows[own] * 1.1, labels[own], counts)
    assert head.bank is not None
    after = {"gradient": gradient, "proxies": head.proxies.detach(), "bank": head.bank.rows}
    return saved[0], saved[1], {"value": value} | after


def test_one_worker_goes_on_where_three_have_stopped(tmp_path: Path) -> None:
    rows, labels, _, _ = problem()
    found = run_workers(two_steps, 3, tmp_path)
    head = build_head(LOSSES["c2"], ALONE)
    stored: dict[str, Tensor] = {}
    for name, value in found[0][0].items():
        assert value.ndim == 0 or len(value) == 3  # Rows of the first worker's three classes.
        stored[name] = value if value.ndim == 0 else torch.cat([of[0][name] for of in found])
    head.load_shard_tensors(stored)
    head.load_shared_tensors(found[2][1])
    assert head.phases.state.step == 1
    assert head.optimizer.num_steps == 1
    value, _, gradient = step(head, rows * 1.1, labels, (B,))
    close(value, found[0][2]["value"])
    close(gradient, torch.cat([of[2]["gradient"] for of in found]))
    close(head.proxies.detach(), torch.cat([of[2]["proxies"] for of in found]))
    assert head.bank is not None
    assert torch.equal(head.bank.rows, torch.cat([of[2]["bank"] for of in found]))


def test_a_checkpoint_without_proxies_is_refused() -> None:
    head = build_head(LOSSES["c2"], ALONE)
    with pytest.raises(UsageError, match="lacks bank"):
        head.load_shard_tensors({"weight": torch.zeros(C, D)})


@pytest.mark.parametrize("mebibytes", [SMALL * 14.5 / 18, 3 * SMALL, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_of_any_size_give_the_same(name: str, mebibytes: float) -> None:
    rows, labels, _, _ = problem()
    head = build_head(LOSSES[name], ALONE, mebibytes)
    assert isinstance(head, Head)
    begin(head)
    for got, expected in zip(step(head, rows, labels, (B,)), dense(LOSSES[name]), strict=False):
        close(got, expected)


@pytest.mark.parametrize("transform", ["unit_ball", "normalise"])
def test_the_transform_is_the_configured_one(transform: str) -> None:
    head = build_head(LOSSES["c1"], ALONE, transform=transform)
    moved = head.transform(torch.tensor([[0.3, 0.4], [3.0, 4.0]]))
    inside = [0.3, 0.4] if transform == "unit_ball" else [0.6, 0.8]
    torch.testing.assert_close(moved, torch.tensor([inside, [0.6, 0.8]]))


def test_without_a_batch_weight_only_proxies_count() -> None:
    rows, labels, _, _ = problem()
    values = []
    for weight in (0.0, 0.1, 0.3):
        head = build_head(LOSSES["c2"], ALONE, batch_weight=weight)
        begin(head)
        values.append(step(head, rows, labels, (B,))[0])
    assert values[1] > values[0]
    close(values[2] - values[0], 3 * (values[1] - values[0]))


def test_a_batch_of_ignored_rows_moves_nothing() -> None:
    rows, labels, _, _ = problem()
    for loss in LOSSES.values():
        head = build_head(loss, ALONE)
        begin(head)
        value, of_rows, of_proxies = step(head, rows, torch.full_like(labels, IGNORED), (B,))
        assert value == 0
        assert not of_rows.any()
        assert not of_proxies.any()


def test_a_bank_keeps_the_latest_rows_of_each_class_in_order() -> None:
    bank = FeatureBank(ClassPartition(2, 5, 9), 3, 1, torch.float64, "cpu")
    kept: dict[int, list[float]] = {2: [], 3: [], 4: []}
    generator, number = torch.Generator().manual_seed(0), 1.0
    for _ in range(6):
        labels = torch.randint(0, 6, (11,), generator=generator)
        labels[3] = -7
        rows = torch.arange(number, number + 11, dtype=torch.float64)[:, None]
        number += 11
        bank.push(rows, labels, ignored=-7)
        for label, row in zip(labels.tolist(), rows[:, 0].tolist(), strict=True):
            if label in kept:
                kept[label].append(row)
        for label, every in kept.items():
            there = bank.rows[label - 2, bank.filled[label - 2], 0]
            assert sorted(there.tolist()) == every[-3:]
    assert min(len(every) for every in kept.values()) > 3


def test_new_proxies_come_from_the_bank_and_cover_what_the_best_ones_do_not() -> None:
    rows, labels, _, _ = problem()
    head = build_head(LOSSES["c1"], ALONE, evaluate_steps=1, problem_patience=1)
    model = nn.Linear(1, 1)
    begin(head)
    chosen = head.proxies.detach().clone()
    step(head, rows, labels, (B,))
    best = head.proxies.detach().clone()
    assert not torch.equal(best, chosen)
    head.evaluated(0.5, model)  # A gain: the solution.
    step(head, 2 * rows, labels, (B,))
    moved = head.proxies.detach().clone()
    head.evaluated(0.4, model)
    assert head.phases.state.problem == 1
    assert head.bank is not None
    head.phases.advance(PoolDrawn())
    head.choose(head.bank.rows, head.bank.filled)
    ids = k_center(head.bank.rows, K, covering=best, filled=head.bank.filled).chosen
    for label in range(C):
        if not bool((labels == label).any()):  # No embeddings of the class: as they were.
            assert torch.equal(head.proxies[label], moved[label])
            continue
        assert torch.equal(head.proxies[label], head.bank.rows[label, ids[label]])
    # The class that the first pool did not have takes part from now on.
    assert bool(head.present[ABSENT])
    assert head.report()["proxies/problem"] == 1


@pytest.mark.parametrize("forgets", [True, False])
def test_the_optimizer_forgets_old_proxies_if_it_is_told_to(forgets: bool) -> None:
    rows, labels, _, _ = problem()
    keys = {"evaluate_steps": 1, "problem_patience": 1, "reset_moments": forgets}
    head = build_head(LOSSES["c1"], ALONE, **keys)
    begin(head)
    for score in (0.5, 0.4):
        step(head, rows, labels, (B,))
        head.evaluated(score, nn.Linear(1, 1))
    assert head.optimizer.state["exp_avg"].any()
    begin(head)
    assert bool(head.optimizer.state["exp_avg"].any()) != forgets
    assert head.optimizer.num_steps == (0 if forgets else 2)


def test_the_end_brings_the_best_weights_and_proxies_back() -> None:
    rows, labels, _, _ = problem()
    head = build_head(LOSSES["c2"], ALONE, evaluate_steps=1, run_patience=2)
    model = nn.Linear(2, 1)
    begin(head)
    step(head, rows, labels, (B,))
    best, weights = head.proxies.detach().clone(), model.weight.detach().clone()
    for score in (0.5, 0.4, 0.3):
        head.evaluated(score, model)
        if not head.phases.finished:
            step(head, rows, labels, (B,))
            nn.init.zeros_(model.weight)
    assert head.phases.finished
    assert torch.equal(head.proxies, best)
    assert torch.equal(model.weight, weights)


@pytest.mark.parametrize(
    ("key", "value"), [("mining", "semihard"), ("mining_epsilon", 0.1)], ids=str
)
def test_minings_are_refused(key: str, value: Any) -> None:
    name = "triplet" if key == "mining" else "multi_similarity"
    with pytest.raises(UsageError, match=r"expected C1, C2, triplet with loss\.mining=all"):
        build_head(LossConfig.model_validate({"name": name, key: value}), ALONE)


def test_micro_batches_are_refused() -> None:
    rows, labels, _, _ = problem()
    head = build_head(LOSSES["c1"], ALONE)
    begin(head)
    with pytest.raises(UsageError, match=r"training\.accumulate=1"):
        head(rows, labels, (B,), 2 * B, factor=1.0, last=True)


def test_a_budget_below_one_class_is_refused_with_one_that_suffices() -> None:
    with pytest.raises(UsageError, match=r"against 8 proxies; set it to 0\.001 or more"):
        block_sizes(32, 100, 8, 0.0001, 4)
    rows, classes = block_sizes(32, 100, 8, 0.001, 4)
    assert (rows, classes) == (2, 1)
    assert block_sizes(32, 1000, 8, 256, 4) == (32, 1000)


@pytest.mark.parametrize("name", ["c2", "triplet", "multi_similarity"])
def test_a_step_holds_its_blocks_and_not_all_pairs(name: str) -> None:
    num_rows, num_classes, per_class, width, mebibytes = 2048, 1024, 4, 8, 4
    partition = ClassPartition(0, num_classes, num_classes)
    config = ProxyConfig(per_class=per_class, pool_size=4, pool="passes", batch_weight=0.0)
    loss = LOSSES[name].model_copy(update={"block_mebibytes": float(mebibytes)})
    head = ProxyHead(config, loss, ADAM, width, partition, num_rows)
    for _ in range(4):
        head.phases.advance(PoolDrawn())
    pool = torch.randn(num_classes, 4, width)
    head.choose(pool, torch.ones(num_classes, 4, dtype=torch.bool))
    rows = torch.randn(num_rows, width, requires_grad=True)
    labels = torch.arange(num_rows) // 2
    with LiveBytes() as counter:
        found = head(rows, labels, (num_rows,), num_rows, factor=1.0, last=True)
        found.loss.backward()
    budget, of_both = mebibytes * 2**20, 4 * width * (num_rows + num_classes * per_class)
    assert 0.3 * budget < counter.peak <= budget + 4 * of_both + 256 * num_rows
    assert counter.peak < num_rows * num_classes * per_class  # Not even a mask would fit.


def test_while_it_warms_up_rows_meet_each_other_alone_and_fill_the_bank() -> None:
    rows, labels, _, _ = problem()
    head = build_head(LOSSES["c2"], ClassPartition(0, C, C), warmup_steps=2, batch_weight=0.3)
    for step in range(2):
        leaf = rows.clone().requires_grad_()
        found = head(leaf, labels, (B,), B, factor=1.0, last=True)
        wanted = sum(
            pair_parallel_loss(unit_ball(rows), labels, (B,), part, None, None, 64.0, IGNORED)
            for part in head.objective.losses
        )
        torch.testing.assert_close(found.loss, wanted)
        found.loss.backward()
        head.step_done()
        assert head.proxies.count_nonzero() == 0, step
    # The first proxies are the bank's: no image is embedded for them.
    assert head.phases.choosing
    assert head.bank is not None
    head.phases.advance(PoolDrawn())
    head.choose(head.bank.rows, head.bank.filled)
    there = torch.zeros(C, dtype=torch.bool)
    there[labels[labels != IGNORED]] = True
    assert torch.equal(head.present, there)
    leaf = rows.clone().requires_grad_()
    head(leaf, labels, (B,), B, factor=1.0, last=True).loss.backward()
    head.step_done()
    assert head.phases.state.steps_since == 1
