"""Fingerprints of pictures: which images of a data set are the same, or nearly so.

Each image gets a *perceptual hash* of 64 bits, which copies share within a few bits, and a digest
of its pixels, which only equal pixels share. Both are kept in `image_hashes.parquet` beside the
index, so that images are decoded once.

The hash is the DCT hash ("pHash": Zauner, Implementation and Benchmarking of Perceptual Image Hash
Functions, 2010): 32 x 32 grey pixels, the 8 x 8 lowest frequencies, a bit for each coefficient that
exceeds their median. Measured against the difference hash (dHash) in 2026-11 on 43 photos and 224
tiles of 160 pixels cut from them, at a distance of 8: of 35,511 pairs of different pictures dHash
takes 48 for copies and pHash none; of copies with noise of 8 grey levels dHash misses 5.6%,
pHash 1.1%.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt64

from dist_dml.data.faults import BadSample
from dist_dml.data.index import Index
from dist_dml.data.parquet_files import write_parquet
from dist_dml.data.progress import ProgressLine
from dist_dml.data.reader import Reader, open_reader
from dist_dml.process_pool import process_pool
from dist_dml.usable import usable_cores

T = TypeVar("T")

HASHES_FILE = "image_hashes.parquet"
HASH_VERSION = "1"
"""Changes with anything that changes a hash or a digest: older files are made anew."""
FLAT_CONTRAST = 4.0
"""Standard deviation in grey levels below which an image has too little in it to be told from
others: what its hash holds is the noise of its encoding."""
LEAST_SIDE = 16
"""Height and width in pixels below which an image has too little in it likewise: of the held-out
handwritten digits of 8 x 8 pixels 11% passed for copies of training images (2026-11)."""
_SIDE = 32
_CHUNK = 256
"""Images that a process takes at a time."""
_LEAST_JOBS = 8


@dataclass(frozen=True)
class UnreadableImage:
    """An image that cannot be hashed, because it cannot be read."""

    sample_id: int
    kind: str
    reason: str


@dataclass(frozen=True, eq=False)
class ImageHashes:
    """Hash, digest and contrast of all samples of a data set, by sample id.

    Attributes:
        hashes: perceptual hashes; 0 where the image cannot be read.
        pixels: first 64 bits of the BLAKE2b digest of height, width and RGB pixels; 0 likewise.
        contrast: standard deviation of the 32 x 32 grey pixels, in levels; 0 for images smaller
            than 16 pixels, -1 for those that cannot be read.
        bad: the images that cannot be read, by sample id.
    """

    hashes: UInt64[np.ndarray, " N"]
    pixels: UInt64[np.ndarray, " N"]
    contrast: Float32[np.ndarray, " N"]
    bad: tuple[UnreadableImage, ...]

    @property
    def readable(self) -> Bool[np.ndarray, " N"]:
        """Where there are pixels to compare."""
        return self.contrast >= 0

    @property
    def telling(self) -> Bool[np.ndarray, " N"]:
        """Where the hash says something: not in nearly uniform nor in tiny images."""
        return self.contrast >= FLAT_CONTRAST


def perceptual_hash(image: UInt8[np.ndarray, "H W C"]) -> tuple[int, float]:
    """The 64-bit DCT hash of an image and its contrast (see `ImageHashes`). 25 us at 64 x 64.

    The lowest frequency (the mean) is among the 64 and nearly always above their median. As half of
    the coefficients exceed their median, distances between hashes are even, but for ties.
    """
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image[:, :, 0]
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[:8, :8]
    bits = np.packbits((lowest > np.median(lowest)).ravel())
    contrast = float(small.std()) if min(grey.shape) >= LEAST_SIDE else 0.0
    return int.from_bytes(bits.tobytes(), "big"), contrast


def pixel_digest(image: UInt8[np.ndarray, "H W C"]) -> int:
    """64 bits that equal pixels share, whatever file format held them. About 1 GB/s."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest(), "big")


