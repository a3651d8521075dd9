"""Optimizers: of one worker's class weights, in place, and of the embedder.

Class weights stay outside DDP and DeepSpeed, which would average what belongs to different classes.
They are updated by tiles the moment a tile's gradient is complete, so that no gradient of their
size exists (`class_sweeps.ClassStep` says by which rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.keyed_random import key_of
from dist_dml.parallel.class_sweeps import ClassStep, UpdateTarget
from dist_dml.parallel.class_update import state_names, update_tile_

# Rows that an update from a whole gradient takes at a time, which bounds its temporaries.
_ROWS = 16_384


def class_step(config: OptimizerConfig, classes: ClassesConfig) -> ClassStep:
    """The rule for class weights, at its peak learning rate."""
    rounded = torch.bfloat16 in (weight_dtype(classes), state_dtype(classes))
    name = config.name if classes.optimizer == "same" else classes.optimizer
    return ClassStep(
        name,
        config.learning_rate * config.class_multiplier,
        config.class_weight_decay,
        config.momentum if name == "sgd" else 0.0,
        config.nesterov if name == "sgd" else False,
        config.betas,
        config.epsilon,
        classes.clip_row_norm,
        rounding=classes.rounding if rounded else "nearest",
    )


def weight_dtype(classes: ClassesConfig) -> torch.dtype:
    """Of the class weights."""
    return getattr(torch, classes.weight_dtype)


def state_dtype(classes: ClassesConfig) -> torch.dtype:
    """Of momenta."""
    return getattr(torch, classes.state_dtype)


def state_bytes(rule: ClassStep, classes: ClassesConfig, num_rows: int, num_features: int) -> int:
    """Optimizer state of so many rows of class weights."""
    sizes = {"momentum_buffer": state_dtype(classes).itemsize, "exp_avg_sq": 4, "compensation": 2}
    sizes["exp_avg"] = sizes["momentum_buffer"]
    names = state_names(rule, weight_dtype(classes))
    return sum(num_rows * (4 if name == "sum" else num_features * sizes[name]) for name in names)


class ClassOptimizer:
    """Rule and state of one worker's class weights and biases.

    Args:
        weight: (c, D) or (c, K, D).
        bias: (c,) or None; it knows no weight decay and no clipping.
        config: names and rates.
        classes: optimizer and dtypes of the classes.
        seed: of stochastic rounding.
        first_class: global id of the first class.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        config: OptimizerConfig,
        classes: ClassesConfig,
        seed: int = 0,
        first_class: int = 0,
    ) -> None:
        self.rule = class_step(config, classes)
        self._weight, self._bias = weight, bias
        self._seed, self._first_class = key_of(seed, "rounding") & 0xFFFFFFFF, first_class
        self.num_steps = 0
        moment = torch.float64 if weight.dtype == torch.float64 else state_dtype(classes)
        self.state = _zeros(weight, self.rule, moment)
        self.bias_state = {} if bias is None else _zeros(bias, self.rule, bias.dtype)

    def _step(self, factor: float, ahead: int) -> ClassStep:
        return replace(
            self.rule,
            learning_rate=self.rule.learning_rate * factor,
            step=self.num_steps + ahead,
            seed=self._seed,
            first_class=self._first_class,
        )

    @property
    def update_numbers(self) -> float:
        """Numbers for each of a tile's weights that an update in torch operations holds."""
        rounds = torch.bfloat16 in (
            self._weight.dtype,
            *(state.dtype for state in self.state.values()),
        )
        if not rounds:
            return 1.0 if self.rule.kind in ("adam", "adamw", "adagrad") else 0.0
        return 10.0 if self.rule.rounding == "stochastic" else 5.0

    def target(self, factor: float, apply: Bool[Tensor, ""]) -> UpdateTarget:
        """The next update of the weights, for a sweep; `done` counts it.

        Args:
            factor: the schedule's factor of the learning rate.
            apply: whether to update at all.
        """
        width = self._weight.shape[-1]
        state = {
            name: value.view(-1) if name == "sum" else value.view(-1, width)
            for name, value in self.state.items()
        }
        return UpdateTarget(self._step(factor, 1), state, apply)

    def done(
        self,
        bias_gradient: Float[Tensor, " n"] | None,
        active: Int[Tensor, " n"] | None,
        factor: float,
        apply: Bool[Tensor, ""],
    ) -> None:
        """Count the update and make the biases'.

        Args:
            bias_gradient: of the classes that took part, overwritten; None leaves biases alone.
            active: their local ids; None: all.
            factor: as in `target`.
            apply: as in `target`.
        """
        self.num_steps += 1
        if self._bias is None or bias_gradient is None:
            return
        rule = replace(self._step(factor, 0), weight_decay=0.0, clip_norm=0.0, rounding="nearest")
        target = UpdateTarget(rule, self.bias_state, apply)
        own = self._bias.detach()[:, None]
        # By blocks, so that what an update holds does not grow with the number of classes.
        for start in range(0, len(bias_gradient), _ROWS):
            part = slice(start, min(start + _ROWS, len(bias_gradient)))
            rows = part if active is None else active[part]
            update_tile_(target, own, rows, bias_gradient[part, None].to(own.dtype))

    def step_from(self, gradient: Tensor, bias_gradient: Tensor | None, factor: float) -> None:
        """The whole update from a gradient of the weights' size, which it overwrites."""
        apply = torch.ones((), dtype=torch.bool, device=gradient.device)
        target = self.target(factor, apply)
        width = self._weight.shape[-1]
        weight, gradient = self._weight.detach().view(-1, width), gradient.view(-1, width)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, min(start + _ROWS, len(weight)))
            update_tile_(target, weight, rows, gradient[rows])
        self.done(bias_gradient, None, factor, apply)

    def tensors(self) -> dict[str, Tensor]:
        """The state by `parameter|key`, for example `weight|momentum_buffer`."""
        step = torch.tensor(float(self.num_steps))
        named = {"weight|step": step}
        named |= {f"weight|{name}": value for name, value in self.state.items()}
        return named | {f"bias|{name}": value for name, value in self.bias_state.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; what is missing starts anew."""
        self.num_steps = int(tensors.get("weight|step", torch.zeros(())).item())
        for prefix, state in (("weight", self.state), ("bias", self.bias_state)):
            for name, value in state.items():
                stored = tensors.get(f"{prefix}|{name}")
                value.zero_() if stored is None else value.copy_(stored)


def _zeros(parameter: Tensor, rule: ClassStep, moment: torch.dtype) -> dict[str, Tensor]:
    """The state that a rule starts from. Pages of zeros cost nothing until they are written."""
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    dtypes = {"momentum_buffer": moment, "exp_avg": moment, "compensation": torch.bfloat16}
    state = {}
    for name in state_names(rule, parameter.dtype):
        shape = parameter.shape
        if name == "sum" and parameter.ndim > 1:
            shape = shape[:-1]
        state[name] = torch.zeros(shape, dtype=dtypes.get(name, wide), device=parameter.device)
    return state


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool
) -> torch.optim.Optimizer:
    """SGD, AdamW or Adam over parameter groups that carry their own weight decay.

    Args:
        groups: dicts with `params`, `weight_decay` and optionally `lr`.
        config: names and rates; `learning_rate` is the default of groups without `lr`.
        fused: one in-place kernel a tensor instead of temporaries of the parameters' size.
    """
    groups = [{"lr": config.learning_rate, **group} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=fused,
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=fused
    )


def set_learning_rate(optimizer: Any, base_rates: Iterable[float], factor: float) -> None:
    """Set each group's learning rate to its base rate times the schedule's factor."""
    for group, base in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = base * factor


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """The state as tensors by `parameter|key`, for example `weight|momentum_buffer`.

    Covers all that SGD and Adam keep; state that is not a tensor yet (momentum before the first
    step) is left out.
    """
    return {
        f"{names[parameter]}|{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """The inverse of `optimizer_tensors`: parameters without an entry start anew."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("|", 1)
        by_name.setdefault(name, {})[key] = value
    # Adam counts its steps on the CPU, except in its fused form, which counts on the device.
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, name in names.items():
        if name in by_name:
            optimizer.state[parameter] = {
                key: value.to(parameter.device if value.ndim or is_fused else "cpu", copy=True)
                for key, value in by_name[name].items()
            }
