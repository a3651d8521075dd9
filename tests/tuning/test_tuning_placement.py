"""Trials that would wait for ever are refused with the arithmetic."""

from __future__ import annotations

import pytest

from dist_dml.errors import UsageError
from dist_dml.tuning.placement import place
from dist_dml.tuning.space import ClusterConfig, TrialConfig

TWO_CORES = [{"CPU": 2.0, "GPU": 0.0}]
GPU_NODES = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]
NOTHING = ClusterConfig()


@pytest.mark.parametrize(
    ("trial", "nodes", "fit"),
    [
        ({"cpus": 1}, TWO_CORES, 2),
        ({"cpus": 2}, TWO_CORES, 1),
        # Two workers and a driver's tenth.
        ({"workers": 2, "cpus": 0.9}, TWO_CORES, 1),
        ({"gpus": 1, "cpus": 4}, GPU_NODES, 8),
        ({"gpus": 0.25, "cpus": 1}, GPU_NODES, 32),
        ({"workers": 3, "gpus": 1, "cpus": 1}, GPU_NODES, 2),
        # 8 GPUs, and a worker of 3 fits once on each machine.
        ({"gpus": 3, "cpus": 1}, GPU_NODES, 2),
    ],
)
def test_as_many_trials_run_as_fit_whole(trial: dict, nodes: list, fit: int) -> None:
    assert place(TrialConfig.model_validate(trial), nodes, NOTHING).concurrent == fit


@pytest.mark.parametrize(
    ("trial", "nodes", "words"),
    [
        (
            {"workers": 2, "cpus": 1},
            TWO_CORES,
            r"2 workers x 1 CPU takes 2 CPU \+ 0.1 CPU for its driver, .* have 2 CPU \+ 0 GPU",
        ),
        ({"gpus": 1}, TWO_CORES, r"takes 1 CPU, 1 GPU, .* would wait for ever"),
        # 8 GPUs are there, but 5 are on no machine.
        ({"gpus": 5}, GPU_NODES, r"5 GPU, and the machines have 16 CPU \+ 4 GPU; 16 CPU"),
        ({"concurrent": 3}, TWO_CORES, r"trial.concurrent=3, but 2 trials of 1 CPU fit"),
    ],
)
def test_what_fits_nowhere_is_refused_with_the_arithmetic(
    trial: dict, nodes: list, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        place(TrialConfig.model_validate(trial), nodes, NOTHING)


def test_machines_that_an_autoscaler_brings_count() -> None:
    brought = ClusterConfig(cpus=34, gpus=4)
    trial = TrialConfig(workers=4, cpus=8, gpus=1)
    assert place(trial, TWO_CORES, brought).concurrent == 1
    with pytest.raises(UsageError, match="an autoscaler brings 34 CPU, 4 GPU"):
        place(TrialConfig(workers=5, cpus=8, gpus=1), TWO_CORES, brought)
