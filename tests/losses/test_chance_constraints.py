"""Paper C's pure parts: transform, pairs with proxies, projection, and whole runs of its phases."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dist_dml.errors import RunError, UsageError
from dist_dml.losses.ccp_states import (
    CcpEvent,
    CcpPlan,
    CcpState,
    Evaluated,
    PoolDrawn,
    ProxiesChosen,
    StepDone,
    next_phase,
)
from dist_dml.losses.chance_constraints import (
    add_projection_gradients_,
    against_proxies,
    projection_term,
    unit_ball,
)
from dist_dml.losses.contrastive import c1, c2
from dist_dml.losses.multi_similarity import MultiSimilarity
from dist_dml.losses.pairs import AnchorLoss, Comparison, PairLoss, Pairs
from dist_dml.losses.triplet import Triplet


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_transform_keeps_what_lies_inside_and_its_gradient_is_the_formula() -> None:
    inside, edge = torch.tensor([0.3, 0.4]), torch.tensor([1.0, 0.0])
    vectors = torch.stack([inside, edge, 10 * inside, 0 * inside]).double().requires_grad_()
    balls = unit_ball(vectors)
    wanted = torch.tensor([[0.3, 0.4], [1.0, 0.0], [0.6, 0.8], [0.0, 0.0]]).double()
    torch.testing.assert_close(balls, wanted, atol=1e-7, rtol=0)
    upstream = _random(4, 2)
    (gradient,) = torch.autograd.grad(balls, vectors, upstream)
    # Inside, on the sphere and at 0: dy. Outside: (dy - <v_hat, dy> v_hat) / ||v||.
    assert torch.equal(gradient[[0, 1, 3]], upstream[[0, 1, 3]])
    hat = wanted[2]
    outside = (upstream[2] - (hat * upstream[2]).sum() * hat) / 5
    torch.testing.assert_close(gradient[2], outside, atol=1e-7, rtol=0)
    both = torch.cat([3 * _random(5, 4), 0.2 * _random(5, 4, seed=1)]).requires_grad_()
    assert torch.autograd.gradcheck(unit_ball, both)


def test_the_transform_moves_no_two_points_apart() -> None:
    left, right = 2 * _random(500, 3), 2 * _random(500, 3, seed=1)
    before = (left - right).norm(dim=1)
    after = (unit_ball(left) - unit_ball(right)).norm(dim=1)
    assert (after <= before + 1e-12).all()


@dataclass(frozen=True)
class _Naive:
    """A mean over non-zero terms of all three kinds of parts: what a pair is, not what it costs."""

    comparison: Comparison = "l2"

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        near = pairs.values * pairs.same
        far = (2 - pairs.values).clamp_min(0) * pairs.other
        return AnchorLoss(near.sum(1) + far.sum(1), (pairs.same.sum(1) + (far > 0).sum(1)).double())


@pytest.mark.parametrize("comparison", ["l2", "inner"])
def test_rows_meet_all_proxies_and_nothing_else(comparison: Comparison) -> None:
    rows, proxies = _random(6, 3), _random(4, 2, 3, seed=1)
    labels = torch.tensor([10, 12, 12, -1, 13, 99])  # 99 is no class of these proxies.
    found = against_proxies(rows, labels, proxies, _Naive(comparison), -1, first_class=10)
    values, weights = [0.0] * 6, [0.0] * 6
    for i, c, k in product([0, 1, 2, 4, 5], range(4), range(2)):
        proxy = proxies[c, k]
        value = float((rows[i] - proxy).norm() if comparison == "l2" else rows[i] @ proxy)
        same = int(labels[i]) == 10 + c
        term = value if same else max(0.0, 2 - value)
        values[i] += term
        weights[i] += 1 if same or term > 0 else 0
    torch.testing.assert_close(found.values, torch.tensor(values).double(), atol=1e-6, rtol=0)
    assert found.weights.tolist() == weights
    assert found.values[3] == 0


def test_paper_cs_four_losses_against_proxies_are_those_of_its_section() -> None:
    rows, proxies = unit_ball(0.5 * _random(7, 3)), unit_ball(0.6 * _random(3, 2, 3, seed=1))
    labels = torch.tensor([0, 1, 2, 2, 0, 1, 1])
    near, far = [], []  # Of each row: (distance, product) with its class's proxies and the others.
    for row, label in zip(rows, labels, strict=True):
        pairs = [[(float((row - p).norm()), float(row @ p)) for p in own] for own in proxies]
        near.append(pairs.pop(int(label)))
        far.append(pairs[0] + pairs[1])

    def found(*losses: PairLoss) -> float:
        parts = [against_proxies(rows, labels, proxies, loss, -1) for loss in losses]
        return sum(float(part.values.sum() / part.weights.sum()) for part in parts)

    def over_zero(terms: list[float]) -> float:
        kept = [term for term in terms if term > 0]
        assert 0 < len(kept) < len(terms)
        return sum(kept) / len(kept)

    wanted = sum(1 - s for own in near for _, s in own)
    wanted += sum(max(0.0, s - 0.1) for own in far for _, s in own)
    assert math.isclose(found(c1(0.1, "inner")), wanted / 7)
    wanted = over_zero([d - 0.7 for own in near for d, _ in own])
    wanted += over_zero([0.8 - d for own in far for d, _ in own])
    assert math.isclose(found(*c2(0.7, 0.8)), wanted)
    wanted = over_zero(
        [p - n + 0.1 for a, b in zip(near, far, strict=True) for p, _ in a for n, _ in b]
    )
    assert math.isclose(found(Triplet(0.1, reduction="nonzero")), wanted)
    wanted = sum(math.log(1 + sum(math.exp(-2 * (s - 0.3)) for _, s in own)) / 2 for own in near)
    wanted += sum(math.log(1 + sum(math.exp(9 * (s - 0.3)) for _, s in own)) / 9 for own in far)
    assert math.isclose(found(MultiSimilarity(2, 9, 0.3, comparison="inner")), wanted / 7)


def test_the_order_of_a_classs_proxies_is_of_no_account_and_both_sides_learn() -> None:
    rows, proxies = _random(5, 3).requires_grad_(), _random(3, 4, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 2, 0])

    def total(rows: Tensor, proxies: Tensor) -> Tensor:
        return against_proxies(rows, labels, proxies, _Naive(), -1).values.sum()

    turned = total(rows, proxies[:, [2, 0, 3, 1]])
    torch.testing.assert_close(turned, total(rows, proxies))
    assert torch.autograd.gradcheck(total, (rows, proxies))


def test_the_projections_gradient_is_that_of_its_term() -> None:
    weights = [_random(3, 2).requires_grad_(), _random(4, seed=1).requires_grad_()]
    last = [_random(3, 2, seed=2), _random(4, seed=3)]
    term = projection_term(weights, last, 0.3)
    wanted = 0.15 * sum((w - b).square().sum() for w, b in zip(weights, last, strict=True))
    torch.testing.assert_close(term, wanted)
    by_autograd = torch.autograd.grad(term, weights)
    gradients = [_random(3, 2, seed=5), _random(4, seed=6)]
    before = [g.clone() for g in gradients]
    add_projection_gradients_(gradients, weights, last, 0.3)
    for gradient, data, pull in zip(gradients, before, by_autograd, strict=True):
        torch.testing.assert_close(gradient, data + pull)
    assert float(projection_term(last, last, 5.0)) == 0


def test_the_first_problem_is_free_and_later_ones_are_pulled() -> None:
    plan = CcpPlan(projection=0.5, projection_decay=0.5)
    assert [plan.projection_at(t) for t in range(4)] == [0, 0.25, 0.125, 0.0625]
    assert [CcpPlan().projection_at(t) for t in range(3)] == [0, 2e-4, 2e-4]


def test_a_pool_holds_b_or_b_times_k_and_one_means_random_samples() -> None:
    def plan(size: int) -> CcpPlan:
        return CcpPlan(proxies=8, pool_size=size, pool="passes")

    assert [plan(b).pool_places for b in (1, 2, 7, 8, 12)] == [8, 16, 56, 8, 12]
    assert [plan(b).draws_at(3) for b in (1, 2, 12)] == [8, 16, 12]
    assert [plan(b).random_proxies for b in (1, 2)] == [True, False]
    # The bank is empty before training.
    assert [replace(plan(12), pool="bank").draws_at(t) for t in range(3)] == [12, 1, 1]


class _Run:
    """A run in which weights and proxies are numbers, driven by scores; it obeys the orders."""

    def __init__(self, scores: list[float], plan: CcpPlan) -> None:
        self.plan, self.scores = plan, scores
        self.state = CcpState()
        self.live, self.proxies, self.pool = 0, "none", 0
        self.solution, self.model, self.anchor = (0, "origin"), (0, ""), 0
        self.log: list[str] = []

    def snapshot(self) -> str:  # All that a checkpoint holds.
        kept = {k: v for k, v in vars(self).items() if k not in ("state", "plan", "scores")}
        return json.dumps({"state": self.state.as_json(), **kept})

    @staticmethod
    def resumed(text: str, scores: list[float], plan: CcpPlan) -> _Run:
        """The run of a snapshot, which does the orders of its state again."""
        run = _Run(scores, plan)
        kept = json.loads(text)
        run.state = CcpState.from_json(kept.pop("state"))
        vars(run).update(kept)
        run.solution, run.model = tuple(run.solution), tuple(run.model)
        run.obey()
        return run

    def obey(self) -> None:
        for order in self.state.orders:
            if order == "move_anchor":
                self.anchor = self.solution[0]
            elif order == "keep_solution":
                self.solution = (self.live, self.proxies)
            elif order == "keep_model":
                self.model = (self.live, self.proxies)
            elif order == "restore_model":
                self.live, self.proxies = self.model

    def event(self) -> CcpEvent:
        if self.state.phase == "draw":
            self.pool += 1
            return PoolDrawn()
        if self.state.phase == "choose":
            start = self.solution[1] if self.state.problem else "origin"
            self.proxies = f"{self.pool} points at {self.live} past ({start.split()[0]})"
            self.pool = 0
            return ProxiesChosen()
        if self.state.phase == "train":
            self.live += 1
            return StepDone()
        return Evaluated(self.scores[self.state.evaluations])

    def happen(self) -> None:  # One event, whose orders are still to be obeyed.
        phase = self.state.phase
        self.state = next_phase(self.state, self.event(), self.plan)
        orders = "+".join(self.state.orders)
        self.log.append(f"{phase}>{self.state.phase} {orders} {self.state.problem}")

    def finish(self) -> _Run:
        while self.state.phase != "finished":
            self.happen()
            self.obey()
        return self


_SCORES = [0.1, 0.2, 0.2, 0.2, 0.2, 0.15, 0.3, 0.29, 0.3, 0.28, 0.27, 0.26, 0.25, 0.2, 0.1]
_PLAN = CcpPlan(
    proxies=2, pool_size=3, pool="passes", evaluate_every=2, problem_patience=3, run_patience=6
)


def test_a_whole_run_by_hand() -> None:
    run = _Run(_SCORES, _PLAN).finish()
    # Evaluations 0, 1 improve; 2 to 4 do not: problem 1 begins after 5, or 10 updates. It keeps its
    # first score, 0.15 at 5 (each problem begins anew), gains 0.3 at 6, and 7 to 9 do not gain.
    # Problem 2 keeps 0.27 at 10, and nothing after. The run's best is 0.3, at 6; 12 is the sixth
    # without a gain and ends the run.
    assert run.state.problem == 2
    assert run.state.evaluations == 13
    assert run.state.step == 26
    assert (run.state.run_best, run.state.run_best_step) == (0.3, 14)
    assert run.live == 14
    assert run.proxies == "3 points at 10 past (3)"
    assert run.anchor == 14  # The best weights of problem 1, not the last ones (20).
    assert run.state.orders == ("restore_model",)
    assert run.log[:4] == ["draw>draw  0", "draw>draw  0", "draw>choose  0", "choose>train  0"]
    evaluations = [line.removeprefix("evaluate>") for line in run.log if line[0] == "e"]
    both = "train keep_solution+keep_model"
    assert evaluations[:5] == [
        f"{both} 0",
        f"{both} 0",
        "train  0",
        "train  0",
        "draw move_anchor 1",
    ]
    rest = ["train keep_solution 1", f"{both} 1", "train  1", "train  1", "draw move_anchor 2"]
    end = ["train keep_solution 2", "train  2", "finished restore_model 2"]
    assert evaluations[5:] == rest + end


@pytest.mark.parametrize("plan", [_PLAN, replace(_PLAN, pool="bank", reset_moments=True)])
def test_a_run_resumed_anywhere_goes_on_as_if_it_had_not_been_interrupted(plan: CcpPlan) -> None:
    wanted = _Run(_SCORES, plan).finish().snapshot()
    run, phases = _Run(_SCORES, plan), set()
    while run.state.phase != "finished":
        phases.add(run.state.phase)
        obeyed = run.snapshot()
        run.happen()
        saved = run.snapshot()  # Its orders are still to be obeyed, by the run that resumes.
        run.obey()
        for snapshot in (obeyed, saved):
            assert _Run.resumed(snapshot, _SCORES, plan).finish().snapshot() == wanted
    assert phases == {"draw", "choose", "train", "evaluate"}
    assert _Run.resumed(wanted, _SCORES, plan).snapshot() == wanted


def test_a_gain_must_be_larger_than_the_least_one() -> None:
    plan = replace(_PLAN, least_gain=0.25)
    state = CcpState(phase="evaluate", problem_best=0.5, run_best=0.5)
    assert next_phase(state, Evaluated(0.75), plan).run_stale == 1
    after = next_phase(state, Evaluated(0.875), plan)
    assert (after.run_stale, after.run_best, after.problem_best) == (0, 0.875, 0.875)


def test_patience_in_steps_ends_a_run_before_its_second_problem_where_epochs_are_long() -> None:
    plan = CcpPlan(evaluate_every=250, patience_unit="steps")
    run = _Run([0.1, 0.1, 0.9], plan).finish()
    assert (run.state.problem, run.state.evaluations) == (0, 2)
    short = _Run([0.1, 0.1, 0.1, 0.1, 0.1, 0.9], replace(plan, evaluate_every=25)).finish()
    assert (short.state.problem, short.state.step) == (0, 100)  # 50 steps wait, 75 do not.


def test_moments_are_reset_for_re_chosen_proxies_alone_and_only_if_asked_for() -> None:
    for asked in (False, True):
        plan = replace(_PLAN, reset_moments=asked)
        for problem in (0, 1):
            state = next_phase(CcpState(phase="choose", problem=problem), ProxiesChosen(), plan)
            assert state.orders == (("reset_moments",) if asked and problem else ())


def test_events_out_of_turn_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(AssertionError, match="in the phase 'draw'"):
        next_phase(CcpState(), StepDone(), _PLAN)
    with pytest.raises(AssertionError, match="after the run's end"):
        next_phase(CcpState(phase="finished"), StepDone(), _PLAN)
    with pytest.raises(RunError, match="nan after step 7"):
        next_phase(CcpState(phase="evaluate", step=7), Evaluated(math.nan), _PLAN)
    with pytest.raises(UsageError, match="missing or unknown problem_best"):
        CcpState.from_json({k: v for k, v in CcpState().as_json().items() if k != "problem_best"})
    with pytest.raises(UsageError, match="proxies: got 0"):
        CcpPlan(proxies=0)


def test_a_warm_up_is_steps_alone_and_fills_the_first_pool() -> None:
    plan = CcpPlan(proxies=2, pool_size=3, evaluate_every=2, warmup_steps=2)
    state = plan.begin()
    assert state.phase == "warm"
    state = next_phase(state, StepDone(), plan)
    assert (state.phase, state.step) == ("warm", 1)
    state = next_phase(state, StepDone(), plan)
    assert (state.phase, state.step, state.steps_since) == ("draw", 2, 0)
    assert (plan.from_bank(0), plan.draws_at(0)) == (True, 1)
    state = next_phase(state, PoolDrawn(), plan)
    assert state.phase == "choose"
    by_passes = replace(plan, pool="passes")
    assert (by_passes.from_bank(0), by_passes.draws_at(0)) == (False, 3)
    assert CcpPlan().begin() == CcpState()
    assert not CcpPlan().from_bank(0)
