"""`dist-dml pack digits`: scikit-learn's handwritten digits as a closed set. Needs no download.

1,797 grey images of 8 x 8 pixels with values 0..16, ten classes: the test part of UCI's "Optical
Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), which scikit-learn brings along.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.writing import plan_shards, write_pack
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

VERSION = 1
_LARGEST = 16
_BYTES_PER_IMAGE = 130


@dataclass(frozen=True)
class DigitSample:
    """One image: its number in scikit-learn's order, its class, its 8 x 8 grey levels."""

    number: int
    label: int
    levels: bytes


def grey_levels(values: Float[np.ndarray, "N 8 8"]) -> UInt8[np.ndarray, "N 8 8"]:
    """Values 0..16 as grey levels 0..255, rounded (the half of value 8, 127.5, to even: 128)."""
    return np.rint(values * 255 / _LARGEST).astype(np.uint8)


def pack_digits(
    out: str | Path, seed: int = 0, seen_fraction: float = 0.5, shard_samples: int = 2048
) -> Index:
    """Pack the digits as grey PNG images: of each class a share is `seen`, the rest `train`.

    Args:
        out: data set folder.
        seed: of the division and of the order.
        seen_fraction: share of each class that is held out; at least one image is on each side.
        shard_samples: images of a tar.

    Raises:
        UsageError: the share is not between 0 and 1, or `out` is in use.
    """
    import cv2
    from sklearn.datasets import load_digits

    if not 0 < seen_fraction < 1:
        raise UsageError(
            f"--seen-fraction={seen_fraction:g}: expected a share above 0 and below 1, so that "
            "each class is trained on and held out; choose for example 0.5"
        )
    values, targets = load_digits(return_X_y=True)
    levels, labels = grey_levels(values.reshape(-1, 8, 8)), np.asarray(targets, np.int64)
    splits = _divide(levels, labels, seed, seen_fraction)
    source = {
        "kind": "digits",
        "version": VERSION,
        "seed": seed,
        "seen_fraction": seen_fraction,
        "shard_samples": shard_samples,
        "content": hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest(),
    }
    shards = [
        shard
        for split, samples in splits.items()
        for shard in plan_shards(split, samples, shard_samples)
    ]
    made_with = {"opencv": cv2.__version__}
    size = _BYTES_PER_IMAGE * len(labels)
    # A fraction of a second of work: one process writes it all.
    return write_pack(Path(out), shards, _render, source, made_with, size, processes=1)


def _divide(
    levels: UInt8[np.ndarray, "N 8 8"],
    labels: Int[np.ndarray, " N"],
    seed: int,
    seen_fraction: float,
) -> dict[str, list[DigitSample]]:
    """`seen_fraction` of each class to `seen`, drawn by class; both splits shuffled."""
    numbers: dict[str, list[int]] = {"train": [], "seen": []}
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        drawn = generator(key_of(seed, "digits seen", label)).permutation(members).tolist()
        count = min(max(round(seen_fraction * len(drawn)), 1), len(drawn) - 1)
        numbers["seen"] += drawn[:count]
        numbers["train"] += drawn[count:]
    splits = {}
    for name, chosen in numbers.items():
        chosen.sort()
        order = generator(key_of(seed, "pack order " + name)).permutation(len(chosen))
        splits[name] = [
            DigitSample(chosen[i], int(labels[chosen[i]]), levels[chosen[i]].tobytes())
            for i in order
        ]
    return splits


def _render(sample: DigitSample) -> dict[str, str | bytes]:
    import cv2

    picture = np.frombuffer(sample.levels, np.uint8).reshape(8, 8)
    return {
        "__key__": f"digit-{sample.number:04d}",
        "png": cv2.imencode(".png", picture)[1].tobytes(),
        "cls": str(sample.label).encode(),
        "json": json.dumps({"label": sample.label, "number": sample.number}).encode(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack digits`."""
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument("--seed", type=int, default=0, help="of division and order")
    parser.add_argument("--seen-fraction", type=float, default=0.5, help="held-out share of each")
    parser.add_argument("--shard-samples", type=int, default=2048, help="images of a shard")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack digits`. Returns the exit code."""
    index = pack_digits(
        arguments.out, arguments.seed, arguments.seen_fraction, arguments.shard_samples
    )
    print(describe(index))
    return 0
