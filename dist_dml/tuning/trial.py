"""One trial: the same `train()` as everywhere, in a process of Ray's, with the trial's overrides.

With one worker it runs in the trial's own process; several come from Ray Train, which places them
and ends them with the trial.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dml.checkpoint_manifest import Progress
from dist_dml.errors import RunError, Stopped, UsageError
from dist_dml.tracking.parent_run import words_of_child
from dist_dml.tracking.recorder import read_metrics

Report = Callable[[dict[str, Any]], None]
GROUP = "placement_group"
"""Reported by trials of several workers: the id of what Ray Train has reserved for them."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a study have in common; travels to the machines where they run."""

    config_files: tuple[str, ...]
    overrides: tuple[str, ...]
    study: str
    """`run.name` of the study; trials are named below it."""
    parent: str
    """`run_id` of the study."""
    tags: Mapping[str, str]
    """The study's own, which its trials have too."""
    folder: str
    """Where the command was given: relative paths of the configuration begin there."""
    metric: str
    test_metric: str
    workers: int
    worker: Mapping[str, float]
    """Resources of each."""
    storage: str
    """For Ray's own notes."""
    threads: int
    """CPU threads of each worker; 0 leaves engine.threads as it is."""
    searching: tuple[str, ...] = ()
    """Further overrides of the trials that search, not of those that confirm."""


class TrialFailure(RuntimeError):
    """Why one trial cannot go on, in one line; the search does."""


