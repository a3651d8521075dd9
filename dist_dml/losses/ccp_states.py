"""Chance-constrained proxies (paper C): what follows what, as a pure state machine.

Problems with K proxies a class follow each other. When one has converged, new proxies are chosen by
greedy k-center (`k_center`) and the next is pulled towards the last one's solution. What the
supplement says and what the code does (papers.md, 4.12) are both options of `CcpPlan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dist_dml.errors import RunError, UsageError
from dist_dml.losses.k_center import CenterDistance

CcpPhase = Literal["warm", "draw", "choose", "train", "evaluate", "finished"]
CcpOrder = Literal["move_anchor", "reset_moments", "keep_solution", "keep_model", "restore_model"]


@dataclass(frozen=True)
class CcpPlan:
    """What stays the same during a run. Defaults are the code's, as the published tables presumably
    come from it, but for `pool`.

    Attributes:
        proxies: K.
        pool_size: b.
        pool: `bank` takes the b latest embeddings of each class from those kept during training;
            `passes` embeds b augmented images of each class anew, as the code does: an epoch of
            inference for each problem on SOP, where the supplement reports 0.4 s. Hence `bank`.
            The first problem's pool is drawn by passes either way, unless there is a warm-up.
        center_distance: the code measures raw vectors (`l2`) although the loss normalises.
        batch_weight: of the loss among the batch's own rows: 0.1 in the code, 0 (none) in the
            supplement. The loss against proxies has weight 1.
        projection: lambda; 0 leaves the term out, which degrades (papers.md, 4.10).
        projection_decay: lambda_t = lambda * decay^t.
        evaluate_every: steps; 25 for CUB and Cars, 250 for SOP and In-Shop.
        problem_patience: evaluations without gain after which a problem has converged.
        run_patience: how long without any gain until the run ends, and
        patience_unit: in what. The supplement says 60 `steps`, but on SOP that is less than one
            evaluation, before any problem can converge; hence the code's `evaluations`.
        least_gain: a score counts as better if it is larger by more than this.
        reset_moments: whether the optimizer forgets re-chosen proxies; the code keeps the moments.
        warmup_steps: of the loss among the batch's rows alone, before the first pool. The paper's
            weights are pretrained; embeddings of an untrained network cover nothing.
    """

    proxies: int = 8
    pool_size: int = 12
    pool: Literal["bank", "passes"] = "bank"
    center_distance: CenterDistance = "l2"
    batch_weight: float = 0.1
    projection: float = 2e-4
    projection_decay: float = 1.0
    evaluate_every: int = 25
    problem_patience: int = 3
    run_patience: int = 60
    patience_unit: Literal["evaluations", "steps"] = "evaluations"
    least_gain: float = 1e-5
    reset_moments: bool = False
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Refuses counts below 1."""
        for key in ("proxies", "pool_size", "evaluate_every", "problem_patience", "run_patience"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key}: got {getattr(self, key)}; expected 1 or more")

    @property
    def random_proxies(self) -> bool:
        """Whether the pool itself becomes the proxies: b = 1 means random samples."""
        return self.pool_size == 1

    @property
    def pool_places(self) -> int:
        """Embeddings of each class that a pool holds: b, and b*K where b is below K."""
        enough = self.pool_size >= self.proxies
        return self.pool_size if enough else self.pool_size * self.proxies

    def draws_at(self, problem: int) -> int:
        """`PoolDrawn` events until a pool is full."""
        return 1 if self.from_bank(problem) else self.pool_places

    def from_bank(self, problem: int) -> bool:
        """Whether a pool is the bank's, which holds nothing before training."""
        return self.pool == "bank" and (problem > 0 or self.warmup_steps > 0)

    def begin(self) -> CcpState:
        """The state before anything has happened."""
        return CcpState(phase="warm" if self.warmup_steps else "draw")

    def projection_at(self, problem: int) -> float:
        """lambda_t: 0 for the first problem, which has no last solution."""
        return self.projection * self.projection_decay**problem if problem > 0 else 0.0


