"""Whether two images are the same: by their bytes, by their pixels, or by how well they align.

Perceptual hashes only propose. Of the candidates on the packed glyphs, drawings of thin strokes on
an empty ground, the comparison below refuses 99.5%.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int8, Int64, UInt8

from dist_dml.data.faults import BadSample
from dist_dml.data.image_hashes import UnreadableImage, over_processes, places
from dist_dml.data.index import Index
from dist_dml.data.progress import ProgressLine
from dist_dml.data.reader import Reader

KINDS = ("bytes", "pixels", "near", "different")
"""What a pair can be, the most alike first; its code is its position."""
_SIDE = 64
_COARSE = 16
_WORTH_ALIGNING = 0.7
"""Correlation of 16 x 16 thumbnails below which alignment is not tried. Of copies cropped by 5% at
a corner it loses 5% (2026-11), and it spares most pairs of different drawings 1 to 2 ms."""
_MOST_MOVED, _MOST_TURNED, _LEAST_COMMON = 0.12, 0.04, 0.7
"""How far a corner may move in an alignment, how far an axis may turn, and the share of the area
that must stay in common. A cropped copy moves by a few percent and does not turn; without these
limits different drawings are bent into each other."""
_LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)
"""Grey from RGB, as decoders and image editors make it (ITU-R BT.601)."""
_BLUR = 1.0
_CHUNK = 128
"""Pairs that a process takes at a time."""


@dataclass(frozen=True, eq=False)
class Compared:
    """What some pairs of images are.

    Attributes:
        kind: position in `KINDS`.
        correlation: of the aligned thumbnails, -1..1; 1 for equal pixels, -1 where one of the two
            cannot be read.
        bad: images that could not be read.
    """

    kind: Int8[np.ndarray, " p"]
    correlation: Float32[np.ndarray, " p"]
    bad: tuple[UnreadableImage, ...]


def compare_images(
    index: Index,
    left: Int64[np.ndarray, " p"],
    right: Int64[np.ndarray, " p"],
    threshold: float,
    processes: int,
) -> Compared:
    """Compare pairs of samples. Costs two reads and decodings a pair, and 1 to 2 ms if they are
    alike but not nearly equal.

    Args:
        index: the data set.
        left: sample ids.
        right: sample ids.
        threshold: correlation from which two images are near copies.
        processes: at most so many; 0 takes one per core.
    """
    # Pairs that share an image, or a shard, stand together: each is decoded about once.
    order = np.lexsort((left, right))
    jobs = []
    for start in range(0, len(order), _CHUNK):
        part = order[start : start + _CHUNK]
        ids, row = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        pairs = row.reshape(2, len(part))
        jobs.append((ids, places(index, ids), pairs[0], pairs[1], threshold))
    kind = np.full(len(order), KINDS.index("different"), np.int8)
    correlation = np.full(len(order), -1, np.float32)
    bad: dict[int, UnreadableImage] = {}
    progress = ProgressLine("compare", float(len(order)), "pairs")
    for number, found in enumerate(over_processes(index, _compare_chunk, jobs, processes)):
        part = order[number * _CHUNK : (number + 1) * _CHUNK]
        kind[part], correlation[part] = found.kind, found.correlation
        bad.update({image.sample_id: image for image in found.bad})
        progress.advance(float(len(part)))
    if len(order):
        progress.finish()
    return Compared(kind, correlation, tuple(bad[key] for key in sorted(bad)))


def _compare_chunk(
    reader: Reader,
    ids: np.ndarray,
    where: tuple[np.ndarray, ...],
    left: np.ndarray,
    right: np.ndarray,
    threshold: float,
) -> Compared:
    """`left` and `right` are rows of `ids`. Holds thumbnails of all images and pixels of two."""
    listed = list(zip(*(column.tolist() for column in where), strict=True))
    thumbnails: dict[int, np.ndarray] = {}
    bad = []
    for row, place in enumerate(listed):
        try:
            thumbnails[row] = thumbnail(reader.image(*place))
        except BadSample as error:
            bad.append(UnreadableImage(int(ids[row]), error.kind, str(error)))
    kind = np.full(len(left), KINDS.index("different"), np.int8)
    correlation = np.full(len(left), -1, np.float32)
    for pair, (i, j) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        if i not in thumbnails or j not in thumbnails:
            continue
        name = _equality(reader, listed[i], listed[j], thumbnails[i], thumbnails[j])
        if name is None:
            correlation[pair] = aligned_correlation(thumbnails[i], thumbnails[j], threshold)
            name = "near" if correlation[pair] >= threshold else "different"
        else:
            correlation[pair] = 1
        kind[pair] = KINDS.index(name)
    return Compared(kind, correlation, tuple(bad))


def _equality(
    reader: Reader,
    one: tuple[int, int, int, int],
    other: tuple[int, int, int, int],
    thumbnail_one: np.ndarray,
    thumbnail_other: np.ndarray,
) -> str | None:
    """`bytes`, `pixels` or None. Checksums and thumbnails propose, the content itself decides."""
    if one[2:] == other[2:] and reader.read(*one[:3]) == reader.read(*other[:3]):
        return "bytes"
    if np.array_equal(thumbnail_one, thumbnail_other) and np.array_equal(
        reader.image(*one), reader.image(*other)
    ):
        return "pixels"
    return None


def thumbnail(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "64 64 3"]:
    """The whole image at 64 x 64 pixels, as RGB: copies in other sizes agree."""
    import cv2

    small = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return np.repeat(small.reshape(_SIDE, _SIDE, -1), 3 // image.shape[2], axis=2)


def aligned_correlation(
    one: UInt8[np.ndarray, "64 64 3"], other: UInt8[np.ndarray, "64 64 3"], enough: float
) -> float:
    """The normalised correlation of two thumbnails, after a small affine alignment if it helps.

    All three colours are correlated together: a red copy of a blue shirt is another picture. Where
    one image is grey, both are. Alignment (Evangelidis, Psarakis, Parametric Image Alignment Using
    Enhanced Correlation Coefficient Maximization, PAMI 2008) finds crops of a few percent; it is
    left out where the plain correlation is `enough`, or too small for any hope.
    """
    first, second = one.astype(np.float32), other.astype(np.float32)
    if _is_grey(first) or _is_grey(second):
        first, second = first @ _LUMA, second @ _LUMA
    plain = _correlation(first, second)
    if plain >= enough or _correlation(_coarse(first), _coarse(second)) < _WORTH_ALIGNING:
        return plain
    return max(plain, _after_alignment(first, second))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt(float((one * one).sum()) * float((other * other).sum()))
    return float((one * other).sum() / scale) if scale > 0 else 0.0


def _coarse(image: np.ndarray) -> np.ndarray:
    block = _SIDE // _COARSE
    return image.reshape(_COARSE, block, _COARSE, block, -1).mean(axis=(1, 3))


def _is_grey(image: np.ndarray) -> bool:
    return float((image.max(axis=2) - image.min(axis=2)).mean()) < 2


def _after_alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation where the two overlap once `other` is warped onto `one`; -1 if that fails."""
    import cv2

    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 1e-3)
    start = np.eye(2, 3, dtype=np.float32)
    everywhere = np.ones((_SIDE, _SIDE), np.uint8)
    greys = one.mean(axis=2), other.mean(axis=2)
    try:
        _, warp = cv2.findTransformECC(*greys, start, cv2.MOTION_AFFINE, criteria, everywhere, 5)
    except cv2.error:  # It does not converge.
        return -1.0
    corners = np.array([(x, y, 1) for x in (0, _SIDE) for y in (0, _SIDE)], np.float64)
    moved_by = np.abs(corners @ warp.T - corners[:, :2]).max() / _SIDE
    turned_by = max(abs(float(warp[0, 1])), abs(float(warp[1, 0])))
    if moved_by > _MOST_MOVED or turned_by > _MOST_TURNED:
        return -1.0
    # Warping blurs one of the two; blurred alike, fine texture does not tell them apart.
    one, other = (cv2.GaussianBlur(image, (0, 0), _BLUR) for image in (one, other))
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(other, warp, (_SIDE, _SIDE), flags=how).reshape(_SIDE, _SIDE, -1)
    inside = np.ones((_SIDE, _SIDE), np.float32)
    common = cv2.warpAffine(inside, warp, (_SIDE, _SIDE), flags=how) > 0.999
    if common.mean() < _LEAST_COMMON:
        return -1.0
    return _correlation(one.reshape(moved.shape)[common], moved[common])
