"""An embedder with batch norms that have seen images, its export's files, and encoded pictures."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from dist_dml.config import ModelConfig
from dist_dml.data_config import ImageConfig
from dist_dml.models.embedder import Embedder, build_embedder
from dist_dml.models.export_formats import write_formats
from dist_dml.models.export_module import (
    ImageEmbedder,
    example_images,
    export_config,
    preprocessing_of,
)

IMAGE = ImageConfig(size=12, resize=0, channels=1, mean=(0.4,), std=(0.3,))
MODEL = ModelConfig(embedding_dim=8, norm="batch", dropout=0.4, pooling="gem")


def trained(model: ModelConfig = MODEL, image: ImageConfig = IMAGE) -> Embedder:
    """An embedder whose batch norms have seen images: those of a new one do nothing."""
    embedder = build_embedder(model, image, 3, None)
    embedder.train()
    images = example_images(image, 32, seed=5).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(20):
            embedder(images, torch.arange(len(images)))
    return embedder.eval()


def written(
    embedder: Embedder,
    folder: Path,
    formats: tuple[str, ...],
    normalise: bool,
    model: ModelConfig = MODEL,
    image: ImageConfig = IMAGE,
) -> Path:
    """An export's files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = export_config(model, image, embedder.embedding_dim, normalise)
    preprocessing = preprocessing_of(image, normalise)
    example = example_images(image, 2)
    write_formats(
        ImageEmbedder(embedder, normalise), config, preprocessing, example, formats, folder
    )
    (folder / "preprocessing.json").write_text(json.dumps(preprocessing))
    return folder


def picture(height: int, width: int, extension: str) -> bytes:
    """An encoded smooth picture."""
    coarse = np.random.default_rng(height).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(extension, image)[1].tobytes()
