"""Workers that read different data, or run different programs, are found before they diverge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from dist_dml.data.plan import Plan
from dist_dml.errors import RunError
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World


def check_agreement(when: str, facts: Mapping[str, Any], world: World) -> None:
    """Compare facts over all workers; costs a gather of 32 bytes a worker while they agree.

    Without it, workers with other steps or shapes would wait for each other for ever, and workers
    with other data would train on a mixture that nobody asked for.

    Args:
        when: for the message, as "at the start of epoch 3".
        facts: what must be the same everywhere; JSON-able.
        world: all workers.

    Raises:
        RunError: on every worker: each fact that differs, with the workers that have it.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    if len(set(gather_objects(digest, world.group))) == 1:
        return
    every = gather_objects(dict(facts), world.group)
    parts = [_difference(key, every) for key in sorted({key for found in every for key in found})]
    raise RunError(
        f"the workers disagree {when}: {'; '.join(part for part in parts if part)}; bring the same "
        "data, configuration and program to all machines"
    )


def epoch_facts(plan: Plan, fingerprint: str, step: int, total_steps: int) -> dict[str, Any]:
    """What decides the batches from `step` on; the first of them as its hash.

    The hash also notices another version of numpy whose generator draws other numbers.
    """
    batch = np.ascontiguousarray(plan.global_batch(step), np.int64)
    return {
        "fingerprint": fingerprint,
        "step": step,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": total_steps,
        "first_batch": hashlib.sha256(batch.tobytes()).hexdigest()[:16],
    }


def _difference(key: str, every: list[dict[str, Any]]) -> str:
    """`key a on worker 0, b on workers 1 and 2`, or nothing where all agree."""
    holders: dict[str, list[int]] = {}
    for rank, facts in enumerate(every):
        holders.setdefault(repr(facts.get(key)), []).append(rank)
    if len(holders) == 1:
        return ""
    return f"{key} " + ", ".join(
        f"{value} on worker{'s' if len(ranks) > 1 else ''} {_listed(ranks)}"
        for value, ranks in holders.items()
    )


def _listed(ranks: list[int]) -> str:
    shown = [str(rank) for rank in ranks[:4]]
    return (
        " and ".join(shown) if len(ranks) <= 4 else f"{', '.join(shown)} and {len(ranks) - 4} more"
    )
