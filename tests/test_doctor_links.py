"""Workers of the doctor measure together: rates, clocks, a folder, and how they fail to meet."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.config_loading import resolve
from dist_dml.doctor import links
from dist_dml.doctor.links import Rate
from dist_dml.doctor.meeting import Absent, meet
from dist_dml.parallel.world import Ranks

AHEAD = 7.0


def measured_together(
    rank: int, num_workers: int, group: ProcessGroup, folder: str
) -> dict[str, Any]:
    """Everything that two workers measure, the second with a wrong clock and, once, blind."""
    rates = links.measure(group, torch.device("cpu"), group, sizes=(8, 2**16), case_seconds=0.02)
    offsets = links.clock_offsets([1], group, lambda: time.time() + AHEAD * rank)
    shared = list(links.shared_folder(Path(folder), [0, 1], group, patience=0.1))
    see = os.path.exists
    if rank == 1:
        os.path.exists = lambda path: False
    try:
        unseen = list(links.shared_folder(Path(folder), [0, 1], group, patience=0.1))
    finally:
        os.path.exists = see
    return {"rates": rates, "offsets": offsets, "shared": shared, "unseen": unseen}


def test_two_workers_measure_rates_clocks_and_a_shared_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    first, second = run_workers(measured_together, 2, tmp_path, str(folder))
    names = [(rate.name, rate.size) for rate in first["rates"]]
    assert names == [(name, size) for size in (8, 2**16) for name in ("all-reduce", "all-gather")]
    for rate in first["rates"]:
        assert rate.seconds > 0
        # Two workers: as many bytes as the tensor has, for either collective.
        assert rate.bus == pytest.approx(rate.size / rate.seconds)
    offset, unsure = first["offsets"][1]
    assert offset == pytest.approx(AHEAD, abs=0.05)
    assert 0 < unsure < 0.05
    assert [f.level for f in first["shared"]] == ["ok"]
    assert [f.level for f in first["unseen"]] == ["problem"]
    assert "do not see worker 0's files" in first["unseen"][0].measured
    assert (second["offsets"], second["shared"], second["unseen"]) == ({}, [], [])
    assert list(folder.iterdir()) == []


RATES = [
    Rate("all-reduce", 8, 50e-6, 1e5),
    Rate("all-gather", 8, 60e-6, 1e5),
    Rate("all-reduce", 2**20, 1e-3, 1e9),
    Rate("all-gather", 2**20, 1e-3, 2e9),
]


def levels(kind: str, rates: list[Rate], hosts: int) -> dict[str, str]:
    return {f.name: f.level for f in links.link_findings(kind, rates, 2, hosts)}


def test_slow_and_long_links_between_hosts_are_told() -> None:
    names = {"gloo latency", "gloo all-reduce", "gloo all-gather"}
    assert levels("gloo", RATES, 2) == dict.fromkeys(names, "ok")
    slow = [Rate(r.name, r.size, 5e-3, r.size / 1.0) for r in RATES]
    assert levels("gloo", slow, 2) == dict.fromkeys(names, "warning")
    # In one host it is only a busy machine.
    assert levels("gloo", slow, 1) == dict.fromkeys(names, "ok")
    assert levels("nccl", RATES, 1)["nccl all-reduce"] == "warning"


def test_what_the_head_sends_is_set_against_the_measured_rate() -> None:
    config = resolve(None, ["model.embedding_dim=256", "data.batch_size=1024"]).config
    found = links.head_finding(config, RATES, 4)
    # 2 x 4 R D (W - 1) / W bytes (docs/estimate.md).
    assert found.values["bytes"] == 2 * 4 * 1024 * 256 * 3 / 4
    assert found.values["seconds"] == pytest.approx(found.values["bytes"] / 1e9 + 4 * 50e-6)
    assert "(assumed)" not in found.measured


def test_clocks_of_hosts_that_disagree_are_told() -> None:
    hosts = ["a", "a", "b", "c"]
    (found,) = links.skew_findings({2: (0.01, 0.001), 3: (-5.0, 0.001)}, hosts)
    assert found.level == "warning"
    assert found.measured.startswith("c is 5.000 s behind a")
    (found,) = links.skew_findings({2: (0.01, 0.001), 3: (-0.3, 0.001)}, hosts)
    assert found.level == "ok"
    # A difference that the way itself could make is none.
    (found,) = links.skew_findings({2: (2.0, 1.5)}, hosts)
    assert found.level == "ok"
    (found,) = links.skew_findings({1: (0.0, 0.001)}, ["a", "a"])
    assert "one host" in found.measured
    assert list(links.skew_findings({}, hosts)) == []


def test_workers_on_different_devices_are_told() -> None:
    (found,) = links.gpus_alike([["H200"], ["H200"], []])
    assert found.level == "warning"
    assert found.measured == "2 x H200, 1 x CPU"
    assert list(links.gpus_alike([[], []])) == []


def test_workers_that_do_not_come_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    ranks = Ranks(0, 2, 0, 2)
    absent = meet(ranks, {"MASTER_ADDR": "127.0.0.1"}, 1.0)
    assert isinstance(absent, Absent)
    assert "MASTER_PORT=''" in absent.finding.measured
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = time.monotonic()
    absent = meet(ranks, place, 1.0)
    assert time.monotonic() - started < 20
    assert isinstance(absent, Absent)
    assert absent.finding.level == "problem"
    assert f"did not meet the other 1 at 127.0.0.1:{port}" in absent.finding.measured
