"""The embedder: images in, embeddings out. Backbone, neck, and everything that makes N workers one.

Dimensions: r rows of this worker, D features of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from dist_dml.config import ModelConfig, OptimizerConfig
from dist_dml.data_config import ImageConfig
from dist_dml.keyed_random import key_of
from dist_dml.models.backbones import build_backbone
from dist_dml.models.dropout import RowKeys, convert_dropout
from dist_dml.models.neck import Neck
from dist_dml.parallel.batch_norm import ProcessGroup, convert_batch_norm, freeze_batch_norm


class Embedder(nn.Module):
    """Images to embeddings, in training equal for every number of workers.

    For N workers that each hold some rows of a batch, embeddings, running statistics and (summed
    over workers) gradients are those of one process on the whole batch: batch norms see all rows
    and dropout follows the rows' keys.

    Args:
        backbone: maps (r, channels, H, W) to (r, F, h, w) or (r, F).
        neck: maps that to (r, D).
        mean: per channel, of pixels in 0..1.
        std: per channel.
        row_keys: the holder that the dropouts of backbone and neck read.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        neck: Neck,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        row_keys: RowKeys,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.row_keys = row_keys
        self.embedding_dim = neck.embedding_dim
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(
        self,
        images: UInt8[Tensor, "r channels H W"] | Float[Tensor, "r channels H W"],
        row_keys: Int64[Tensor, " r"] | None = None,
    ) -> Float[Tensor, "r D"]:
        """Embeddings in float32 (float64 for a float64 model), also under autocast.

        Args:
            images: pixels in 0..255 as uint8, or in 0..1 as floats.
            row_keys: one key a row (`dist_dml.keyed_random.row_keys`), needed in training by models
                with dropout.
        """
        self.row_keys.keys = row_keys
        if not images.is_floating_point():
            images = images.to(self.mean.dtype) / 255
        images = (images - self.mean) / self.std
        # 1.6 times as fast on CPU (small_conv, one core, 2026-11). `.contiguous(memory_format=...)`
        # would leave grey images as they are, and the convolution slow: with one channel both
        # formats hold. The weights may stay contiguous, as safetensors and flat buffers want them.
        images = images.to(memory_format=torch.channels_last)
        return self.neck(self.backbone(images))


def build_embedder(
    config: ModelConfig, image: ImageConfig, seed: int, group: ProcessGroup | None
) -> Embedder:
    """The embedder of a configuration, on the CPU; the same on every worker.

    Initial weights depend on `seed` alone: torch's global generator is left as it was.

    Raises:
        UsageError: if the backbone is unknown or does not fit the images or the weights.
        RunError: if pretrained weights cannot be fetched.
    """
    row_keys = RowKeys()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the GPUs as well.
        torch.default_generator.manual_seed(key_of(seed, "backbone"))
        backbone = convert_dropout(build_backbone(config, image), row_keys)
        backbone = convert_batch_norm(backbone, group)
        torch.default_generator.manual_seed(key_of(seed, "neck"))
        neck = Neck(config, _num_features(backbone), row_keys, group)
    if config.frozen_batch_norm:
        freeze_batch_norm(backbone)
    return Embedder(backbone, neck, image.mean, image.std, row_keys)


def _num_features(backbone: nn.Module) -> int:
    num_features = backbone.num_features
    assert isinstance(num_features, int)
    return num_features


def parameter_groups(embedder: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Optimizer groups: weight decay for parameters of two or more dimensions, none for the rest.

    Biases, norms and GeM's exponent have one dimension. Each group holds `params`, `names` and
    `weight_decay`, in the order of `named_parameters`; parameters without gradient are left out,
    and so are empty groups.
    """
    trained = [(name, p) for name, p in embedder.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for weight_decay, members in (
        (config.weight_decay, [(name, p) for name, p in trained if p.dim() >= 2]),
        (0.0, [(name, p) for name, p in trained if p.dim() < 2]),
    ):
        if members:
            groups.append(
                {
                    "params": [p for _, p in members],
                    "names": [name for name, _ in members],
                    "weight_decay": weight_decay,
                }
            )
    return groups
