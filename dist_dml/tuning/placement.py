"""Whether trials can be placed, and how many at a time, before one of them waits for ever.

Trials of several workers hold a little for their driver and ask for the workers one by one. Two
that each hold half of what they need would wait for each other for ever: no more are begun than
fit whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_dml.errors import UsageError
from dist_dml.tuning.space import ClusterConfig, TrialConfig

DRIVER_CPUS = 0.1
"""Of the driver of a trial with several workers; it waits."""
_SLACK = 1e-6


@dataclass(frozen=True)
class Placement:
    """What is asked of Ray."""

    concurrent: int
    """Trials at a time."""
    worker: dict[str, float]
    """Of each worker: CPU, GPU."""
    driver: dict[str, float]
    """Of the trial's own process, which is the worker where there is one."""


def place(
    trial: TrialConfig, nodes: Sequence[Mapping[str, float]], cluster: ClusterConfig
) -> Placement:
    """How many trials fit at a time on these machines.

    Args:
        trial: what one takes.
        nodes: CPU and GPU of each machine that Ray has.
        cluster: more, where an autoscaler brings machines; they are taken for one machine.

    Raises:
        UsageError: with the arithmetic, if not even one trial fits.
    """
    brought = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    total = {key: sum(node.get(key, 0.0) for node in nodes) for key in ("CPU", "GPU")}
    machines = [dict(node) for node in nodes]
    if any(brought[key] > total[key] for key in total):
        machines.append({key: max(0.0, brought[key] - total[key]) for key in total})
    worker = {"CPU": trial.cpus} | ({"GPU": trial.gpus} if trial.gpus else {})
    driver = worker if trial.workers == 1 else {"CPU": DRIVER_CPUS}
    fit = 0
    while fit < 10_000 and _fits(machines, worker, driver, trial.workers):
        fit += 1
    if fit == 0:
        raise UsageError(_arithmetic(trial, nodes, brought))
    wanted = int(trial.concurrent)
    if wanted > fit:
        raise UsageError(
            f"trial.concurrent={wanted}, but {fit} trials of {_need(trial)} fit on "
            f"{_machines(nodes)}; lower it, or what a trial takes"
        )
    return Placement(wanted or fit, worker, driver)


def _fits(
    machines: list[dict[str, float]],
    worker: Mapping[str, float],
    driver: Mapping[str, float],
    workers: int,
) -> bool:
    """Whether one more trial fits, worker by worker; what it takes is gone then."""
    free = [dict(machine) for machine in machines]
    wanted = [dict(worker)] * workers + ([dict(driver)] if workers > 1 else [])
    for need in wanted:
        for machine in free:
            if all(machine.get(key, 0.0) + _SLACK >= amount for key, amount in need.items()):
                for key, amount in need.items():
                    machine[key] -= amount
                break
        else:
            return False
    machines[:] = free
    return True


def _need(trial: TrialConfig) -> str:
    each = f"{trial.cpus:g} CPU" + (f" + {trial.gpus:g} GPU" if trial.gpus else "")
    return each if trial.workers == 1 else f"{trial.workers} workers x {each}"


def _machines(nodes: Sequence[Mapping[str, float]]) -> str:
    shown = [f"{node.get('CPU', 0):g} CPU + {node.get('GPU', 0):g} GPU" for node in nodes[:4]]
    return "; ".join(shown) + (f"; and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _arithmetic(
    trial: TrialConfig, nodes: Sequence[Mapping[str, float]], brought: Mapping[str, float]
) -> str:
    whole = f"{trial.workers * trial.cpus:g} CPU"
    if trial.workers > 1:
        whole += f" + {DRIVER_CPUS:g} CPU for its driver"
    if trial.gpus:
        whole += f", {trial.workers * trial.gpus:g} GPU"
    scaled = f", and an autoscaler brings {brought['CPU']:g} CPU, {brought['GPU']:g} GPU"
    return (
        f"a trial of {_need(trial)} takes {whole}, and the machines have {_machines(nodes)}"
        f"{scaled if any(brought.values()) else ''}: it would wait for ever; lower trial.workers, "
        "trial.cpus or trial.gpus, or say in cluster.cpus and cluster.gpus what will join"
    )
