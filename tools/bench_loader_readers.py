"""The readers that `bench_loader` compares: this project's, WebDataset's, torchvision's.

All give the same: batches of uint8 tensors (rows, 3, S, S) of random crops, mirrored at random.
WebDataset decodes with Pillow (`decode("pil")`) and its images are cropped and resized by Pillow in
one call, which is faster than torchvision's transforms; torchvision's ImageFolder has those.

Dimensions: S, height and width of a view.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from bench_loader_images import Images
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dist_dml.data.index import Index
from dist_dml.data.loader import training_batches
from dist_dml.data.plan import Plan
from dist_dml.data.reader import open_reader
from dist_dml.data_config import AugmentConfig, DataConfig, ImageConfig
from dist_dml.models.torchvision_shim import ensure_torchvision_imports

SIZE = 224
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
PREFETCH = 2  # What torch's DataLoader has without being asked.
ENDLESS = 10**9
OURS, WEBDATASET, TORCHVISION = "dist_dml", "webdataset, PIL", "torchvision ImageFolder"

Stream = Iterator[Tensor]


def config_of(batch_size: int, processes: int) -> DataConfig:
    """RandomResizedCrop(224) and RandomHorizontalFlip, as all readers do."""
    return DataConfig(
        batch_size=batch_size,
        loader_processes=processes,
        prefetch=PREFETCH,
        image=ImageConfig(size=SIZE, resize=256),
        augment=AugmentConfig(crop_scale=SCALE, crop_ratio=RATIO, horizontal_flip=0.5),
    )


def our_stream(index: Index, batch_size: int, processes: int) -> Stream:
    """This project's batches, mirrored as the device would (here the CPU, and its time counts)."""
    plan = Plan(index.select("train"), batch_size, 1, seed=0)
    config = config_of(batch_size, processes)
    device = torch.device("cpu")
    for batch in training_batches(index, plan, config, 0, 0, 1, 0, ENDLESS):
        yield batch.images_on(device)


class PilView:
    """RandomResizedCrop and RandomHorizontalFlip by Pillow, as torchvision draws them."""

    def __call__(self, image: Image.Image) -> Tensor:
        box = _random_box(image.width, image.height)
        view = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()


def _random_box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def webdataset_stream(images: Images, batch_size: int, processes: int) -> Stream:
    """The pipeline of WebDataset's documentation: shuffle, decode("pil"), augment, batch."""
    from webdataset.compat import WebDataset

    shards: Any = WebDataset(list(images.shards), shardshuffle=False, empty_check=False)
    dataset = (
        shards.repeat()
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(PilView(), int)
        .batched(batch_size, partial=False)
    )
    batches = dataset
    if processes:
        batches = DataLoader(dataset, None, **_processes(processes))
    for batch, _ in batches:
        yield batch


class Folder(Dataset):
    """torchvision's ImageFolder, opened where it is used: its import may need the shim there."""

    def __init__(self, images: Images) -> None:
        self._tree, self._count = str(images.tree), images.count
        self._folder: Any = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if self._folder is None:
            self._folder = _image_folder(self._tree)
        return self._folder[number]


def _image_folder(tree: str) -> Any:
    ensure_torchvision_imports()
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    return datasets.ImageFolder(tree, transforms.Compose(steps))


def torchvision_refusal() -> str:
    """Why torchvision cannot be measured; empty where it can."""
    try:
        ensure_torchvision_imports()
        import torchvision.datasets  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"torchvision does not import ({str(error).splitlines()[0]})"
    return ""


def torchvision_stream(images: Images, batch_size: int, processes: int) -> Stream:
    """ImageFolder behind a DataLoader, in random order."""
    folder = Folder(images)
    loader = DataLoader(
        folder,
        batch_size,
        sampler=RandomSampler(folder, replacement=True, num_samples=ENDLESS),
        **(_processes(processes) if processes else {}),
    )
    for batch, _ in loader:
        yield batch


def _processes(count: int) -> dict[str, Any]:
    """A plain fork hangs once its parent has run a parallel operation."""
    context = multiprocessing.get_context("forkserver")
    return {"num_workers": count, "prefetch_factor": PREFETCH, "multiprocessing_context": context}


def streams(images: Images, batch_size: int, processes: int) -> dict[str, Callable[[], Stream]]:
    """Every reader by name, for one number of loader processes."""
    found: dict[str, Callable[[], Stream]] = {
        OURS: lambda: our_stream(images.index, batch_size, processes),
        WEBDATASET: lambda: webdataset_stream(images, batch_size, processes),
    }
    if not torchvision_refusal():
        found[TORCHVISION] = lambda: torchvision_stream(images, batch_size, processes)
    return found


def container_seconds_of_ours(index: Index, batch_size: int) -> float:
    """CPU seconds a sample to bring its bytes: plan, index, read by offset, checksum."""
    reader = open_reader(index, 3, DataConfig().storage)
    plan = Plan(index.select("train"), batch_size, 1, seed=0)
    columns = (index.shard, index.offset, index.size, index.checksum)
    started = time.process_time()
    total = 0
    for step in range(plan.steps_per_epoch):
        for _, ids in plan.micro_batches(step):
            places = np.stack([column[ids].astype(np.int64) for column in columns], axis=1)
            for place in places.tolist():
                total += len(reader.checked_bytes(*place))
    seconds = time.process_time() - started
    assert total == int(index.size.sum())
    return seconds / plan.samples_per_epoch


def container_seconds_of_webdataset(images: Images) -> float:
    """CPU seconds a sample of WebDataset's plain pipeline: read the tars, group, no decoding."""
    from webdataset.compat import WebDataset

    dataset = WebDataset(list(images.shards), shardshuffle=False, empty_check=False)
    started = time.process_time()
    count = 0
    for sample in dataset:
        count += len(sample["jpg"]) > 0
    seconds = time.process_time() - started
    assert count == images.count
    return seconds / count


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in loader processes: the readers are compared by core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