@dataclass(frozen=True)
class CcpState:
    """Where a run stands; with the tensors of the same moment, all that a resumed one needs.

    Those are weights, proxies and moments, the pool so far (`draw`, `choose`), and the copies: the
    problem's best weights and proxies, the last solution's weights, the run's best of both.

    Attributes:
        phase: what the next event is about.
        orders: what the last event asks for, in this order, before the next one. Each may be done
            again: a run resumed from a state saved before or after them does them again.
            `move_anchor`: theta_prev becomes the problem's best weights; the live weights stay.
            `reset_moments`: of the proxies. `keep_solution`, `keep_model`: the live weights and
            proxies are the problem's, the run's best. `restore_model`: the run's best return.
        problem: t.
        draws: of the pool.
        step: updates done.
        steps_since: the last evaluation.
        evaluations: done.
        problem_best: score; none yet in this problem. Each problem begins anew, as in the code.
        problem_stale: evaluations of this problem since.
        run_best: score.
        run_stale: evaluations since.
        run_best_step: updates when it was reached.
    """

    phase: CcpPhase = "draw"
    orders: tuple[CcpOrder, ...] = ()
    problem: int = 0
    draws: int = 0
    step: int = 0
    steps_since: int = 0
    evaluations: int = 0
    problem_best: float | None = None
    problem_stale: int = 0
    run_best: float | None = None
    run_stale: int = 0
    run_best_step: int = 0

    def as_json(self) -> dict[str, Any]:
        """Numbers, strings and a list; `from_json` is the way back, through any JSON file."""
        return {**asdict(self), "orders": list(self.orders)}

    @staticmethod
    def from_json(saved: Mapping[str, Any]) -> CcpState:
        """The state of `as_json`.

        Raises:
            UsageError: if it has other keys.
        """
        wanted = {field.name for field in fields(CcpState)}
        if set(saved) != wanted:
            odd = ", ".join(sorted(set(saved) ^ wanted))
            raise UsageError(
                f"state of chance constraints: missing or unknown {odd}; was it saved by another "
                "version? Start a new run"
            )
        return CcpState(**{**saved, "orders": tuple(saved["orders"])})


@dataclass(frozen=True)
class PoolDrawn:
    """One image of each class was embedded, or the pool was taken from the bank."""


@dataclass(frozen=True)
class ProxiesChosen:
    """The proxies are those of the pool."""


@dataclass(frozen=True)
class StepDone:
    """One update."""


@dataclass(frozen=True)
class Evaluated:
    """The live weights and proxies scored `score`: MAP@R on validation."""

    score: float


CcpEvent = PoolDrawn | ProxiesChosen | StepDone | Evaluated
_AWAITED: dict[CcpPhase, type[CcpEvent]] = {
    "warm": StepDone,
    "draw": PoolDrawn,
    "choose": ProxiesChosen,
    "train": StepDone,
    "evaluate": Evaluated,
}


def next_phase(state: CcpState, event: CcpEvent, plan: CcpPlan) -> CcpState:
    """The state after what has happened (papers.md, 4.2).

    k-center's initial set is the origin while `problem` is 0, the problem's best proxies after.

    Raises:
        RunError: if a score is not a number.
    """
    assert state.phase != "finished", f"{event} after the run's end"
    assert type(event) is _AWAITED[state.phase], f"{event} in the phase {state.phase!r}"
    state = replace(state, orders=())
    match event:
        case PoolDrawn():
            draws = state.draws + 1
            full = draws >= plan.draws_at(state.problem)
            return replace(state, draws=draws, phase="choose" if full else "draw")
        case ProxiesChosen():
            orders = ("reset_moments",) if plan.reset_moments and state.problem > 0 else ()
            return replace(state, phase="train", draws=0, orders=orders)
        case StepDone() if state.phase == "warm":
            over = state.step + 1 >= plan.warmup_steps
            return replace(state, step=state.step + 1, phase="draw" if over else "warm")
        case StepDone():
            since = state.steps_since + 1
            phase = "evaluate" if since >= plan.evaluate_every else "train"
            return replace(state, step=state.step + 1, steps_since=since, phase=phase)
        case Evaluated(score):
            if math.isnan(score):
                raise RunError(f"validation MAP@R is nan after step {state.step}")
            return _after_evaluation(state, score, plan)


def _after_evaluation(state: CcpState, score: float, plan: CcpPlan) -> CcpState:
    orders: list[CcpOrder] = []
    state = replace(state, evaluations=state.evaluations + 1, steps_since=0, phase="train")
    if _better(score, state.problem_best, plan):
        orders.append("keep_solution")
        state = replace(state, problem_best=score, problem_stale=0)
    else:
        state = replace(state, problem_stale=state.problem_stale + 1)
    if _better(score, state.run_best, plan):
        orders.append("keep_model")
        state = replace(state, run_best=score, run_stale=0, run_best_step=state.step)
    else:
        state = replace(state, run_stale=state.run_stale + 1)
    waited = state.run_stale
    if plan.patience_unit == "steps":
        waited = state.step - state.run_best_step
    if waited >= plan.run_patience:
        return replace(state, phase="finished", orders=(*orders, "restore_model"))
    if state.problem_stale >= plan.problem_patience:
        orders.append("move_anchor")
        begun = replace(state, problem=state.problem + 1, problem_best=None, problem_stale=0)
        return replace(begun, phase="draw", orders=tuple(orders))
    return replace(state, orders=tuple(orders))


def _better(score: float, best: float | None, plan: CcpPlan) -> bool:
    return best is None or score > best + plan.least_gain
