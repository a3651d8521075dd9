"""The configuration of chance-constrained proxies (paper C): how many, from what, until when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_dml.config_types import Count, NonNegative, Positive, Section
from dist_dml.loss_config import LossConfig

# The losses of paper C's algorithm.
PROXY_LOSSES = ("c1", "c2", "triplet", "multi_similarity")


class ProxyConfig(Section):
    """Chance-constrained proxies. Values are paper C's: its supplement and, where the two differ,
    its code, which the published tables presumably come from; `pool` is the exception.
    """

    per_class: Annotated[int, Field(ge=0)] = 0
    """K: proxies of a class that the rows of a batch are compared with; 0 uses none. Paper C: 8 for
    CUB and Cars196, 4 for In-Shop and SOP.
    """
    pool_size: Count = 12
    """b: embeddings of a class that its proxies are chosen from, b * K where b is below K; 1 means
    random images. Paper C: 12 for CUB and Cars196, 7 for In-Shop and SOP.
    """
    pool: Literal["bank", "passes"] = "bank"
    """`bank`: the latest embeddings of each class, kept during training, which cost nothing.
    `passes`: augmented images, embedded anew for each problem as in the paper's code: on SOP that
    is an epoch of inference. The first problem's proxies come from passes either way, unless there
    is a warm-up.
    """
    center_distance: Literal["l2", "cosine"] = "l2"
    """What k-center measures: raw embeddings, as the paper's code, or their directions."""
    transform: Literal["unit_ball", "normalise"] = "unit_ball"
    """Of rows and proxies in the loss: v / max(1, |v|) as in paper C, or v / |v|."""
    batch_weight: NonNegative = 0.1
    """Weight of the loss among the batch's own rows: 0.1 in the paper's code, 0 in its supplement.

    """
    projection: NonNegative = 2e-4
    """lambda of (lambda / 2) * |weights - those of the last solution|^2, from the second problem on
    (2e-4 in paper C, which found 1e-5 to 1e-1 to work); 0 leaves the term out.
    """
    projection_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """lambda_t = lambda * decay^t in the t-th problem."""
    evaluate_steps: Count = 25
    """Steps between two evaluations that decide: 25 for CUB and Cars196, 250 for In-Shop and SOP.

    """
    problem_patience: Count = 3
    """Evaluations without gain after which new proxies are chosen."""
    run_patience: Count = 60
    """How long without any gain until the training ends, with its best weights."""
    patience_unit: Literal["evaluations", "steps"] = "evaluations"
    """Of `run_patience`: evaluations in the paper's code, steps in its supplement, which on SOP
    would end a run before any problem can converge.
    """
    least_gain: Positive = 1e-5
    """What a score must be better by to count as a gain."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the loss among the batch's rows alone before the first proxies are chosen: then they
    come from the bank, if there is one. 0 as in paper C, which begins from pretrained weights: an
    untrained network's embeddings cover nothing.
    """
    reset_moments: bool = False
    """Whether the optimizer forgets new proxies' predecessors; the paper's code keeps the moments.

    """


def proxy_refusal(
    proxies: ProxyConfig, loss: LossConfig, best_metric: str, accumulate: int, engine: str
) -> str:
    """Why a configuration with proxies cannot work, in one line; empty if it can.

    Args:
        proxies: the section.
        loss: likewise.
        best_metric: `checkpoint.best_metric`.
        accumulate: `training.accumulate`.
        engine: `engine.name`.
    """
    if not proxies.per_class:
        for key, field in ProxyConfig.model_fields.items():
            if getattr(proxies, key) != field.default:
                return (
                    f"proxies.{key}={getattr(proxies, key)} is about proxies, and "
                    "proxies.per_class=0 has none; set that or remove it"
                )
        return ""
    has = f"proxies.per_class={proxies.per_class}"
    if loss.name not in PROXY_LOSSES:
        return (
            f"{has} does not fit loss.name={loss.name}; use {', '.join(PROXY_LOSSES)}, or "
            "proxies.per_class=0"
        )
    if loss.name == "triplet" and loss.mining != "all":
        return f"{has} takes all triplets, and loss.mining={loss.mining}; set loss.mining=all"
    if loss.mining_epsilon is not None:
        return (
            f"{has} takes all pairs, and loss.mining_epsilon={loss.mining_epsilon:g} mines them; "
            "set loss.mining_epsilon=null"
        )
    if loss.comparison == "inner":
        return (
            f"{has} compares vectors in the unit ball, and loss.comparison=inner asks for them as "
            "they come; use cosine or l2"
        )
    if loss.memory_size:
        return (
            f"{has} and loss.memory_size={loss.memory_size} are two answers to small batches; set "
            "loss.memory_size=0 or proxies.per_class=0"
        )
    if loss.label_sets:
        return (
            f"{has} has proxies of classes, and loss.label_sets={loss.label_sets} puts classes "
            "into several sets; set loss.label_sets= or proxies.per_class=0"
        )
    if accumulate > 1:
        return (
            f"{has} needs the rows of a batch together, and training.accumulate={accumulate}; set "
            "training.accumulate=1"
        )
    if not best_metric:
        return (
            f"{has} converges by a validation score, and checkpoint.best_metric is empty; set it, "
            "for example to unseen/cosine/map_at_r"
        )
    if engine == "deepspeed":
        return (
            f"{has} brings weights back that engine.name=deepspeed holds copies of; set "
            "engine.name=auto, ddp or single"
        )
    return ""
