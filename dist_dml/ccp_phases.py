"""Where a training with chance-constrained proxies stands, and the weights that it remembers.

`losses.ccp_states` says what follows what. This module carries out what concerns the
embedder: it keeps copies of its weights, pulls it towards the last solution, and brings the best
back. All of it is the same on every worker; the head carries out what concerns the proxies.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from dist_dml.errors import UsageError
from dist_dml.losses.ccp_states import (
    CcpEvent,
    CcpOrder,
    CcpPlan,
    CcpState,
    Evaluated,
    next_phase,
)
from dist_dml.losses.chance_constraints import add_projection_gradients_
from dist_dml.proxy_config import ProxyConfig

# The copies: the problem's best weights, the last problem's (theta_prev), and the run's best.
SOLUTION, LAST, BEST = "solution", "last", "best"
_STATE = "ccp|state"


def ccp_plan(config: ProxyConfig) -> CcpPlan:
    """The plan of a configuration with proxies."""
    return CcpPlan(
        proxies=config.per_class,
        pool_size=config.pool_size,
        pool=config.pool,
        center_distance=config.center_distance,
        batch_weight=config.batch_weight,
        projection=config.projection,
        projection_decay=config.projection_decay,
        evaluate_every=config.evaluate_steps,
        problem_patience=config.problem_patience,
        run_patience=config.run_patience,
        patience_unit=config.patience_unit,
        least_gain=config.least_gain,
        reset_moments=config.reset_moments,
        warmup_steps=config.warmup_steps,
    )


class CcpPhases:
    """State and copies of weights, of which there are at most three.

    Args:
        plan: what stays the same.
    """

    def __init__(self, plan: CcpPlan) -> None:
        self.plan, self.state = plan, plan.begin()
        self._weights: dict[str, dict[str, Tensor]] = {}

    def advance(self, event: CcpEvent) -> None:
        """The state after an event other than an evaluation."""
        assert not isinstance(event, Evaluated), "an evaluation has orders: call `evaluated`"
        self.state = next_phase(self.state, event, self.plan)

    @torch.no_grad()
    def evaluated(self, score: float, embedder: nn.Module) -> tuple[CcpOrder, ...]:
        """The state after an evaluation, and what it asks of the embedder carried out.

        Args:
            score: MAP@R of the live weights and proxies on validation, the same on every worker.
            embedder: the live one.

        Returns:
            The orders, for the head to carry out what concerns proxies.

        Raises:
            RunError: if the score is not a number.
        """
        self.state = next_phase(self.state, Evaluated(score), self.plan)
        for order in self.state.orders:
            match order:
                case "keep_solution":
                    self._weights[SOLUTION] = _copy(embedder)
                case "keep_model":
                    self._weights[BEST] = _copy(embedder)
                case "move_anchor":
                    self._weights[LAST] = self._weights.pop(SOLUTION)
                case "restore_model":
                    embedder.load_state_dict(self._weights[BEST])
                case "reset_moments":
                    raise AssertionError("no evaluation asks for it")
        return self.state.orders

    def pull(self, embedder: nn.Module) -> None:
        """Add the gradient of (lambda_t / 2) * |weights - last solution|^2 to the embedder's.

        Belongs between the backward, which averages over workers, and the step, which clips. Costs
        a buffer of the largest weight.
        """
        strength = self.plan.projection_at(self.state.problem)
        last = self._weights.get(LAST)
        if strength == 0 or last is None:
            return
        pulled = [(n, p) for n, p in embedder.named_parameters() if p.grad is not None]
        add_projection_gradients_(
            [p.grad for _, p in pulled if p.grad is not None],
            [p.detach() for _, p in pulled],
            [last[name].to(p) for name, p in pulled],
            strength,
        )

    @property
    def choosing(self) -> bool:
        """Whether new proxies are to be chosen before the next step."""
        return self.state.phase in ("draw", "choose")

    @property
    def warming_up(self) -> bool:
        """Whether there are no proxies yet."""
        return self.state.phase == "warm"

    @property
    def evaluation_due(self) -> bool:
        """Whether the next event is an evaluation."""
        return self.state.phase == "evaluate"

    @property
    def finished(self) -> bool:
        """Whether the training has ended; the embedder then has its best weights."""
        return self.state.phase == "finished"

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for one worker to write: the state as bytes of JSON, copies as
        `solution|NAME`, `last|NAME`, `best|NAME`.
        """
        text = json.dumps(self.state.as_json()).encode()
        found = {_STATE: torch.tensor(list(text), dtype=torch.uint8)}
        for kind, weights in self._weights.items():
            found |= {f"{kind}|{name}": value for name, value in weights.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`.

        Raises:
            UsageError: if they are not those of a training with proxies.
        """
        if _STATE not in tensors:
            raise UsageError(
                "the checkpoint was written without chance-constrained proxies; resume with "
                "proxies.per_class=0, or start a new run.name"
            )
        self.state = CcpState.from_json(json.loads(bytes(tensors[_STATE].cpu().tolist())))
        self._weights = {}
        for full_name, value in tensors.items():
            kind, name = full_name.split("|", 1)
            if full_name != _STATE:
                self._weights.setdefault(kind, {})[name] = value.clone()


def _copy(embedder: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in embedder.state_dict().items()}
