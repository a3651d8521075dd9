"""Declared, known and measured machines."""

from __future__ import annotations

import pytest
import torch

from dist_dml.errors import UsageError
from dist_dml.parallel.machine import DECLARED, find_machine, known_machine
from dist_dml.parallel.machine_rates import measure_machine

H200 = DECLARED["h200"]


def test_declared_machines_are_found_and_unknown_ones_refused() -> None:
    assert find_machine("h200").gemm["bfloat16"] == pytest.approx(790e12, rel=0.01)
    half = H200.with_share(0.4)
    assert half.gemm["bfloat16"] == pytest.approx(H200.gemm["bfloat16"] / 2)
    assert "40%" in half.source
    with pytest.raises(UsageError, match="did you mean h200"):
        find_machine("h20")
    with pytest.raises(UsageError, match="use h200, h100"):
        find_machine("abacus")


def test_this_machine_is_known_without_timing_and_scales_with_its_threads() -> None:
    one, two = (known_machine(torch.device("cpu"), threads) for threads in (1, 2))
    assert known_machine(torch.device("cpu"), 2) == two
    assert two.gemm["float32"] == 2 * one.gemm["float32"]
    assert one.cache_bytes == two.cache_bytes
    assert two.levels[0].capacity == 2 * one.levels[0].capacity
    assert one.memory_bytes > 2**28


def test_measured_rates_are_finite_and_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    machine = measure_machine(torch.device("cpu"), 1, repeats=1, tile=(32, 256, 64))
    assert torch.get_num_threads() == before
    rates = [*machine.gemm.values(), machine.exponentials, machine.roundings, machine.fresh]
    rates += [rate for level in machine.levels for rate in (level.read, level.update)]
    assert all(1e6 < rate < 1e16 for rate in rates)
    assert machine.level_of(1) == machine.levels[0]
    assert machine.level_of(1e15) == machine.memory