def hash_images(index: Index, processes: int) -> ImageHashes:
    """Hash every image of a data set, or take the hashes that an earlier call left.

    `image_hashes.parquet` belongs to the fingerprint of the data set (without its quarantine) and
    is made anew when that has changed. Images that could not be read are tried again each time:
    storage may be repaired. Those in quarantine are left out. Takes 20 bytes of memory a sample,
    and reads and decodes each image once.

    Args:
        index: the data set.
        processes: decoding processes; 0 takes one per core.
    """
    stored = _load(index)
    if stored is None:
        columns = (
            np.zeros(len(index), np.uint64),
            np.zeros(len(index), np.uint64),
            np.full(len(index), -1, np.float32),
        )
    else:
        columns = stored
    hashes, pixels, contrast = columns
    wanted = contrast < 0
    wanted[index.quarantined] = False
    missing = np.flatnonzero(wanted)
    if not len(missing):
        return ImageHashes(hashes, pixels, contrast, ())
    bad: list[UnreadableImage] = []
    progress = ProgressLine("hash images", float(len(missing)), "images")
    for rows, part in _hashed(index, missing, processes):
        hashes[rows], pixels[rows], contrast[rows] = part.hashes, part.pixels, part.contrast
        bad += part.bad
        progress.advance(float(len(rows)))
    progress.finish()
    if len(bad) < len(missing):
        _store(index, hashes, pixels, contrast)
    return ImageHashes(hashes, pixels, contrast, tuple(bad))


def _hashed(
    index: Index, rows: Int64[np.ndarray, " n"], processes: int
) -> Iterator[tuple[Int64[np.ndarray, " c"], ImageHashes]]:
    """Hash the images of some rows, in pieces; yields the rows of a piece and their hashes."""
    pieces = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    jobs = [(piece, places(index, piece)) for piece in pieces]
    yield from zip(pieces, over_processes(index, _hash_piece, jobs, processes), strict=True)


def places(index: Index, rows: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, ...]:
    """Shard, offset, size and CRC-32 of some samples: what `Reader.image` asks for."""
    return tuple(c[rows] for c in (index.shard, index.offset, index.size, index.checksum))


def over_processes(
    index: Index,
    work: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    processes: int,
) -> Iterator[T]:
    """`work(reader, *job)` of each job in order, `reader` giving the data set's images in RGB.

    Args:
        index: the data set.
        work: a function of a module, that processes can find by its name.
        jobs: further arguments of each call.
        processes: at most so many; 0 takes one per core. For 1 no process is started.
    """
    reader = open_reader(index, channels=3)
    # A process takes a second to start: it gets a few jobs at least.
    processes = min(processes or usable_cores(), len(jobs) // _LEAST_JOBS)
    if processes <= 1:
        yield from (work(reader, *job) for job in jobs)
        return
    with process_pool(processes, _start_worker, reader) as pool:
        try:
            yield from pool.map(partial(_in_worker, work), jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker_reader: list[Reader] = []
"""The reader of this worker process: sent once, since it holds the path of every shard."""


def _start_worker(reader: Reader) -> None:
    import cv2

    cv2.setNumThreads(1)
    _worker_reader[:] = [reader]


def _in_worker(work: Callable[..., T], job: tuple[Any, ...]) -> T:
    return work(_worker_reader[0], *job)


def _hash_piece(reader: Reader, rows: np.ndarray, where: tuple[np.ndarray, ...]) -> ImageHashes:
    hashes = np.zeros(len(rows), np.uint64)
    pixels = np.zeros(len(rows), np.uint64)
    contrast = np.full(len(rows), -1, np.float32)
    bad = []
    for i, place in enumerate(zip(*(column.tolist() for column in where), strict=True)):
        try:
            image = reader.image(*place)
        except BadSample as error:
            bad.append(UnreadableImage(int(rows[i]), error.kind, str(error)))
            continue
        hashes[i], contrast[i] = perceptual_hash(image)
        pixels[i] = pixel_digest(image)
    return ImageHashes(hashes, pixels, contrast, tuple(bad))


_COLUMNS = ("hash", "pixels", "contrast")


def _load(index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The stored columns, or None if there are none, or they are of other data or damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(index.folder / HASHES_FILE)
        stamp = table.schema.metadata or {}
        found = [table[name].to_numpy().copy() for name in _COLUMNS]
    except (OSError, KeyError, pyarrow.ArrowException):
        return None
    if stamp.get(b"fingerprint") != index.metadata["fingerprint"].encode():
        return None
    if stamp.get(b"version") != HASH_VERSION.encode() or len(found[0]) != len(index):
        return None
    return found[0], found[1], found[2]


def _store(index: Index, hashes: np.ndarray, pixels: np.ndarray, contrast: np.ndarray) -> None:
    import pyarrow

    table = pyarrow.table(dict(zip(_COLUMNS, (hashes, pixels, contrast), strict=True)))
    stamp = {"fingerprint": index.metadata["fingerprint"], "version": HASH_VERSION}
    write_parquet(index.folder / HASHES_FILE, table, stamp)
