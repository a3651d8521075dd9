"""The head of chance-constrained proxies (paper C): rows against K trained proxies of each class.

Dimensions: r rows of this worker, B of all, c classes of this worker, K proxies and b places in the
pool of a class, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_dml.ccp_phases import CcpPhases, ccp_plan
from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.losses.ccp_states import ProxiesChosen, StepDone
from dist_dml.losses.chance_constraints import unit_ball
from dist_dml.losses.k_center import k_center
from dist_dml.losses.pair_objectives import build_pair_objective, parts_of_rows
from dist_dml.losses.proxy_rules import proxy_rule
from dist_dml.parallel.class_optim import ClassOptimizer
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_equal, gather_uneven
from dist_dml.parallel.feature_bank import FeatureBank
from dist_dml.parallel.heads import ObjectiveOutput
from dist_dml.parallel.pair_parallel import anchors_of_block, pair_parallel_loss
from dist_dml.parallel.proxy_parallel import proxy_parallel_loss
from dist_dml.parallel.proxy_problem import ProxyProblem, block_sizes
from dist_dml.proxy_config import ProxyConfig


class ProxyHead:
    """The `Head` of one objective, `loss.name`, in paper C's algorithm (papers.md, 4.2):

        batch_weight * loss(batch, batch) + loss(batch, all proxies)

    and, while it warms up, in loss(batch, batch) alone.

    Equal to one process that holds all proxies, in value and gradients, proxies and bank included.
    Proxies are trained by the embedder's kind of optimizer, with `optimizer.class_multiplier` and
    `class_weight_decay`, as raw vectors that the loss transforms.

    The loop calls `proxy_pool.prepare_proxies` before each step, `phases.pull` between backward and
    step, and `evaluated` after an evaluation that `phases.evaluation_due` asks for.

    Args:
        config: the proxies.
        loss: the loss section.
        optimizer: of the proxies.
        embedding_dim: D.
        partition: this worker's classes.
        max_rows: the most rows of a batch, all workers together.
        device: where proxies live.
        dtype: of proxies and sums.

    Raises:
        UsageError: for a loss that the algorithm does not take, or a block that cannot hold one row
            against one class.
    """

    def __init__(
        self,
        config: ProxyConfig,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        embedding_dim: int,
        partition: ClassPartition,
        max_rows: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.partition, self.config, self.loss = partition, config, loss
        self.phases = CcpPhases(ccp_plan(config))
        self.objective = build_pair_objective(loss, partition.num_classes)
        self._rules = tuple(proxy_rule(part) for part in self.objective.losses)
        self._device, self._dtype = torch.device(device), dtype
        block_sizes(
            max_rows, partition.size, config.per_class, loss.block_mebibytes, dtype.itemsize
        )
        if config.batch_weight > 0 or config.warmup_steps > 0:
            anchors_of_block(max_rows, loss.block_mebibytes, dtype.itemsize)
        shape = (partition.size, config.per_class, embedding_dim)
        self.proxies = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        # Of the problem's and of the run's best evaluation.
        self._solution, self._best = (torch.zeros_like(self.proxies.detach()) for _ in range(2))
        self.present = torch.zeros(partition.size, dtype=torch.bool, device=device)
        self.optimizer = ClassOptimizer(self.proxies, None, optimizer, ClassesConfig())
        self.bank: FeatureBank | None = None
        if config.pool == "bank":
            places = self.phases.plan.pool_places
            self.bank = FeatureBank(partition, places, embedding_dim, dtype, device)
        self._radius = torch.zeros((), device=device)
        self._pending: tuple[Tensor, Tensor] | None = None
        self._factor = 1.0

    @property
    def device(self) -> torch.device:
        """See `Head`."""
        return self._device

    def __call__(
        self,
        embeddings: Float[Tensor, "r D"],
        labels: Int[Tensor, " r"],
        row_counts: tuple[int, ...],
        batch_rows: int,
        *,
        factor: float,
        last: bool,
    ) -> ObjectiveOutput:
        """See `Head`.

        Raises:
            UsageError: for a batch that was cut into micro-batches.
        """
        if not last or batch_rows != sum(row_counts):
            raise UsageError(
                f"proxies.per_class={self.config.per_class} needs the rows of a batch together: it "
                "takes training.accumulate=1"
            )
        phase = self.phases.state.phase
        assert phase in ("warm", "train"), f"a step in phase {phase!r}"
        group, ignored = self.partition.group, self.loss.ignore_index
        rows = embeddings.to(self._dtype)
        raw = gather_uneven(rows.detach(), row_counts, group)
        all_labels = gather_uneven(labels, row_counts, group)
        problem = ProxyProblem(
            self._rules,
            self.transform,
            self.partition,
            row_counts,
            self.loss.block_mebibytes,
            ignored,
        )
        moved = self.transform(rows)
        weight = 1.0 if self.phases.warming_up else self.config.batch_weight
        total = torch.zeros((), dtype=rows.dtype, device=rows.device)
        if not self.phases.warming_up:
            total = proxy_parallel_loss(
                moved, self.transform(raw), all_labels, self.proxies, self.present, problem
            )
        if weight > 0:
            for loss in self.objective.losses:
                among = pair_parallel_loss(
                    moved, labels, row_counts, loss, group, None, self.loss.block_mebibytes, ignored
                )
                total = total + weight * among
        self._pending, self._factor = (raw, all_labels), factor
        return ObjectiveOutput(total, None)

    def transform(self, vectors: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Rows or proxies as the loss compares them."""
        if self.config.transform == "normalise":
            return F.normalize(vectors, dim=-1)
        return unit_ball(vectors)

    def step_done(self) -> None:
        """Update the proxies, and the bank with the batch's embeddings as they came."""
        assert self._pending is not None, "step_done without a step"
        if not self.phases.warming_up:
            assert self.proxies.grad is not None, "step_done without a backward"
            self.optimizer.step_from(self.proxies.grad, None, self._factor)
            self.proxies.grad = None
        if self.bank is not None:
            self.bank.push(*self._pending, self.loss.ignore_index)
        self._pending = None
        self.phases.advance(StepDone())

    @torch.no_grad()
    def choose(self, pool: Float[Tensor, "c b D"], filled: Bool[Tensor, "c b"]) -> None:
        """New proxies by greedy k-center over a full pool; collective.

        The first problem's cover the origin, later ones the last problem's best proxies. A class
        without embeddings keeps its proxies, if it has any.
        """
        first = self.phases.state.problem == 0
        found = k_center(
            pool,
            self.config.per_class,
            self.config.center_distance,
            None if first else self._solution,
            filled,
        )
        there = found.chosen[:, 0] >= 0
        places = found.chosen.clamp_min(0)[..., None].expand(-1, -1, pool.shape[2])
        chosen = pool.gather(1, places).to(self.proxies)
        self.proxies.copy_(torch.where(there[:, None, None], chosen, self.proxies))
        self.present |= there
        own = torch.stack([found.radii[:, -1].double().sum(), there.double().sum()])
        total, classes = gather_equal(own, self.partition.group).sum(0)
        self._radius = total / classes.clamp_min(1)
        self.phases.advance(ProxiesChosen())
        if "reset_moments" in self.phases.state.orders:
            self.optimizer.load_tensors({})

    @torch.no_grad()
    def evaluated(self, score: float, embedder: nn.Module) -> None:
        """After an evaluation that `phases.evaluation_due` asked for: keep, move on or end.

        Args:
            score: see `CcpPhases.evaluated`.
            embedder: the live one; has the run's best weights where the run has ended.

        Raises:
            RunError: if the score is not a number.
        """
        for order in self.phases.evaluated(score, embedder):
            if order == "keep_solution":
                self._solution.copy_(self.proxies)
            elif order == "keep_model":
                self._best.copy_(self.proxies)
            elif order == "restore_model":
                self.proxies.copy_(self._best)

    def report(self) -> dict[str, float]:
        """`proxies/problem`, and `proxies/covering_radius`: the mean over classes of the largest
        distance of the pool to the proxies that were last chosen. Waits for the device.
        """
        problem = float(self.phases.state.problem)
        return {"proxies/problem": problem, "proxies/covering_radius": float(self._radius)}

    def parts(
        self, rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
        """See `Head`: of the rows among themselves, without proxies."""
        moved = self.transform(rows.to(self._dtype))
        return parts_of_rows(self.objective, moved, labels, self.loss.ignore_index)

    def close(self) -> None:
        """See `Head`: there is nothing to end."""

    def shard_tensors(self) -> dict[str, Tensor]:
        """Proxies, those of the best evaluations, the optimizer's state and the bank."""
        found = {
            "proxies": self.proxies.detach(),
            "solution": self._solution,
            "best": self._best,
            "present": self.present,
            "radius": self._radius,
        }
        return found | self.optimizer.tensors() | ({} if self.bank is None else self.bank.tensors())

    @torch.no_grad()
    def load_shard_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Head`.

        Raises:
            UsageError: if the checkpoint lacks what this configuration trains.
        """
        own = self.shard_tensors()
        if missing := sorted(own.keys() - tensors.keys()):
            raise UsageError(
                f"the checkpoint lacks {', '.join(missing)} of the proxies; resume with the "
                "proxies section that it was written with, or start a new run.name"
            )
        self._radius = tensors["radius"].to(self._radius)
        self.optimizer.load_tensors({n: t for n, t in tensors.items() if n.startswith("weight|")})
        for name, value in own.items():
            if "weight|" not in name and name != "radius":
                value.copy_(tensors[name])

    def shared_tensors(self) -> dict[str, Tensor]:
        """Where the algorithm stands, and the copies of the embedder's weights."""
        return self.phases.tensors()

    def load_shared_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Head`."""
        self.phases.load(tensors)
