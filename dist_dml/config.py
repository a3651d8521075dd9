"""The configuration of a run: what every key means, its default, and which values are refused.

Every model is frozen and refuses unknown keys. `dist_dml.config_loading` merges the defaults with a
YAML file and the `section.key=value` arguments, and turns a refusal into one line with a remedy.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_dml.class_config import ClassesConfig
from dist_dml.config_types import Count, Fraction, NonNegative, Positive, Section
from dist_dml.data_config import DataConfig
from dist_dml.evaluation_config import EvaluationConfig
from dist_dml.loss_config import LossConfig
from dist_dml.loss_tables import COUPLED_LOSSES
from dist_dml.proxy_config import ProxyConfig, proxy_refusal


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: Annotated[str, Field(min_length=1)] = "run"
    """Name of the run: its folder below `root` and its name in MLflow."""
    root: str = "runs"
    """Folder that holds all runs and, by default, the MLflow database."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number is drawn from this seed, a purpose, the step and the position in the
    batch.
    """
    resume: str = "no"
    """`no`: refuse a folder that already holds a run. `auto`: continue from its newest intact
    checkpoint, or start. A path: continue from that checkpoint. `--resume VALUE` sets this key."""
    accept_changed_data: bool = False
    """Resume although the data or the order of the samples differ from the checkpoint's: the epoch
    goes on at the same share of the new plan. Without it a difference is refused, and shown."""

    @model_validator(mode="after")
    def _name_below_root(self) -> RunConfig:
        parts = PurePosixPath(self.name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in self.name:
            raise ValueError(
                f"run.name={self.name!r} leads out of run.root; give a name below it, and choose "
                "the folder with run.root"
            )
        return self


class ModelConfig(Section):
    """The embedder: a backbone and a neck."""

    backbone: str = "small_conv"
    """`small_conv`, `bn_inception` (paper C), or any timm model as `timm:NAME`."""
    pretrained: bool = False
    """Start from timm's published weights (downloads them)."""
    weights: str = ""
    """Start the backbone from this local file (safetensors, or a .pth of tensors only)."""
    pooling: Literal["average", "max", "average_max", "gem"] = "average"
    """How the feature map becomes one vector; paper B: average."""
    embedding_dim: Annotated[int, Field(ge=0)] = 0
    """Width of a linear layer after pooling; 0 uses the backbone's features directly (paper B)."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Normalisation of the embedding, without affine parameters. Paper B: batch (but none on CUB).
    
    """
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout between embedding and classifier, never in retrieval. Paper B: 0.5."""
    frozen_batch_norm: bool = False
    """Batch norms of the backbone keep their statistics, also in training (papers B and C)."""


class OptimizerConfig(Section):
    """One kind of optimizer for the embedder and for the class weights."""

    name: Literal["sgd", "adamw", "adam"] = "adamw"
    """`sgd` (with momentum), `adamw` (decoupled decay) or `adam` (decay in the gradient)."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the embedder."""
    class_multiplier: Positive = 1.0
    """Learning rate of class weights and proxies over that of the embedder."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum of SGD."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay rates of Adam's two moments."""
    epsilon: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of parameters with two or more dimensions: biases and norms have none."""
    class_weight_decay: NonNegative = 0.0
    """Weight decay of the class weights."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the embedder's gradient; 0 does not clip."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError(
                "optimizer.nesterov=true needs momentum; set optimizer.momentum above 0 "
                "or optimizer.nesterov=false"
            )
        return self


class ScheduleConfig(Section):
    """The factor of the learning rate at each step."""

    name: Literal["constant", "cosine", "step"] = "cosine"
    """After the warm-up: constant, cosine to `final_factor`, or steps down at `milestones`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; the factor is the smaller of warm-up and schedule (paper B)."""
    final_factor: Fraction = 0.0
    """Factor at the end of the cosine."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Shares of the training at which `step` multiplies the factor by `decay`."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of each step down."""


class TrainingConfig(Section):
    """How long, and in how many pieces a batch is computed."""

    epochs: Count = 10
    """Passes over the training split."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after this many optimizer steps; 0 trains all epochs. The schedule follows the shorter.
    
    """
    max_seconds: NonNegative = 0.0
    """Stop after this many seconds of training, evaluations and checkpoints not counted; 0 sets no
    limit. The schedule follows whichever of time and steps is nearer its end.
    """
    accumulate: Count = 1
    """Micro-batches of each global batch: one backward each, one optimizer step for all."""
    rollback_checkpoints: Annotated[int, Field(ge=0)] = 0
    """What follows a loss or gradient that is not finite. 0: the run ends. n: it goes back to the
    nth newest checkpoint (1: the newest) and passes over the batch when it comes there again.
    """
    max_skipped: Count = 10
    """Batches that a run passes over before it ends after all."""


