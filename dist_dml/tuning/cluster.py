"""Ray: joined or started for the time of a search, and asked to run trials."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_dml.errors import RunError
from dist_dml.tuning.ledger import Ledger, TrialRecord
from dist_dml.tuning.placement import Placement
from dist_dml.tuning.sampler import Sampler
from dist_dml.tuning.space import StopConfig
from dist_dml.tuning.trial import TrialPlan, run_trial
from dist_dml.usable import usable_cores

if TYPE_CHECKING:
    from dist_dml.tuning.source import TrialSource

_STORE_BYTES = 100 * 2**20
"""For Ray's objects: trials pass none."""


@dataclass(frozen=True)
class Cluster:
    """What Ray has."""

    nodes: tuple[dict[str, float], ...]
    """CPU and GPU of each machine."""
    is_own: bool
    """Started here, for this search alone."""


@contextmanager
def connected(address: str, workers: int) -> Iterator[Cluster]:
    """A Ray cluster: the one at `address`, or one of this machine alone.

    The own one ends with the block, and with it every trial. See `prepare_environment`, which comes
    before this module is imported.

    Args:
        address: empty starts one.
        workers: of a trial.

    Raises:
        RunError: the cluster does not answer.
    """
    import ray

    # Paths of a configuration begin where the command was given, not in Ray's own folders.
    settings = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}
    own = not address
    if own:
        checkout = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
        settings["PYTHONPATH"] = path
    try:
        ray.init(
            address=address or "local",
            num_cpus=usable_cores() if own else None,
            object_store_memory=_STORE_BYTES if own else None,
            # What frees the workers of a trial that was stopped (Ray's PlacementGroupCleaner) asks
            # the dashboard's server, which listens on the loopback and wants the token.
            include_dashboard=workers > 1 if own else None,
            runtime_env={"env_vars": settings},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError, PermissionError) as error:
        where = f"at {address}" if address else "on this machine"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"Ray {where} does not answer ({reason[:200]}); check --address or RAY_ADDRESS, and "
            "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH where it asks for a token"
        ) from None
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = tuple(
            {"CPU": float(one.get("CPU", 0)), "GPU": float(one.get("GPU", 0))} for one in alive
        )
        yield Cluster(nodes, own)
    finally:
        ray.shutdown()


def run_trials(
    plan: TrialPlan,
    placement: Placement,
    stop: StopConfig,
    source: TrialSource,
    ledger: Ledger,
    sampler: Sampler | None,
    ended: Callable[[TrialRecord], None],
) -> None:
    """Run what the source gives, as many at a time as fit; returns when all have ended.

    Args:
        plan: what the trials have in common.
        placement: what each takes.
        stop: the rule that ends trials early.
        source: of the trials.
        ledger: is written.
        sampler: is told; None where nothing is proposed.
        ended: is called with each trial that has ended.
    """
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    from dist_dml.tuning.source import Bookkeeper

    # It prints the traceback of each trial that fails, whose reason the bookkeeper says.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scheduler = FIFOScheduler()
    if stop.name == "asha" and sampler is not None:
        scheduler = AsyncHyperBandScheduler(
            time_attr="percent",
            max_t=101,
            grace_period=max(1, round(100 * stop.grace)),
            reduction_factor=stop.reduction,
        )
    before = sum(record.state != "running" for record in ledger.trials.values())
    bookkeeper = Bookkeeper(ledger, sampler, before + source.remaining, ended)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, plan=plan),
            tune.PlacementGroupFactory([dict(placement.driver)]),
        ),
        tune_config=tune.TuneConfig(
            metric="value",
            mode="max",
            search_alg=source,
            scheduler=scheduler,
            num_samples=source.remaining,
            max_concurrent_trials=placement.concurrent,
            trial_name_creator=lambda trial: trial.config["trial"].replace("/", "-"),
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}".replace(
                "/", "-"
            ),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=plan.storage,
            callbacks=[bookkeeper],
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
            # The ledger is what a search is continued from.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    tuner.fit()
    sys.stdout.flush()
