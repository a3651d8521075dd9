"""What is written down when a loss or gradient is not finite: the batch's keys, each layer's state.

Dimensions: r rows of this worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_dml.config import Config
from dist_dml.data.batch_making import Batch
from dist_dml.data.index import Index
from dist_dml.data.loader import training_batches
from dist_dml.errors import NotFiniteError, RunError
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.models.embedder import Embedder
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World
from dist_dml.training_run import TrainingRun
from dist_dml.whole_files import write_json

# Keys that fit on a screen; the report has all.
_KEYS_SHOWN = 3


def write_report(found: NotFiniteError, config: Config, run: TrainingRun, world: World) -> str:
    """Write `RUN/report/not-finite-step-%09d.json`, by all workers together.

    The report holds: what was found; the gradient norm of each parameter in the step and in those
    before it that were not written down yet; each parameter's numbers and each layer's outputs on
    the batch, with the weights as they are now, which have the step behind them and perhaps some
    more (up to `tracking.every_steps`); and the key of every sample of the batch.

    Returns:
        One sentence for the message: the layer that comes first, some keys, where the rest is.
    """
    step = found.step - 1  # As plans count.
    embedder = run.engine.embedder
    outputs, problem = {}, ""
    try:
        outputs = layer_outputs(embedder, batches_of(step, config, run, world), config, world)
    except RunError as error:  # The storage has failed meanwhile; the rest is still worth reading.
        problem = str(error)
    merged = merge_outputs(gather_objects(outputs, world.group))
    weights = {name: numbers_of(value) for name, value in embedder.named_parameters()}
    ids = [int(i) for _, part in run.plan.micro_batches(step) for i in part]
    keys = [run.index.key(i) for i in ids] if world.is_first else []
    path = run.folder / "report" / f"not-finite-step-{found.step:09d}.json"
    if world.is_first:
        content = {
            "step": found.step,
            "found": found.finding,
            **found.facts,
            "weights": weights,
            "outputs": merged,
            "outputs_problem": problem,
            "batch": [
                {"key": key, "class": _class_name(run.index, i), "sample_id": i}
                for key, i in zip(keys, ids, strict=True)
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _plain(content))
    return _summary(found, weights, merged, keys, path)


def _class_name(index: Index, sample_id: int) -> str:
    return index.class_names[int(index.class_id[sample_id])]


def batches_of(step: int, config: Config, run: TrainingRun, world: World) -> list[Batch]:
    """This worker's micro-batches of a step, as they were trained on."""
    settings = config.data.model_copy(update={"loader_processes": 0})
    made = training_batches(
        run.index, run.plan, settings, config.run.seed, world.rank, world.size, step, step + 1
    )
    return list(made)


@torch.no_grad()
def layer_outputs(
    embedder: Embedder, batches: list[Batch], config: Config, world: World
) -> dict[str, dict[str, float]]:
    """Numbers of each layer's output on a batch, by name in the order of the computation.

    In evaluation mode, where no layer waits for other workers. The embedder is as before.
    """
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, []).append(output.detach().double().cpu())

        return note

    layers = [(name, m) for name, m in embedder.named_modules() if name and not list(m.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in layers]
    was_training = embedder.training
    embedder.eval()
    try:
        for batch in batches:
            keys = row_keys(key_of(config.run.seed, "dropout", batch.step), batch.positions)
            embedder(batch.images_on(world.device), keys.to(world.device))
    finally:
        for hook in hooks:
            hook.remove()
        embedder.train(was_training)
    return {
        name: numbers_of(torch.cat([v.flatten() for v in values])) for name, values in found.items()
    }


def numbers_of(values: Tensor) -> dict[str, float]:
    """How many numbers, how many not finite, and root mean square and largest of the others."""
    values = values.detach().double().flatten()
    finite = values[torch.isfinite(values)]
    count = len(finite)
    return {
        "count": float(len(values)),
        "not_finite": float(len(values) - count),
        "mean_square": float(finite.square().mean()) if count else 0.0,
        "largest": float(finite.abs().max()) if count else 0.0,
    }


def merge_outputs(workers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The numbers of all workers' rows together."""
    merged: dict[str, dict[str, float]] = {}
    for outputs in workers:
        for name, own in outputs.items():
            other = merged.get(name)
            if other is None:
                merged[name] = dict(own)
                continue
            kept = [entry["count"] - entry["not_finite"] for entry in (other, own)]
            total = sum(kept)
            squares = kept[0] * other["mean_square"] + kept[1] * own["mean_square"]
            merged[name] = {
                "count": other["count"] + own["count"],
                "not_finite": other["not_finite"] + own["not_finite"],
                "mean_square": squares / total if total else 0.0,
                "largest": max(other["largest"], own["largest"]),
            }
    return merged


def _summary(
    found: NotFiniteError,
    weights: dict[str, dict[str, float]],
    outputs: dict[str, dict[str, float]],
    keys: list[str],
    path: Path,
) -> str:
    parts = []
    history = found.facts.get("gradient_norms")
    if isinstance(history, dict) and found.step in history:
        broken = [name for name, norm in history[found.step].items() if not norm < float("inf")]
        total = len(history[found.step])
        if broken and total > 1:  # Not ZeRO's common norm.
            parts.append(f"gradients not finite in {len(broken)} of {total}, {broken[0]} first")
    for what, numbers in (("weights", weights), ("outputs", outputs)):
        broken = [name for name, entry in numbers.items() if entry["not_finite"]]
        if broken:
            parts.append(f"{what} not finite in {len(broken)} of {len(numbers)}, {broken[0]} first")
    if keys:
        more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
        parts.append(f"its batch has the samples {', '.join(keys[:_KEYS_SHOWN])}{more}")
    return "; ".join([*parts, f"the whole report is {path}"])


def _plain(value: Any) -> Any:
    """For JSON, whose standard has no nan: numbers that are not finite as text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value