def run_trial(config: Mapping[str, Any], plan: TrialPlan) -> None:
    """What Ray Tune calls in the trial's process.

    Args:
        config: `trial`, `overrides`, `kind`, of the searcher.
        plan: of the study.

    Raises:
        TrialFailure: the trial failed, with its reason.
    """
    import ray.tune

    overrides = [*plan.overrides, *config["overrides"], *_own_settings(config, plan)]
    if plan.workers == 1:
        _train(plan, overrides, config["kind"], ray.tune.report)
        return
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = DataParallelTrainer(
        _run_worker,
        train_loop_config={"plan": plan, "overrides": overrides, "kind": config["kind"]},
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            use_gpu="GPU" in plan.worker,
            resources_per_worker=dict(plan.worker),
        ),
        run_config=RunConfig(
            name=f"{plan.study}-{config['trial']}".replace("/", "-"),
            # Of Ray's own notes: runs and checkpoints lie in run.root.
            storage_path=plan.storage,
            failure_config=FailureConfig(max_failures=0),
            callbacks=[TuneReportCallback()],
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise TrialFailure(reason_of(error)) from None


def reason_of(error: BaseException) -> str:
    """The words of the failure inside whatever Ray has wrapped around it."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        cause = getattr(found, "cause", None)
        if isinstance(cause, BaseException):
            # First: Ray's wrapper of a failure is of the failure's class as well.
            found = cause
            continue
        if isinstance(found, TrialFailure):
            return str(found)
        failures = getattr(found, "worker_failures", None)
        if failures:
            # The first to fail is why the others did.
            told = [reason_of(one) for one in failures.values()]
            return next((text for text in told if "another worker" not in text), told[0])
        found = found.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no reason given'}"


def _own_settings(config: Mapping[str, Any], plan: TrialPlan) -> list[str]:
    """The trial's place, and that it goes on where an earlier attempt of it ended."""
    tags = {"study": plan.study, "trial": config["trial"], "trial_kind": config["kind"]}
    below = words_of_child(plan.parent, plan.tags, tags)
    settings = [
        f"run.name={json.dumps(plan.study + '/' + config['trial'])}",
        "run.resume=auto",
        *below,
    ]
    if config["kind"] == "search":
        settings += plan.searching
    return settings + [f"engine.threads={plan.threads}"] * bool(plan.threads)


def _run_worker(config: Mapping[str, Any]) -> None:
    """What Ray Train calls in each worker: ranks and a meeting point, then the training."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    meeting = None
    if context.get_world_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = f"{ray.util.get_node_ip_address()} {free.getsockname()[1]}"
    meeting = broadcast_from_rank_zero(meeting)
    assert meeting is not None
    address, port = meeting.split()
    group = ray.util.get_current_placement_group()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }

    def report(news: dict[str, Any]) -> None:
        """With the name of what the workers hold, which must be free when the trial is stopped."""
        ray.train.report(news | ({GROUP: group.id.hex()} if group is not None else {}))

    _train(config["plan"], config["overrides"], config["kind"], report)


def _train(plan: TrialPlan, overrides: list[str], kind: str, report: Report) -> None:
    """Train as one worker, reporting each evaluation; a failure is a `TrialFailure`."""
    # Heavy, and not for the driver's process.
    from dist_dml.config_loading import resolve
    from dist_dml.credentials import print_traceback
    from dist_dml.entry import failure_reason
    from dist_dml.parallel.world import environment_ranks, start_world, stop_world
    from dist_dml.train import train

    _go_to(plan)
    final: list[dict[str, Any]] = []

    def observe(progress: Progress, scores: Mapping[str, float], share: float) -> None:
        value = scores.get(plan.metric, math.nan)
        if not math.isfinite(value):
            known = ", ".join(sorted(scores)[:6])
            raise UsageError(f"the evaluation has no {plan.metric}; it has {known}")
        news = {
            "value": value,
            "share": share,
            "percent": math.floor(100 * share + 1e-9),
            "step": progress.step,
            "images_seen": progress.images_seen,
            "seconds": progress.seconds,
        }
        if plan.test_metric and kind != "search":
            news["test"] = scores[plan.test_metric]
        if share >= 1:
            # Not before the last checkpoint is written: Ray may end the trial when it hears it.
            final.append(news)
            return
        try:
            report(news)
        except SystemExit:
            # How Ray ends the thread of a trial that is stopped.
            raise Stopped("the search has stopped this trial", together=True) from None

    try:
        resolved = resolve(list(plan.config_files), overrides)
        world = start_world(resolved.config.engine, environment_ranks())
    except (UsageError, RunError) as error:
        raise TrialFailure(str(error)) from None
    try:
        train(resolved, world, argparse.Namespace(), observe)
        stop_world(world)
    except Stopped:
        return
    except Exception as error:
        if not isinstance(error, UsageError | RunError):
            print_traceback(error)
        reason = failure_reason(error)
        if world.failures is not None:
            # Others wait in a collective; Ray ends them with the trial.
            world.failures.close()
        raise TrialFailure(reason) from None
    run = Path(resolved.config.run.root) / resolved.config.run.name
    with contextlib.suppress(SystemExit):
        for news in final or _recorded(run, plan, kind):
            report(news)


def _go_to(plan: TrialPlan) -> None:
    """To where relative paths begin: the driver's folder, or the code that came with a job."""
    import dist_dml

    places = [Path(plan.folder), Path(dist_dml.__file__).resolve().parents[1]]
    files = [file.rsplit(":", 1)[0] for file in plan.config_files]
    for place in places:
        if all((place / file).exists() or (place / given).exists()
               for file, given in zip(files, plan.config_files, strict=True)):  # fmt: skip
            os.chdir(place)
            return
    raise TrialFailure(
        f"{', '.join(plan.config_files)} is not there on {socket.gethostname()} "
        f"(looked in {' and '.join(map(str, places))}); ship the code with the job, or name a "
        "shared path"
    )


def _recorded(run: Path, plan: TrialPlan, kind: str) -> list[dict[str, Any]]:
    """The evaluations of a run that had ended before this attempt: its search was killed."""
    curves = read_metrics(run)
    curve, test = curves.get(plan.metric), curves.get(plan.test_metric)
    if curve is None or not len(curve.step):
        return []
    last = curve.step[-1]
    found = []
    for row, step in enumerate(curve.step):
        share = 1.0 if step == last else float(step / last)
        news = {
            "value": float(curve.value[row]),
            "share": share,
            "percent": math.floor(100 * share + 1e-9),
            "step": int(step),
            "images_seen": int(curve.images_seen[row]),
            "seconds": float(curve.seconds[row]),
        }
        if test is not None and kind != "search":
            news["test"] = float(test.value[row])
        found.append(news)
    return found