class EngineConfig(Section):
    """What replicates the embedder and in which precision."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """`auto`: DeepSpeed under its launcher, DDP with several workers, otherwise one process."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's sharding of optimizer state (1) and gradients (2)."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """`bfloat16`: autocast of the embedder. `float64`: embedder, classes and sums, to compare
    layouts with; not with DeepSpeed. float16 is refused: its loss scaling cannot reach the
    classifier.
    """
    deterministic: bool = False
    """Equal runs on equal layouts, bit by bit, also on GPUs; see docs/determinism.md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each worker; 0 divides the cores of this machine, or those that its
    container allows, among the workers on it."""
    timeout_seconds: Positive = 600.0
    """Longest wait for the other workers in one collective, and for one batch of data."""
    slow_seconds: Positive = 60.0
    """Seconds in one place (data, step, checkpoint, ...) after which the worker and the place are
    named, and again after twice the time.
    """


class CheckpointConfig(Section):
    """What is kept of a run."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Save every this many steps; 0 saves only at the end of epochs."""
    every_epochs: Annotated[int, Field(ge=0)] = 1
    """Save every this many epochs; 0 saves by steps and at the end only."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    best_metric: str = "unseen/cosine/map_at_r"
    """Score whose best checkpoint is kept as well (higher is better); empty keeps none."""
    background: bool = True
    """Write a copy of the state while training goes on. Takes the memory of that copy."""


class TrackingConfig(Section):
    """What is written down while training."""

    every_steps: Count = 10
    """Steps between two records of loss, rates and times."""
    diagnostics: bool = True
    """With each record, entropies, radii and the loss's parts of the batch (docs/pairwise.md)."""
    mlflow: bool = True
    """Mirror the records to MLflow, from a process of its own beside worker 0."""
    mlflow_uri: str = ""
    """Tracking server or database; empty uses sqlite in `run.root`. Secrets as `${NAME}`, from the
    environment (docs/security.md)."""
    experiment: str = "dist_dml"
    """MLflow experiment."""
    parent: str = ""
    """`run_id` (of run.json) of the study or protocol that this run belongs to: in MLflow it stands
    below that one. Set by what starts several runs."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Further tags in MLflow, for its filters and comparisons."""
    system_metrics: bool = True
    """Record processor, memory and GPU use in MLflow."""


class Config(Section):
    """A whole run. `dist-dml config schema` prints all of it as JSON Schema."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    proxies: ProxyConfig = ProxyConfig()
    classes: ClassesConfig = ClassesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _engine_fits(self) -> Config:
        engine = self.engine
        if engine.precision == "float64":
            if engine.name == "deepspeed":
                raise ValueError(
                    "engine.precision=float64 is not for engine.name=deepspeed; use ddp or single"
                )
            if self.classes.weight_dtype != "float32" or self.classes.state_dtype != "float32":
                raise ValueError(
                    "engine.precision=float64 keeps classes in float64 too; leave "
                    "classes.weight_dtype and classes.state_dtype at float32"
                )
        if engine.deterministic and self.training.max_seconds:
            raise ValueError(
                "engine.deterministic=true, but training.max_seconds="
                f"{self.training.max_seconds:g} ends a run by the clock; set training.max_steps"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if refusal := proxy_refusal(
            self.proxies,
            self.loss,
            self.checkpoint.best_metric,
            self.training.accumulate,
            self.engine.name,
        ):
            raise ValueError(refusal)
        if self.training.accumulate > self.data.batch_size:
            raise ValueError(
                f"training.accumulate={self.training.accumulate} exceeds "
                f"data.batch_size={self.data.batch_size}; a micro-batch needs a row"
            )
        if self.training.accumulate > 1 and self.loss.name in COUPLED_LOSSES:
            raise ValueError(
                f"training.accumulate={self.training.accumulate} cuts the batch, but the rows of "
                f"loss.name={self.loss.name} depend on each other; set training.accumulate=1"
            )
        if self.loss.of_pairs:
            for key, field in ClassesConfig.model_fields.items():
                if getattr(self.classes, key) != field.default:
                    raise ValueError(
                        f"classes.{key}={getattr(self.classes, key)} is about class weights, and "
                        f"loss.name={self.loss.name} compares pairs and has none; remove it"
                    )
        if self.training.accumulate > 1 and self.classes.sample != "all":
            raise ValueError(
                f"classes.sample={self.classes.sample} needs the labels of the whole batch before "
                f"its first micro-batch, and training.accumulate={self.training.accumulate}; set "
                "training.accumulate=1 or classes.sample=all"
            )
        return self
