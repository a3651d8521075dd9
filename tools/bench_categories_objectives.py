"""What `bench_categories` compares: every objective, as overrides of a configuration.

The same overrides time a step and train a model, so both are of the same objective. Dimensions: C
classes, D features, R rows of a batch, K proxies of a class, b places of its pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_dml.config import Config
from dist_dml.config_loading import resolve

Family = Literal["class weights", "pairs", "proxies"]
# Images of a class in a batch of whole classes, which losses of pairs need.
SAMPLES_PER_CLASS = 4
# Weights and momentum aside: tiles, rows, temporaries of the allocator.
_SLACK_BYTES = 96 * 2**20


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        title: for tables and figures.
        family: what it compares the rows of a batch with.
        overrides: that make it.
        learning_rate: of trainings: the best of three (1e-3, 3e-3, 8e-3) in docs/comparison.md,
            where the objective or the loss that it is made of was tuned on glyphs.
        training: further overrides of a training, which do not change what a step costs.
    """

    title: str
    family: Family
    overrides: tuple[str, ...]
    learning_rate: float = 8e-3
    training: tuple[str, ...] = ()

    @property
    def of_pairs(self) -> bool:
        """Whether batches hold several images of each of their classes."""
        return self.family != "class weights"


def _classes(title: str, *overrides: str) -> Objective:
    # Tiles that fit the caches, as in configs/demo.yaml.
    return Objective(title, "class weights", ("loss.tile_mebibytes=32", *overrides))


_CCP_PROXIES, _CCP_POOL = 4, 7
OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": _classes("cross-entropy", "loss.name=cross_entropy", "loss.similarity=linear"),
    "l1": _classes("L1 (paper A)", "loss.name=l1"),
    "l2": _classes("L2, p = 0.99 (paper A)", "loss.name=l2", "loss.p=0.99"),
    "normalised_softmax": _classes(
        "normalised softmax",
        "loss.name=normalised_softmax",
        "loss.temperature=0.05",
        "loss.init_std=0.1",
    ),
    "arcface": _classes("ArcFace", "loss.name=arcface", "loss.init_std=0.1"),
    "partial_fc": _classes(
        "Partial FC, r = 0.1 (ArcFace)",
        "loss.name=arcface",
        "loss.init_std=0.1",
        "classes.sample=random",
        "classes.sample_rate=0.1",
    ),
    "proxy_anchor": _classes("Proxy-Anchor", "loss.name=proxy_anchor", "loss.init_std=0.1"),
    "spce": Objective("SPCE (paper B)", "pairs", ("loss.name=spce",), 3e-3),
    "multi_similarity": Objective(
        "multi-similarity with miner",
        "pairs",
        ("loss.name=multi_similarity", "loss.mining_epsilon=0.1"),
    ),
    "triplet": Objective(
        "triplet, semi-hard", "pairs", ("loss.name=triplet", "loss.mining=semihard")
    ),
    "xbm": Objective(
        "multi-similarity, memory of 4,096 (XBM)",
        "pairs",
        ("loss.name=multi_similarity", "loss.mining_epsilon=0.1", "loss.memory_size=4096"),
        training=("loss.memory_warmup_steps=50",),
    ),
    "ccp": Objective(
        "multi-similarity, CCP (paper C)",
        "proxies",
        (
            "loss.name=multi_similarity",
            f"proxies.per_class={_CCP_PROXIES}",
            f"proxies.pool_size={_CCP_POOL}",
        ),
        # As in configs/glyphs.yaml: nothing is pretrained, so a warm-up fills the bank.
        training=(
            "proxies.warmup_steps=100",
            "proxies.evaluate_steps=25",
            "proxies.problem_patience=1",
            "proxies.run_patience=1000",
        ),
    ),
}


def step_overrides(name: str, num_classes: int, rows: int, dim: int, threads: int) -> list[str]:
    """The configuration whose step is timed.

    SGD with momentum for all: of Adam's two moments a class weight would need half as much again.

    Args:
        name: of the objective.
        num_classes: C.
        rows: R.
        dim: D.
        threads: of the process.
    """
    objective = OBJECTIVES[name]
    found = [
        f"data.num_classes={num_classes}",
        f"data.batch_size={rows}",
        "data.image={size: 16, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
        f"model.embedding_dim={dim}",
        "model.norm=batch",
        "optimizer.name=sgd",
        "optimizer.learning_rate=1e-3",
        "engine.device=cpu",
        f"engine.threads={threads}",
        *objective.overrides,
    ]
    if objective.of_pairs:
        found += ["data.order=balanced", f"data.samples_per_class={SAMPLES_PER_CLASS}"]
    if objective.family == "proxies":
        # The timed steps are all of one problem: no evaluation interrupts them.
        found += ["proxies.evaluate_steps=1000000", "checkpoint.best_metric=unseen/cosine/map_at_r"]
    return found


def step_config(name: str, num_classes: int, rows: int, dim: int, threads: int) -> Config:
    """`step_overrides` as a configuration."""
    return resolve(None, step_overrides(name, num_classes, rows, dim, threads)).config


def needed_bytes(name: str, num_classes: int, dim: int) -> int:
    """A generous estimate of what an objective's head holds in its steps.

    Class weights: weights, momentum, bias. CCP: proxies, two copies of them, gradient and its sum,
    momentum, and the bank, from which new ones are chosen by as much again.

    Args:
        name: of the objective.
        num_classes: C.
        dim: D.
    """
    family, number = OBJECTIVES[name].family, 4 * num_classes * dim
    if family == "class weights":
        return 2 * number + 16 * num_classes + _SLACK_BYTES
    if family == "proxies":
        return (6 * _CCP_PROXIES + 2 * _CCP_POOL) * number + 16 * num_classes + _SLACK_BYTES
    return 2 * _SLACK_BYTES


def epoch_seconds(step: float, num_classes: int, images_per_class: int, rows: int) -> float:
    """Time of a pass over all images, from that of a step.

    Args:
        step: seconds.
        num_classes: C.
        images_per_class: of each class.
        rows: R.
    """
    return -(-num_classes * images_per_class // rows) * step
