"""What is searched: a YAML file of dotted configuration keys with distributions, and a budget.

    space:
      optimizer.learning_rate: {log_uniform: [1e-4, 3e-2]}
      loss.name: {choice: [cross_entropy, arcface]}
      loss.angle_margin: {uniform: [0.1, 0.6], when: {loss.name: [arcface]}}
    budget: {trials: 16}

docs/tuning.md describes every key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.config_types import Count, Fraction, NonNegative, Positive, Section
from dist_dml.credentials import check_values
from dist_dml.errors import UsageError
from dist_dml.plain_yaml import load_plain

Value = bool | int | float | str | list[Any] | dict[str, Any] | None
"""Of a configuration key."""
_KINDS = ("uniform", "log_uniform", "integer", "log_integer", "choice")


class Distribution(Section):
    """What one key may be: exactly one of the kinds."""

    uniform: tuple[float, float] | None = None
    """Low and high end."""
    log_uniform: tuple[Positive, Positive] | None = None
    integer: tuple[int, int] | None = None
    """Both ends count."""
    log_integer: tuple[Count, Count] | None = None
    choice: tuple[Value, ...] | None = None
    step: Positive | None = None
    """Of `uniform` and `integer`: only low, low + step, ..."""
    when: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    """Only where each of these keys of the space, named before, has one of its values."""

    @model_validator(mode="after")
    def _is_one(self) -> Distribution:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"has {given or 'no distribution'}; give one of {', '.join(_KINDS)}")
        content = getattr(self, given[0])
        if self.kind == "choice":
            if not content:
                raise ValueError("choice has no values; give at least one")
        elif not content[0] < content[1]:
            raise ValueError(f"{self.kind} goes from {content[0]} to {content[1]}; low comes first")
        if self.step and self.kind not in ("uniform", "integer"):
            raise ValueError(f"step goes with uniform and integer, not with {self.kind}")
        if self.step and self.kind == "integer" and self.step != int(self.step):
            raise ValueError(f"step={self.step} of an integer; give a whole number")
        return self

    @property
    def kind(self) -> str:
        """Which one it is."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    def examples(self) -> list[Value]:
        """Values that show whether the key takes such ones: both ends, or all choices."""
        return list(getattr(self, self.kind))

    def holds(self, value: Value) -> bool:
        """Whether it can propose the value."""
        if self.kind == "choice":
            return value in (self.choice or ())
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = getattr(self, self.kind)
        whole = self.kind in ("integer", "log_integer")
        return low <= value <= high and (not whole or value == int(value))


class BudgetConfig(Section):
    """When the search ends."""

    trials: Count = 20
    """Trials that are begun, those of earlier starts included."""
    hours: NonNegative = 0.0
    """After which no further trial begins; 0 for no limit. Running trials end as they would."""


class StopConfig(Section):
    """Ends trials that fall behind: asynchronous successive halving (ASHA)."""

    name: Literal["asha", "none"] = "asha"
    grace: Fraction = 0.25
    """Share of its training that every trial gets. Trials are compared there, and each time this
    share has grown by `reduction`."""
    reduction: Positive = 3.0
    """One of so many goes on."""

    @model_validator(mode="after")
    def _can_stop(self) -> StopConfig:
        if self.reduction <= 1:
            raise ValueError(f"reduction={self.reduction:g}; give more than 1")
        if not 0.01 <= self.grace <= 1:
            raise ValueError(f"grace={self.grace:g}; give a share from 0.01 to 1")
        return self


class TrialConfig(Section):
    """What one trial takes."""

    workers: Count = 1
    """Training processes of a trial; more than one come from Ray Train."""
    cpus: Positive = 1.0
    """Of each worker."""
    gpus: NonNegative = 0.0
    """Of each worker; fractions share a GPU."""
    concurrent: NonNegative = 0
    """Trials at the same time; 0 for as many as fit."""

    @model_validator(mode="after")
    def _is_placeable(self) -> TrialConfig:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus={self.gpus:g}; above 1 give a whole number")
        if self.concurrent != int(self.concurrent):
            raise ValueError(f"concurrent={self.concurrent:g}; give a whole number")
        return self


