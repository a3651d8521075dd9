"""What the workers together say of damaged images: counts for the metrics, lists for people."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dist_dml.data.damage import KINDS, Damage
from dist_dml.data.quarantine import write_quarantine
from dist_dml.parallel.collectives import gather_equal
from dist_dml.parallel.world import World

FOLDER = "damaged"


class DamageReport:
    """Counts over all workers, and this worker's list in `RUN/damaged/worker-00000.parquet`."""

    def __init__(self, damage: Damage, folder: Path, world: World) -> None:
        self._damage, self._world = damage, world
        self._path = folder / FOLDER / f"worker-{world.rank:05d}.parquet"
        self._written = 0
        self._warned = False

    def metrics(self) -> dict[str, float]:
        """`data/damaged_images` and `data/damaged/KIND` of all workers so far; a collective.

        Costs a gather of 7 numbers a worker. The list is written when it has grown.
        """
        self.write()
        own = torch.tensor([self._damage.counts[kind] for kind in KINDS], dtype=torch.int64)
        total = gather_equal(own.to(self._world.device), self._world.group).sum(0).tolist()
        found = dict(zip(KINDS, total, strict=True))
        damaged = sum(count for kind, count in found.items() if kind != "no_replacement")
        kinds = {f"data/damaged/{kind}": float(count) for kind, count in found.items() if count}
        return {"data/damaged_images": float(damaged), **kinds}

    def write(self) -> None:
        """Write the list, if it has grown; also the last thing a failing run does.

        A disk that is full is no reason to end a run over a list: the next call tries again.
        """
        entries = self._damage.entries
        if len(entries) == self._written:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_quarantine(self._path, list(entries.values()))
        except OSError as error:
            if not self._warned:
                self._warned = True
                print(
                    f"dist_dml: warning: {self._path}, the list of damaged images, cannot be "
                    f"written ({error.strerror or error}); training goes on and tries again",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._written = len(entries)
