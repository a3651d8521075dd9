"""The embedder of a checkpoint, for images that come one by one as files or bodies of requests.

Dimensions: n images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from dist_dml.checkpoint import load_embedder_tensors
from dist_dml.checkpoint_manifest import MANIFEST, Manifest, verify_checkpoint
from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.augment import evaluation_view
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluate import choose_checkpoint
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.world import Ranks, World, start_world
from dist_dml.split_embedding import Embed, embed_with

_EMBEDDER_FILE = "embedder.safetensors"


def find_query_checkpoint(text: str) -> tuple[Path, Manifest]:
    """The best checkpoint of a run folder, else its newest; or a checkpoint's own folder.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = Path(text)
    if (path / "checkpoints").is_dir():
        return choose_checkpoint(path, "best")
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path} is neither a run (it has no checkpoints) nor a checkpoint; name one, for "
            "example runs/demo"
        )
    return path, verify_checkpoint(path)


@dataclass(frozen=True, eq=False)
class QueryModel:
    """What turns images into embeddings.

    Attributes:
        checkpoint: its folder.
        config: of the run, without what only training needs.
        world: this process alone.
        embed: uint8 images to embeddings.
        width: D.
        embedder_sha256: of the embedder's file.
    """

    checkpoint: Path
    config: Config
    world: World
    embed: Embed
    width: int
    embedder_sha256: str

    def embed_images(self, images: Sequence[bytes]) -> Float32[np.ndarray, "n D"]:
        """Embeddings of encoded images, cut and resized as evaluations do it.

        Equal to those of `dist-dml embed` up to float32's rounding, which depends on the batch.

        Raises:
            BadSample: of the first that is no JPEG, PNG or WebP, is damaged, or has more than 89
                million pixels.
            RunError: the model gives NaN or infinity.
        """
        image, size = self.config.data.image, self.config.evaluation.batch_size
        parts = []
        for start in range(0, len(images), size):
            views = [evaluation_view(data, image) for data in images[start : start + size]]
            pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
            parts.append(self.embed(pixels).float().cpu().numpy())
        vectors = np.concatenate(parts)
        if not np.isfinite(vectors).all():
            raise RunError(
                f"{self.checkpoint} gives an embedding that is not finite; use another checkpoint"
            )
        return vectors


def load_query_model(checkpoint: Path, manifest: Manifest) -> QueryModel:
    """The embedder of a verified checkpoint, on this process's device.

    Raises:
        UsageError: its configuration or its tensors cannot be used.
    """
    config = resolve(str(checkpoint / "config.yaml"), []).config
    # The weights are the checkpoint's: nothing is fetched to begin from.
    model = config.model.model_copy(update={"pretrained": False, "weights": ""})
    engine = config.engine.model_copy(update={"name": "single"})
    config = config.model_copy(update={"model": model, "engine": engine})
    world = replace(start_world(engine, Ranks()), group=None)
    embedder = build_embedder(model, config.data.image, config.run.seed, None)
    embedder.load_state_dict(load_embedder_tensors(checkpoint))
    return QueryModel(
        checkpoint=checkpoint,
        config=config,
        world=world,
        embed=embed_with(embedder.to(world.device).eval(), config, world),
        width=embedder.embedding_dim,
        embedder_sha256=str(manifest.files[_EMBEDDER_FILE]["sha256"]),
    )
