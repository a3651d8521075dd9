"""Workers with other data or another order are named before the first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from worker_group import run_workers

from dist_dml.agreement import check_agreement, epoch_facts
from dist_dml.data.plan import Plan
from dist_dml.errors import RunError
from dist_dml.parallel.world import Ranks, World


def compare(rank, num_workers, group, every):
    world = World(Ranks(rank, num_workers), torch.device("cpu"), group, None)
    try:
        check_agreement("at the start of epoch 3", every[rank], world)
    except RunError as error:
        return str(error)
    return ""


def test_workers_that_agree_go_on(tmp_path: Path) -> None:
    facts = {"fingerprint": "abc", "steps_per_epoch": 12}
    assert run_workers(compare, 2, tmp_path, [facts, dict(facts)]) == ["", ""]


def test_every_worker_hears_what_differs_and_where(tmp_path: Path) -> None:
    facts = {"fingerprint": "abc", "steps_per_epoch": 12, "step": 36}
    found = run_workers(compare, 3, tmp_path, [facts, facts | {"steps_per_epoch": 11}, facts])
    assert len(set(found)) == 1
    assert found[0].startswith(
        "the workers disagree at the start of epoch 3: steps_per_epoch 12 on workers 0 and 2, "
        "11 on worker 1; bring the same data"
    )
    assert "fingerprint" not in found[0]


@pytest.mark.parametrize("change", ["seed", "samples", "step"])
def test_another_order_has_other_facts(change: str) -> None:
    ids = np.arange(100)
    usual = epoch_facts(Plan(ids, 10, seed=1), "abc", 10, 30)
    assert usual == epoch_facts(Plan(ids.copy(), 10, seed=1), "abc", 10, 30)
    other = {
        "seed": lambda: epoch_facts(Plan(ids, 10, seed=2), "abc", 10, 30),
        "samples": lambda: epoch_facts(Plan(ids[::-1].copy(), 10, seed=1), "abc", 10, 30),
        "step": lambda: epoch_facts(Plan(ids, 10, seed=1), "abc", 20, 30),
    }[change]()
    assert other["first_batch"] != usual["first_batch"]
