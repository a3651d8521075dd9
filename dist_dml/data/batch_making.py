"""One micro-batch from a request: read, check, decode, crop. Runs in loader processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dist_dml.data.augment import evaluation_view, training_view
from dist_dml.data.crops import mirror
from dist_dml.data.faults import BadKind, BadSample, StorageFault
from dist_dml.data.reader import Reader
from dist_dml.data_config import DataConfig
from dist_dml.keyed_random import key_of


@dataclass(frozen=True, eq=False)
class Batch:
    """This worker's rows of one micro-batch. Dimensions: r rows, C channels, H = W pixels.

    Attributes:
        images: pixels 0..255, with channels last in memory; the device divides and normalises.
        mirrored: rows that the device still has to flip left to right: none where that is the CPU.
        labels: class ids; the ignored label where a damaged image had no replacement.
        sample_ids: row numbers of the index, of the image that is there.
        positions: of the rows in the global batch (training) or in the split (evaluation).
        readable: rows that hold an image; the others are black. All, in training.
        row_counts: rows of every worker in this micro-batch, by rank.
        step: optimizer step (training) or number of the batch (evaluation).
        micro: number of the micro-batch in its step.
    """

    images: UInt8[Tensor, "r C H W"]
    mirrored: Bool[Tensor, " r"]
    labels: Int64[Tensor, " r"]
    sample_ids: Int64[Tensor, " r"]
    positions: Int64[Tensor, " r"]
    readable: Bool[Tensor, " r"]
    row_counts: tuple[int, ...]
    step: int
    micro: int

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        names = ("images", "mirrored", "labels", "sample_ids", "positions")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})

    def images_on(self, device: torch.device) -> UInt8[Tensor, "r C H W"]:
        """The images on a device, mirrored there."""
        images = self.images.to(device, non_blocking=True)
        if not bool(self.mirrored.any()):  # On the host: nothing waits for the device.
            return images
        mirrored = self.mirrored.to(device, non_blocking=True)
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True, eq=False)
class Request:
    """What a loader process needs to make one batch: it holds no index of its own."""

    sample_ids: Int[np.ndarray, " r"]
    positions: Int[np.ndarray, " r"]
    labels: Int[np.ndarray, " r"]
    places: Int64[np.ndarray, "r 4"]
    """Shard, offset, size and checksum of each row's image."""
    row_counts: tuple[int, ...]
    step: int
    micro: int


@dataclass(frozen=True)
class BadImage:
    """A damaged image, as a value: an exception would come back with a long traceback."""

    row: int
    sample_id: int
    kind: BadKind
    reason: str


@dataclass(frozen=True, eq=False)
class Made:
    """A batch whose damaged rows are black, or, with `fault`, the end: the storage failed."""

    batch: Batch
    bad: tuple[BadImage, ...] = ()
    fault: str = ""
    fault_sample: int = -1

    def pin_memory(self) -> Made:
        """The DataLoader calls this by name."""
        return replace(self, batch=self.batch.pin_memory())


class BatchMaker(Dataset):
    """Turns a request into a batch."""

    def __init__(
        self, reader: Reader, config: DataConfig, seed: int | None, device_mirrors: bool
    ) -> None:
        """
        Args:
            reader: of all shards.
            config: image and augmentation.
            seed: of the augmentation; None transforms for evaluation.
            device_mirrors: leave mirroring to the device. A GPU does it in passing; a CPU takes 300
                us an image for what costs 5 us here (2026-11).
        """
        self._reader, self._config, self._seed = reader, config, seed
        self._device_mirrors = device_mirrors

    def __getitem__(self, request: Request) -> Made:
        config = self._config.image
        rows = len(request.sample_ids)
        # Channels last: copying a view across costs ten times as much, and convolutions want it.
        images = np.zeros((rows, config.size, config.size, config.channels), np.uint8)
        mirrored, readable = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
        bad, fault, fault_sample = [], "", -1
        for row, place in enumerate(request.places.tolist()):
            sample_id = int(request.sample_ids[row])
            try:
                view, mirrored[row] = self.view(place, request.step, int(request.positions[row]))
            except BadSample as error:
                bad.append(BadImage(row, sample_id, error.kind, error.reason))
                continue
            except StorageFault as error:
                fault, fault_sample = str(error), sample_id
                break
            images[row] = view
            readable[row] = True
        batch = Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            mirrored=torch.from_numpy(mirrored),
            labels=torch.from_numpy(request.labels),
            sample_ids=torch.from_numpy(request.sample_ids),
            positions=torch.from_numpy(request.positions),
            readable=torch.from_numpy(readable),
            row_counts=request.row_counts,
            step=request.step,
            micro=request.micro,
        )
        return Made(batch, tuple(bad), fault, fault_sample)

    def view(
        self, place: list[int], step: int, position: int
    ) -> tuple[UInt8[np.ndarray, "S S C"], bool]:
        """The pixels of an image at a position of a batch, and whether they are to be mirrored.

        Raises:
            BadSample: the image is damaged.
            StorageFault: its bytes cannot be had.
        """
        data = self._reader.checked_bytes(*place)
        if self._seed is None:
            return evaluation_view(data, self._config.image), False
        key = key_of(self._seed, "augment", step, position)
        view, mirrored = training_view(data, self._config.image, self._config.augment, key)
        if mirrored and not self._device_mirrors:
            return mirror(view), False
        return view, mirrored