class ConfirmConfig(Section):
    """The best configuration beside the unchanged one, trained again with other seeds."""

    seeds: int = 0
    """Of each; 0 leaves it out."""
    metric: str = ""
    """What is compared: PROTOCOL/DISTANCE/SCORE of images that the search has not seen, at the
    checkpoint that the search's metric chooses."""

    @model_validator(mode="after")
    def _has_metric(self) -> ConfirmConfig:
        if self.seeds < 0 or self.seeds == 1:
            raise ValueError(f"seeds={self.seeds}; an interval needs 2 or more, 0 leaves it out")
        if self.seeds and not self.metric:
            raise ValueError("seeds without metric; name PROTOCOL/DISTANCE/SCORE of the test")
        return self


class ClusterConfig(Section):
    """What an autoscaler may bring: Ray itself knows of the machines that are there."""

    cpus: NonNegative = 0.0
    gpus: NonNegative = 0.0


class SearchConfig(Section):
    """A search file."""

    space: dict[str, Distribution]
    sampler: Literal["tpe", "random", "gp"] = "tpe"
    """Optuna's tree-structured Parzen estimator, independent draws, or a Gaussian process."""
    seed: int = 0
    """Of the proposals."""
    metric: str = ""
    """PROTOCOL/DISTANCE/SCORE; empty takes checkpoint.best_metric. More is better."""
    start: tuple[dict[str, Value], ...] = ()
    """Settings that are tried first."""
    budget: BudgetConfig = BudgetConfig()
    stop: StopConfig = StopConfig()
    trial: TrialConfig = TrialConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _conditions_are_known(self) -> SearchConfig:
        if not self.space:
            raise ValueError("space is empty; name at least one key")
        before: list[str] = []
        for key, distribution in self.space.items():
            for other, values in distribution.when.items():
                if other not in before:
                    raise ValueError(
                        f"space.{key}: when names {other}, which the space does not have before "
                        f"it; it has {', '.join(before) or 'nothing'}"
                    )
                strange = [value for value in values if not self.space[other].holds(value)]
                if strange:
                    raise ValueError(
                        f"space.{key}: when wants {other}={strange[0]!r}, which {other} never is"
                    )
            before.append(key)
        for setting in self.start:
            for key, value in setting.items():
                if key not in self.space or not self.space[key].holds(value):
                    raise ValueError(f"start: {key}={value!r} is not of the space")
        return self

    def active(self, key: str, chosen: Mapping[str, Value]) -> bool:
        """Whether the key is part of a trial that has chosen these values."""
        conditions = self.space[key].when
        return all(k in chosen and chosen[k] in allowed for k, allowed in conditions.items())


def load_search(path: str | Path) -> SearchConfig:
    """Read a search file.

    Raises:
        UsageError: one line: the file, the key, what is expected.
    """
    path = Path(path)
    try:
        content = load_plain(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"--search {path}: no such file; see configs/search/ for examples"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {type(content).__name__}; expected sections, see `space:`")
    check_values(content)
    try:
        return SearchConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{path}: {key + ': ' if key else ''}{reason}") from None


def overrides_of(chosen: Mapping[str, Value]) -> list[str]:
    """The values as `section.key=value`, which `resolve` reads back as they are."""
    return [f"{key}={_text(value)}" for key, value in chosen.items()]


def _text(value: Value) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    return json.dumps(value)


def check_space(
    search: SearchConfig, config_files: Sequence[str], overrides: Sequence[str]
) -> Config:
    """Whether each key takes what the space may give it, one at a time.

    What fits alone may not fit together: such a trial fails by itself. A key that depends on
    others is tried with the first values that make it active.

    Returns:
        The configuration without any of the space's keys.

    Raises:
        UsageError: names the key and the value, or a metric that is not measured.
    """
    plain = resolve(list(config_files), list(overrides)).config
    for key, distribution in search.space.items():
        with_others = _conditions(search, key)
        for value in distribution.examples():
            words = overrides_of({**with_others, key: value})
            try:
                resolve(list(config_files), [*overrides, *words])
            except UsageError as error:
                raise UsageError(f"space.{key}: {error}") from None
    metric = search.metric or plain.checkpoint.best_metric
    if not metric:
        raise UsageError(
            "the search has no metric: set metric in the search file, or checkpoint.best_metric"
        )
    return plain


def _conditions(search: SearchConfig, key: str) -> dict[str, Value]:
    """Values of other keys under which this one is active."""
    chosen: dict[str, Value] = {}
    for other, allowed in search.space[key].when.items():
        chosen |= _conditions(search, other) | {other: allowed[0]}
    return chosen
