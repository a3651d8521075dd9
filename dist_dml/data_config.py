"""The configuration of the data: which samples, in which order, from where, as which pixels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_dml.config_types import Count, Fraction, NonNegative, Positive, Range, Section


class ImageConfig(Section):
    """What an image is when it reaches the network."""

    size: Count = 224
    """Height and width in pixels after the crop."""
    channels: Literal[1, 3] = 3
    """1 for grey images, 3 for RGB. Stored images of the other kind are converted."""
    resize: Annotated[int, Field(ge=0)] = 256
    """Short side in pixels before the crop; 0 resizes the whole image to `size` x `size`."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per-channel mean of pixels in 0..1, subtracted on the device."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of pixels in 0..1, divided by on the device."""

    @model_validator(mode="after")
    def _channels_agree(self) -> ImageConfig:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"data.image.{name} has {len(getattr(self, name))} values for "
                    f"data.image.channels={self.channels}; give one value a channel"
                )
        if 0 < self.resize < self.size:
            raise ValueError(
                f"data.image.resize={self.resize} is smaller than data.image.size={self.size}; "
                "make resize at least as large as size, or 0"
            )
        return self


class AugmentConfig(Section):
    """Random changes of a training image, each drawn from its position in the batch."""

    crop_scale: Range = (1.0, 1.0)
    """Area of the random crop as a share of the image. (1, 1) takes the centre crop."""
    crop_ratio: Range = (0.75, 4 / 3)
    """Width over height of the random crop."""
    horizontal_flip: Fraction = 0.0
    """Probability of mirroring left and right."""
    rotation_degrees: NonNegative = 0.0
    """Largest rotation either way."""
    zoom: Range = (1.0, 1.0)
    """Range of the random magnification about the centre."""
    shift: Fraction = 0.0
    """Largest shift either way, as a share of the side."""
    brightness: Fraction = 0.0
    """Largest relative change of brightness."""
    contrast: Fraction = 0.0
    """Largest relative change of contrast."""
    saturation: Fraction = 0.0
    """Largest relative change of saturation (RGB only)."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest change of hue as a share of the colour circle (RGB only)."""
    noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise in grey levels (0..255)."""

    @model_validator(mode="after")
    def _ranges_ordered(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_ratio", "zoom"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"data.augment.{name}=({low}, {high}) runs backwards; swap them")
        if self.crop_scale[1] > 1:
            raise ValueError(f"data.augment.crop_scale={self.crop_scale} exceeds 1, the image")
        return self


class MixturePart(Section):
    """One more data set of a mixture."""

    path: Annotated[str, Field(min_length=1)]
    """Folder of a packed or indexed data set; `${NAME}` as in `data.path`."""
    weight: Positive = 1.0
    """Share of its samples in the batches, relative to the other weights."""
    split: str = "train"
    """Its split to train on."""


class StorageConfig(Section):
    """How bytes come from disks and object stores."""

    cache: str = ""
    """Folder for shards fetched from s3://, gs:// or http(s)://; empty: `dist_dml` in the folder
    for temporary files. Workers of one machine share it."""
    cache_mebibytes: Count = 20_480
    """Most that the folder holds. It must hold two windows of shards."""
    ahead_shards: Count = 4
    """Shards fetched ahead of the plan."""
    retries: Annotated[int, Field(ge=0)] = 6
    """How often a failed read is tried again before the run ends; nothing is ever replaced because
    the storage failed."""
    retry_seconds: NonNegative = 0.5
    """Pause before the first retry; each next one is twice as long, up to 30 s."""


class DataConfig(Section):
    """Which samples, in which batches."""

    path: str = ""
    """Folder of a packed or indexed data set: tars, index.parquet, classes.parquet, dataset.json.
    `${NAME}` is looked up in the environment when the folder is opened.
    """
    split: str = "train"
    """Split to train on."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Class-disjoint folds of the training classes, 2 or more; 0 trains on all classes. With folds,
    a fold's own share of the classes is the split `validation`; see docs/protocol.md."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Which of the folds this run trains, 0..folds-1."""
    num_classes: Annotated[int, Field(ge=0)] = 0
    """Classes of the classifier; 0 takes the number of training classes in the catalogue."""
    batch_size: Count = 128
    """Rows of the global batch, over all workers and micro-batches: one optimizer step."""
    drop_last: bool = False
    """Leave out the short last batch of an epoch instead of training on it."""
    order: Literal["shuffled", "sequential", "balanced"] = "shuffled"
    """`shuffled`: a new permutation each epoch. `sequential`: by index. `balanced`: each batch
    holds `batch_size / samples_per_class` classes with `samples_per_class` images each (P x K)."""
    samples_per_class: Annotated[int, Field(ge=1)] = 4
    """K of `order=balanced`; divides `batch_size`. 1 is for proxies; losses of pairs need 2."""
    repeat_below: Fraction = 0.0
    """With `order=shuffled`: images of a class with a share f of the samples below this t are
    repeated sqrt(t / f) times an epoch; in a mixture, shares within each data set. 0: every sample
    once."""
    locality: Literal["global", "window"] = "global"
    """`global`: any sample may follow any other, for local disks. `window`: shards are taken in
    order, shuffled anew each epoch, and samples shuffled within `window_shards` of them, for object
    storage and for splits whose permutation does not fit memory."""
    window_shards: Count = 8
    """Shards of a window."""
    weight: Positive = 1.0
    """Share of `path` in a mixture, relative to the weights of `mixture`."""
    mixture: tuple[MixturePart, ...] = ()
    """More data sets to train on, each with a weight."""
    mixture_classes: Literal["own", "by_name"] = "own"
    """Whether equal class names of different data sets are different classes or the same."""
    strict: bool = False
    """A damaged training image stops the run at once, instead of being replaced by another of its
    class."""
    max_bad_share: Fraction = 0.01
    """Damaged images among those read in this run, above which it stops (after 1,000 images)."""
    max_bad_in_a_row: Count = 100
    """Damaged images one after the other that stop the run: that is a lost shard, not bad luck."""
    storage: StorageConfig = StorageConfig()
    loader_processes: Annotated[int, Field(ge=0)] = 1
    """Decoding processes of each worker; 0 decodes in a thread of the training process."""
    prefetch: Count = 4
    """Micro-batches that each decoding process prepares ahead."""
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _order_agrees(self) -> DataConfig:
        if self.order == "balanced":
            if self.batch_size % self.samples_per_class:
                raise ValueError(
                    f"data.batch_size={self.batch_size} is no multiple of "
                    f"data.samples_per_class={self.samples_per_class}; data.order=balanced makes "
                    "batches of whole classes"
                )
            for name, unset in (("mixture", ()), ("locality", "global")):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"data.order=balanced needs data.{name}={unset!r}: it draws from all "
                        "classes at once"
                    )
        if self.repeat_below and (self.order, self.locality) != ("shuffled", "global"):
            raise ValueError(
                f"data.repeat_below={self.repeat_below} needs data.order=shuffled and "
                "data.locality=global"
            )
        return self

    @model_validator(mode="after")
    def _folds_agree(self) -> DataConfig:
        if self.folds == 1:
            raise ValueError("data.folds=1 would leave no class to train on; give 2 or more, or 0")
        if self.fold >= max(self.folds, 1):
            wanted = f"0..{self.folds - 1}" if self.folds else "0 while data.folds=0"
            raise ValueError(f"data.fold={self.fold} with data.folds={self.folds}; give {wanted}")
        if self.folds and self.mixture:
            raise ValueError(
                f"data.folds={self.folds} with data.mixture: folds divide the classes of one data "
                "set; leave one of the two out"
            )
        return self
