"""From a checkpoint to where training goes on: refused before work starts, if it does not fit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from dist_dml.checkpoint import load_embedder_tensors, load_head, load_optimizer_state
from dist_dml.checkpoint_manifest import Manifest, Progress
from dist_dml.config import Config
from dist_dml.data.plan import plan_differences
from dist_dml.engine import Engine, build_engine
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.models.embedder import Embedder
from dist_dml.parallel.heads import Head
from dist_dml.parallel.world import World
from dist_dml.plain_yaml import load_plain


def restore(
    config: Config,
    world: World,
    embedder: Embedder,
    head: Head,
    facts: dict[str, Any],
    found: tuple[Path, Manifest] | None,
) -> tuple[Progress, Engine]:
    """The engine over starting or restored weights. ZeRO copies weights when it is built.

    Raises:
        UsageError: the checkpoint is of another plan, or does not hold what this configuration
            trains.
    """
    if found is None:
        return Progress(), build_engine(config, embedder.to(world.device), world)
    path, manifest = found
    progress = _place_in_plan(config, path, manifest, facts, world)
    _check_state(path, config)
    try:
        embedder.load_state_dict(load_embedder_tensors(path))
        state = load_optimizer_state(path)
        _check_optimizer_state(state, embedder, config)
    except (RuntimeError, SafetensorError, OSError, ValueError) as error:
        detail = " ".join(str(error).split())[:300]
        raise UsageError(
            f"checkpoint {path} does not fit the model ({detail}); resume with the `model` "
            "section of its config.yaml"
        ) from None
    load_head(path, manifest, head)
    engine = build_engine(config, embedder.to(world.device), world)
    engine.load_optimizer_tensors(state)
    return progress, engine


def _check_optimizer_state(
    state: Mapping[str, Tensor], embedder: nn.Module, config: Config
) -> None:
    """Refuse state that an optimizer would only stumble over in its first step.

    Raises:
        ValueError: state of unknown parameters, of other shapes, or in part.
    """
    shapes = {name: list(parameter.shape) for name, parameter in embedder.named_parameters()}
    keys: dict[str, set[str]] = {}
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("|")
        if name not in shapes:
            raise ValueError(f"optimizer.safetensors has {full_name:.80}, no parameter's state")
        if value.ndim and list(value.shape) != shapes[name]:
            shape = list(value.shape)
            raise ValueError(
                f"optimizer.safetensors: {full_name} is {shape}, expected {shapes[name]}"
            )
        keys.setdefault(name, set()).add(key)
    expected = {"momentum_buffer"}
    if config.optimizer.name != "sgd":
        expected = {"step", "exp_avg", "exp_avg_sq"}
    for name, found in keys.items():
        if found != expected:
            raise ValueError(
                f"optimizer.safetensors has {', '.join(sorted(found))} of {name}, expected "
                f"{', '.join(sorted(expected))}"
            )


def _place_in_plan(
    config: Config, path: Path, manifest: Manifest, facts: dict[str, Any], world: World
) -> Progress:
    """Where the plan goes on: at the checkpoint's step or, in a changed plan, at the same share of
    the same epoch.

    Raises:
        UsageError: the plan has changed and `run.accept_changed_data` is not set.
    """
    differing = plan_differences(manifest.plan, facts)
    if not differing:
        return manifest.progress
    changes = "; ".join(differing)
    if not config.run.accept_changed_data:
        raise UsageError(
            f"checkpoint {path} was trained in another order of samples ({changes}); resume with "
            "the same data and order, set run.accept_changed_data=true to go on at the same share "
            "of the epoch, or start a new run.name"
        )
    step = step_in_plan(manifest.progress.step, manifest.plan, facts)
    before = manifest.plan.get("steps_per_epoch", facts["steps_per_epoch"])
    if world.is_first:
        print(
            f"note: going on from {path.name} in a changed order of samples ({changes}): step "
            f"{manifest.progress.step} of {before} an epoch becomes step {step} of "
            f"{facts['steps_per_epoch']} an epoch",
            file=sys.stderr,
        )
    return replace(manifest.progress, step=step)


def step_in_plan(step: int, before: dict[str, Any], now: dict[str, Any]) -> int:
    """The step of a changed plan at the same share of the same epoch."""
    steps = before.get("steps_per_epoch", now["steps_per_epoch"])
    epoch, within = divmod(step, steps)
    return epoch * now["steps_per_epoch"] + within * now["steps_per_epoch"] // steps


def _stored_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The configuration of a checkpoint, whatever its version.

    Raises:
        UsageError: it is none.
    """
    try:
        stored = load_plain((path / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
            raise ValueError(": expected sections")
        return stored
    except (OSError, ValueError) as error:
        raise UsageError(
            f"checkpoint {path} is unreadable (config.yaml{error}); resume from another one with "
            "--resume PATH"
        ) from None


def _check_state(path: Path, config: Config) -> None:
    """Refuse settings whose state a checkpoint does not hold; shapes are compared when loading."""
    stored = _stored_sections(path)
    ours = config.model_dump(mode="json")
    differing = [
        f"{section}.{key} {stored[section][key]!r} -> {ours[section][key]!r}"
        for section, key in (
            ("optimizer", "name"),
            ("loss", "bias"),
            ("classes", "optimizer"),
            ("proxies", "per_class"),
            ("proxies", "pool_size"),
            ("proxies", "pool"),
        )
        # A section that a checkpoint does not know had its defaults.
        if stored.setdefault(section, dict(ours[section])).setdefault(key, "same")
        != ours[section][key]
    ]
    try:
        theirs = LossConfig.model_validate(stored["loss"])
    except ValueError:  # Pydantic's error is one.
        raise UsageError(
            f"checkpoint {path} has a loss section that this version does not read; start a new "
            "run.name"
        ) from None
    for what, before, now in (
        ("cosine similarity", theirs.uses_cosine, config.loss.uses_cosine),
        ("a loss of pairs", theirs.of_pairs, config.loss.of_pairs),
        ("loss.memory_size", theirs.memory_size, config.loss.memory_size),
        ("loss.centres", theirs.num_centres, config.loss.num_centres),
        ("loss.name=adaface", theirs.name == "adaface", config.loss.name == "adaface"),
    ):
        if before != now:
            differing.append(f"{what} {before!r} -> {now!r}")
    if differing:
        raise UsageError(
            f"checkpoint {path} was made with other settings ({'; '.join(differing)}) and lacks "
            "the state of these; resume with its own, or start a new run.name"
        )
