"""`dist-dml pack synthetic`: as many classes as wanted, each a seeded pattern. Needs no download.

A class is a sum of twelve plane waves whose 24 coefficients are its *code*; an image is that
pattern, shifted, turned, zoomed and made noisy. Every number is drawn from (seed, class, image), so
that any part of the data set can be made anywhere. `VERSION` and the ranges below define the data
set: change the one with the other.

Dimensions: `N` images, `K` waves, `S` pixels of a side, `C` channels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe, split_of
from dist_dml.data.pack.synthetic_splits import SyntheticCounts, divide
from dist_dml.data.pack.writing import Sample, ShardPlan, plan_shards, write_shards
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of, keyed_uniform, row_keys

VERSION = 1
FORMATS = ("png", "jpg")
_WAVES = np.array(
    [
        *((1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2)),
        *((2, 1), (2, -1), (1, 2), (1, -2), (2, 2), (2, -2)),
    ],
    np.float32,
)
"""Cycles across and down, (K, 2): every direction of up to two cycles, each once (-f is f)."""
_SHIFT = 0.125
"""Largest shift either way, as a share of the side."""
_ROTATION_DEGREES = 10.0
_ZOOM = 0.1
"""Largest logarithm of the magnification."""
_AMPLITUDE = (54.0, 90.0)
_BRIGHTNESS = 25.0
_NOISE = 20.0
"""Grey levels either way, uniform."""
_JPEG_QUALITY = 90
_BATCH = 2048
"""Images drawn at a time: 2 MB a temporary at 16 x 16 pixels."""
_MOST_NUMBERS = 2**24
"""Images of a class in one split that have keys of their own."""


def class_codes(
    class_ids: Int64[np.ndarray, " N"], channels: int, seed: int
) -> Float32[np.ndarray, "N C 2 K"]:
    """Cosine and sine coefficients of each class's waves; of length 1 in each channel.

    Uniform in a cube, then normalised: only additions, divisions and a square root, which every
    machine rounds alike. In 24 dimensions the nearest of a million other classes is at a cosine of
    about 0.8: near, and told apart through the noise.
    """
    keys = row_keys(key_of(seed, "synthetic class"), torch.from_numpy(class_ids))
    draws = 2 * keyed_uniform(keys, 2 * len(_WAVES) * channels).numpy() - 1
    codes = draws.reshape(len(class_ids), channels, 2, len(_WAVES))
    return codes / np.sqrt(np.square(codes).sum(axis=(2, 3), keepdims=True))


def draw_images(
    class_ids: Int64[np.ndarray, " N"],
    numbers: Int64[np.ndarray, " N"],
    split: str,
    size: int,
    channels: int,
    seed: int,
) -> UInt8[np.ndarray, "N S S C"]:
    """Image `numbers[i]` of class `class_ids[i]` in a split; each depends on these alone.

    With the wave k of an image at the phase `t_k(x, y) = al_k(x) + be_k(y)`, turned, zoomed and
    shifted, the pattern is the sum of `a cos t + b sin t = cos be (a cos al + b sin al) + sin be
    (b cos al - a sin al)`: trigonometry of 4KS numbers instead of 2KS^2, and one product (S, 2K) x
    (2K, SC) an image. About 10 us an image of 16 x 16 on one core (2026-11).
    """
    codes = class_codes(class_ids, channels, seed)
    positions = torch.from_numpy(class_ids * _MOST_NUMBERS + numbers)
    keys = row_keys(key_of(seed, f"synthetic {split}"), positions)
    draws = 2 * keyed_uniform(keys, 6).numpy() - 1
    across, down = _phases(draws, size)

    cos, sin = np.cos(across)[..., None], np.sin(across)[..., None]  # (N, K, S, 1)
    a, b = codes.transpose(2, 0, 3, 1)[:, :, :, None, :]  # (N, K, 1, C) each
    right = np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=1)
    left = np.concatenate([np.cos(down), np.sin(down)], axis=1)  # (N, 2K, S)
    count = len(class_ids)
    pattern = left.transpose(0, 2, 1) @ right.reshape(count, 2 * len(_WAVES), size * channels)

    low, high = _AMPLITUDE
    amplitude = low + (high - low) * (draws[:, 4:5] + 1) / 2
    noise = 2 * keyed_uniform(keys, size * size * channels, salt=1).numpy() - 1
    levels = amplitude * pattern.reshape(count, -1) + _BRIGHTNESS * draws[:, 5:6] + _NOISE * noise
    pixels = np.clip(np.rint(levels + 127.5), 0, 255).astype(np.uint8)
    return pixels.reshape(count, size, size, channels)


def _phases(
    draws: Float32[np.ndarray, "N 6"], size: int
) -> tuple[Float32[np.ndarray, "N K S"], Float32[np.ndarray, "N K S"]]:
    """`al` and `be` of `draw_images`: of each wave at each column, and at each row."""
    angle = math.radians(_ROTATION_DEGREES) * draws[:, 2:3]
    zoom = np.exp(_ZOOM * draws[:, 3:4])
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    wave_x = cos * _WAVES[:, 0] + sin * _WAVES[:, 1]
    wave_y = cos * _WAVES[:, 1] - sin * _WAVES[:, 0]
    shift = _SHIFT * (draws[:, :1] * _WAVES[:, 0] + draws[:, 1:2] * _WAVES[:, 1])
    centres = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    turn = np.float32(2 * math.pi)
    return turn * (wave_x[..., None] * centres + shift[..., None]), turn * (
        wave_y[..., None] * centres
    )


def pack_synthetic(
    out: str | Path,
    counts: SyntheticCounts,
    seed: int = 0,
    size: int = 16,
    channels: int = 1,
    image_format: str = "png",
    shard_samples: int = 20_000,
    processes: int = 0,
) -> Index:
    """Draw and pack patterns as `train`, `seen` (held-out images of training classes) and `test`.

    Classes 0..C-1 train; the test classes follow. Samples are shuffled within their split.

    Args:
        out: data set folder.
        counts: classes, and images of each.
        seed: of the patterns, the images and the order.
        size: height and width in pixels.
        channels: 1 for grey, 3 for RGB.
        image_format: `png` (lossless) or `jpg`.
        shard_samples: images of a tar.
        processes: drawing processes; 0 takes one per core.

    Raises:
        UsageError: a parameter is out of range, the disk is too small, or `out` is in use.
    """
    import cv2
    import simplejpeg

    _check(seed, size, channels, image_format, shard_samples)
    samples = divide(counts, seed)
    shards = [
        shard
        for split, rows in samples.items()
        for shard in plan_shards(split, rows, shard_samples)
    ]
    source = {
        "kind": "synthetic",
        "version": VERSION,
        "seed": seed,
        "size": size,
        "channels": channels,
        "format": image_format,
        "shard_samples": shard_samples,
        **counts.as_dict(),
    }
    made_with = {"numpy": np.__version__, "torch": str(torch.__version__)}
    made_with |= (
        {"opencv": cv2.__version__}
        if image_format == "png"
        else {"simplejpeg": simplejpeg.__version__}
    )
    draw = partial(_samples_of, seed, size, channels, image_format)
    examples = draw(ShardPlan("train-000000.tar", samples["train"][:64]))
    needed = sum(len(rows) for rows in samples.values()) * _bytes_per_sample(examples)
    return write_shards(Path(out), shards, draw, source, made_with, needed, processes)


def _check(seed: int, size: int, channels: int, image_format: str, shard_samples: int) -> None:
    for option, value, fits, expected in (
        ("--seed", seed, 0 <= seed < 2**63, "0 or more"),
        ("--size", size, 8 <= size <= 256, "8 to 256 pixels"),
        ("--channels", channels, channels in (1, 3), "1 (grey) or 3 (RGB)"),
        ("--format", image_format, image_format in FORMATS, " or ".join(FORMATS)),
        ("--shard-samples", shard_samples, shard_samples >= 1, "1 or more"),
    ):
        if not fits:
            raise UsageError(f"{option}={value}: expected {expected}; change it")


def _bytes_per_sample(examples: Iterator[Sample]) -> int:
    """Bytes of a tar for each sample: a header of 512 a member, contents filled up to 512."""
    sizes = [
        512 + -(-len(data) // 512) * 512
        for sample in examples
        for name, data in sample.items()
        if name != "__key__"
    ]
    return 2 * sum(sizes) // len(sizes)


def _samples_of(
    seed: int, size: int, channels: int, image_format: str, shard: ShardPlan
) -> Iterator[Sample]:
    """The samples of one shard, drawn in batches."""
    if parent_process() is not None:
        # Drawing runs in as many processes as cores: threads inside would get in their way.
        torch.set_num_threads(1)
    split = split_of(shard.name)
    encode = _encoder(image_format, channels)
    for start in range(0, len(shard.samples), _BATCH):
        class_ids, numbers = np.asarray(shard.samples[start : start + _BATCH]).T
        # Rows of a transposed array are not contiguous, which torch and speed want.
        class_ids, numbers = np.ascontiguousarray(class_ids), np.ascontiguousarray(numbers)
        images = draw_images(class_ids, numbers, split, size, channels, seed)
        for class_id, number, image in zip(
            class_ids.tolist(), numbers.tolist(), images, strict=True
        ):
            yield {
                "__key__": f"c{class_id:08d}-{split}{number:04d}",
                image_format: encode(image),
                "cls": b"%d" % class_id,
            }


def _encoder(image_format: str, channels: int) -> Callable[[UInt8[np.ndarray, "S S C"]], bytes]:
    """What makes the file of an image.

    One core, 2026-11, 16 x 16 grey: PNG without compression 6 us to encode and 4 us to decode in
    340 bytes; compressed 18 and 8 us in 298 bytes, which fill the same 512 of a tar; JPEG 4 and 3
    us in 430 bytes, not lossless.
    """
    import cv2
    import simplejpeg

    if image_format == "png":
        options = [cv2.IMWRITE_PNG_COMPRESSION, 0]
        # OpenCV takes blue first.
        order = slice(None, None, -1 if channels == 3 else 1)
        return lambda image: cv2.imencode(".png", image[:, :, order], options)[1].tobytes()
    space, sampling = ("GRAY", "Gray") if channels == 1 else ("RGB", "444")
    return lambda image: simplejpeg.encode_jpeg(
        image, quality=_JPEG_QUALITY, colorspace=space, colorsubsampling=sampling
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack synthetic`."""
    folder = "datasets/synthetic"
    parser.add_argument("out", nargs="?", default=folder, help=f"new data set folder ({folder})")
    for option, default, text in (
        ("--classes", 100_000, "training classes"),
        ("--train-per-class", 2, "training images of each class"),
        ("--frequent-classes", None, "training classes with more images (a thousandth)"),
        ("--frequent-per-class", 500, "training images of each of those"),
        ("--seen-classes", None, "training classes with held-out images (5000)"),
        ("--seen-per-class", 4, "held-out images of each of those"),
        ("--test-classes", 5_000, "classes that are never trained on"),
        ("--test-per-class", 4, "images of each of those"),
        ("--size", 16, "height and width in pixels"),
        ("--channels", 1, "1: grey, 3: RGB"),
        ("--seed", 0, "of patterns, images and order"),
        ("--shard-samples", 20_000, "images of a shard"),
        ("--processes", 0, "drawing processes; 0: all cores"),
    ):
        shown = text if default is None else f"{text} ({default})"
        parser.add_argument(option, type=int, default=default, help=shown)
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the images (png)")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack synthetic`. Returns the exit code."""
    frequent, seen = arguments.frequent_classes, arguments.seen_classes
    counts = SyntheticCounts(
        arguments.classes,
        arguments.train_per_class,
        arguments.classes // 1000 if frequent is None else frequent,
        arguments.frequent_per_class,
        min(5000, arguments.classes) if seen is None else seen,
        arguments.seen_per_class,
        arguments.test_classes,
        arguments.test_per_class,
    )
    index = pack_synthetic(
        arguments.out,
        counts,
        arguments.seed,
        arguments.size,
        arguments.channels,
        arguments.format,
        arguments.shard_samples,
        arguments.processes,
    )
    print(describe(index))
    return 0
