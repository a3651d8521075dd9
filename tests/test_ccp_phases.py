"""Phases of chance-constrained proxies around the embedder: pull, copies, state, configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_dml.ccp_phases import CcpPhases, ccp_plan
from dist_dml.config import Config
from dist_dml.errors import RunError, UsageError
from dist_dml.losses.ccp_states import (
    CcpPlan,
    PoolDrawn,
    ProxiesChosen,
    StepDone,
)
from dist_dml.losses.chance_constraints import projection_term
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.proxy_config import ProxyConfig
from dist_dml.proxy_pool import drawn_members, members_of

CONFIG = {"proxies": {"per_class": 2}, "loss": {"name": "c2"}}


def phases_of(**keys: Any) -> CcpPhases:
    given = {"per_class": 2, "pool_size": 2, "evaluate_steps": 1, "problem_patience": 1} | keys
    return CcpPhases(ccp_plan(ProxyConfig.model_validate(given)))


def model(start: float) -> nn.Linear:
    found = nn.Linear(2, 3)
    for parameter in found.parameters():
        nn.init.constant_(parameter, start)
    return found


def one_step(phases: CcpPhases) -> None:
    """Up to the next evaluation, with new proxies if they are asked for."""
    while phases.state.phase == "draw":
        phases.advance(PoolDrawn())
    if phases.state.phase == "choose":
        phases.advance(ProxiesChosen())
    phases.advance(StepDone())


def pulled(phases: CcpPhases, embedder: nn.Module) -> list[Tensor]:
    """What `pull` adds to gradients of zero."""
    for parameter in embedder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    phases.pull(embedder)
    return [p.grad for p in embedder.parameters() if p.grad is not None]


def test_from_the_second_problem_on_weights_are_pulled_to_the_last_ones_best() -> None:
    phases, embedder = phases_of(projection=0.3, projection_decay=0.5), model(2.0)
    one_step(phases)
    assert not any(bool(gradient.any()) for gradient in pulled(phases, embedder))
    phases.evaluated(0.6, embedder)  # The best, at 2.
    nn.init.constant_(embedder.weight, 3.0)
    one_step(phases)
    phases.evaluated(0.5, embedder)  # Converged: the live weights stay as they are.
    assert phases.state.problem == 1
    assert (embedder.weight == 3.0).all()
    live = [parameter.detach().clone().requires_grad_() for parameter in embedder.parameters()]
    best = [parameter.detach() for parameter in model(2.0).parameters()]
    term = projection_term(live, best, 0.3 * 0.5)
    for got, expected in zip(
        pulled(phases, embedder), torch.autograd.grad(term, live), strict=True
    ):
        torch.testing.assert_close(got, expected)
    assert (embedder.weight.grad == 0.3 * 0.5).all()


def test_parameters_without_a_gradient_are_left_alone() -> None:
    phases, embedder = phases_of(projection=1.0), model(2.0)
    for score in (0.6, 0.5):
        one_step(phases)
        phases.evaluated(score, embedder)
    embedder.bias.requires_grad_(False)
    nn.init.constant_(embedder.bias, 9.0)
    assert len(pulled(phases, embedder)) == 2  # Zeros were put there,
    embedder.bias.grad = None
    phases.pull(embedder)
    assert embedder.bias.grad is None  # and here is nothing to add to.


def test_a_state_restored_at_any_time_goes_on_alike() -> None:
    scores = [0.3, 0.2, 0.5, 0.6, 0.6, 0.4, 0.3, 0.2, 0.1]

    def run(stop: int | None) -> tuple[list[Tensor], CcpPhases]:
        phases, embedder = phases_of(run_patience=4, projection=0.1), model(1.0)
        for number, score in enumerate(scores):
            if number == stop:
                saved = {name: value.clone() for name, value in phases.tensors().items()}
                phases = phases_of(run_patience=4, projection=0.1)
                phases.load(saved)
            if phases.finished:
                break
            one_step(phases)
            embedder.weight.data += number
            embedder.weight.data -= 0.5 * pulled(phases, embedder)[0]
            phases.evaluated(score, embedder)
        return [p.detach() for p in embedder.parameters()], phases

    expected, whole = run(None)
    assert whole.finished
    assert whole.state.problem > 1
    for stop in range(1, whole.state.evaluations + 1):
        got, resumed = run(stop)
        assert resumed.state == whole.state
        assert resumed.tensors().keys() == whole.tensors().keys()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_end_brings_the_runs_best_weights_back() -> None:
    phases, embedder = phases_of(run_patience=2), model(1.0)
    for number, score in enumerate((0.3, 0.7, 0.2, 0.6)):
        nn.init.constant_(embedder.weight, float(number))
        one_step(phases)
        phases.evaluated(score, embedder)
    assert phases.finished
    assert (embedder.weight == 1.0).all()


def test_a_checkpoint_without_proxies_and_a_score_that_is_none_are_refused() -> None:
    with pytest.raises(UsageError, match="without chance-constrained proxies"):
        phases_of().load({"rows": torch.zeros(2)})
    phases = phases_of()
    one_step(phases)
    with pytest.raises(RunError, match="nan"):
        phases.evaluated(float("nan"), model(1.0))


def test_every_key_reaches_the_plan() -> None:
    values = {
        "per_class": 3,
        "pool_size": 9,
        "pool": "passes",
        "center_distance": "cosine",
        "batch_weight": 0.0,
        "projection": 0.7,
        "projection_decay": 0.9,
        "evaluate_steps": 6,
        "problem_patience": 5,
        "run_patience": 4,
        "patience_unit": "steps",
        "least_gain": 0.2,
        "reset_moments": True,
        "warmup_steps": 8,
    }
    plan = ccp_plan(ProxyConfig.model_validate(values))
    assert plan == CcpPlan(3, 9, "passes", "cosine", 0.0, 0.7, 0.9, 6, 5, 4, "steps", 0.2, True, 8)
    assert ccp_plan(ProxyConfig(per_class=8)) == CcpPlan()  # The same defaults.
    assert {*values, "transform"} == set(ProxyConfig.model_fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"proxies": {"pool_size": 5}}, "proxies.per_class=0 has none"),
        ({"loss": {"name": "cross_entropy"}}, "loss.name=cross_entropy; use c1, c2"),
        ({"loss": {"name": "contrastive"}}, "loss.name=contrastive; use c1, c2"),
        ({"loss": {"name": "triplet", "mining": "batch_hard"}}, "set loss.mining=all"),
        (
            {"loss": {"name": "multi_similarity", "mining_epsilon": 0.1}},
            "set loss.mining_epsilon=null",
        ),
        ({"loss": {"name": "triplet", "comparison": "inner"}}, "loss.comparison=inner"),
        ({"loss": {"name": "c1", "memory_size": 64}}, "loss.memory_size=64"),
        ({"training": {"accumulate": 2}}, "training.accumulate=2"),
        ({"checkpoint": {"best_metric": ""}}, "checkpoint.best_metric is empty"),
        ({"engine": {"name": "deepspeed"}}, "engine.name=deepspeed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_proxies_is_refused(change: dict[str, Any], words: str) -> None:
    Config.model_validate(CONFIG)
    with pytest.raises(ValueError, match="(?s).*" + words.replace(".", r"\.")) as caught:
        Config.model_validate(CONFIG | change)
    assert "\n" not in str(caught.value.errors()[0]["msg"])  # type: ignore[attr-defined]


def test_images_of_a_pool_are_drawn_by_class_for_any_number_of_workers() -> None:
    draw = np.random.default_rng(0)
    sample_ids = draw.permutation(500)[:300]
    class_ids = draw.integers(0, 11, 300)
    class_ids[class_ids == 6] = 7  # A class without images.

    def chosen(workers: int, seed: int, problem: int, at: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for rank in range(workers):
            partition = ClassPartition.of_worker(rank, workers, 12)
            classes, members = members_of(class_ids, sample_ids, partition)
            drawn = drawn_members(members, classes, seed, problem, at)
            found |= dict(zip(classes.tolist(), drawn.tolist(), strict=True))
        return found

    alone = chosen(1, 0, 0, 0)
    assert list(alone) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    by_id = dict(zip(sample_ids.tolist(), class_ids.tolist(), strict=True))
    assert all(by_id[sample] == label for label, sample in alone.items())
    for workers in (2, 3, 12):
        assert chosen(workers, 0, 0, 0) == alone
    others = [chosen(1, *key) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(sum(other[label] == alone[label] for label in alone) < 5 for other in others)
    # Every image of a class can be drawn.
    drawn = {chosen(1, 0, 0, at)[2] for at in range(600)}
    assert drawn == {sample for sample, label in by_id.items() if label == 2}
