"""Whether exported files give the embeddings of the network that they came from.

Dimensions: n images, S = `data.image.size`, C channels, D features of an embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from dist_dml.errors import RunError
from dist_dml.models.embedder import Embedder
from dist_dml.models.export_formats import read_format

TOLERANCE = 1e-4
"""Largest difference of a number of an embedding; times the largest number where that exceeds 1."""
BATCH_SIZES = (1, 2, 5, 16)
"""Batches that are compared: one image, which exporters like to take for a constant, and others."""


def check_parity(
    embedder: Embedder,
    normalise: bool,
    folder: Path,
    formats: tuple[str, ...],
    images: UInt8[Tensor, "n S S C"],
) -> dict[str, float]:
    """The largest absolute difference of each format to the eager embedder.

    The embedder is the one of training, in evaluation and float32, called as evaluation calls it;
    the files are read back from the disk.

    Args:
        embedder: on the CPU.
        normalise: whether the files give unit length.
        folder: of the files.
        formats: what to compare.
        images: at least as many as the largest batch.

    Raises:
        RunError: a difference exceeds the tolerance, or a number is not finite; says by how much,
            in which format and batch.
    """
    assert len(images) >= max(BATCH_SIZES)
    embedder = embedder.float().eval()
    _check_images_differ(embedder, images)
    worst = {}
    for name in formats:
        run = read_format(folder, name)
        worst[name] = 0.0
        for size in BATCH_SIZES:
            batch = images[-size:].contiguous()
            with torch.no_grad():
                expected = embedder(batch.permute(0, 3, 1, 2)).float()
                expected = F.normalize(expected) if normalise else expected
            wanted, given = expected.numpy(), run(batch.numpy())
            if given.shape != wanted.shape or given.dtype != np.float32:
                raise RunError(
                    f"{name} gives {given.dtype} {given.shape} for a batch of {size}, expected "
                    f"float32 {wanted.shape}; nothing was exported"
                )
            difference = float(np.abs(given - wanted).max())
            allowed = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
            if not difference <= allowed:  # Neither is nan.
                raise RunError(
                    f"{name} differs from the network by {difference:.3g} for a batch of {size}, "
                    f"more than {allowed:.3g}; nothing was exported, leave that format out of "
                    "--formats"
                )
            worst[name] = max(worst[name], difference)
    return worst


def _check_images_differ(embedder: Embedder, images: Tensor) -> None:
    """Where all embeddings are one and the same, wrong files would pass too."""
    with torch.no_grad():
        embeddings = embedder(images.permute(0, 3, 1, 2))
    if float((embeddings - embeddings[:1]).abs().max()) <= TOLERANCE:
        raise RunError(
            f"the network gives {len(images)} images the same embedding: it has collapsed, or the "
            "images are all alike; nothing was exported, look at the run's curves and images"
        )
