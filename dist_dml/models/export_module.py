"""What is exported: pixels in, embeddings out, preprocessing included; and how it is rebuilt.

Dimensions: n images, S = `data.image.size`, C channels, D features of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from dist_dml.config import ModelConfig
from dist_dml.data_config import ImageConfig
from dist_dml.models.dropout import KeyedDropout
from dist_dml.models.embedder import Embedder, build_embedder
from dist_dml.parallel.batch_norm import WholeBatchNorm


class ImageEmbedder(nn.Module):
    """Decoded, cut images to embeddings: normalisation of pixels, network, optional unit length.

    Equal to the embedder in evaluation and float32, without its machinery for several workers.

    Args:
        embedder: of the run; left as it is.
        normalise: divide each embedding by its L2 norm.
    """

    def __init__(self, embedder: Embedder, normalise: bool) -> None:
        super().__init__()
        self.embedder = plain_copy(embedder)
        self.embedding_dim = embedder.embedding_dim
        self.normalise = normalise
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: UInt8[Tensor, "n S S C"]) -> Float32[Tensor, "n D"]:
        """Embeddings of pixels 0..255, channels last as decoders give them (RGB or grey)."""
        embeddings = self.embedder(images.permute(0, 3, 1, 2)).float()
        return F.normalize(embeddings) if self.normalise else embeddings


def plain_copy(embedder: Embedder) -> Embedder:
    """A copy in float32 on the CPU, for inference alone.

    Batch norms that gather statistics from other workers and dropouts keyed by row are training's.
    In their place come torch's own: a batch norm, its activation, nothing.
    """
    groups = [m for m in embedder.modules() if isinstance(m, WholeBatchNorm)]
    held = [module.group for module in groups]
    try:
        for module in groups:
            module.group = None  # A process group cannot be copied.
        copied = copy.deepcopy(embedder).cpu().float().eval()
    finally:
        for module, group in zip(groups, held, strict=True):
            module.group = group
    copied.row_keys.keys = None
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, KeyedDropout):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, WholeBatchNorm) and child.running_mean is not None:
                setattr(parent, name, InferenceBatchNorm(child))
    return copied


class InferenceBatchNorm(nn.Module):
    """A batch norm by running statistics, and what timm puts behind it.

    Keeps the names of parameters and buffers, so that a checkpoint's keys stay.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, trained: WholeBatchNorm) -> None:
        super().__init__()
        self.eps = trained.eps
        self.register_parameter("weight", trained.weight)  # pyright: ignore[reportArgumentType]
        self.register_parameter("bias", trained.bias)  # pyright: ignore[reportArgumentType]
        self.register_buffer("running_mean", trained.running_mean)
        self.register_buffer("running_var", trained.running_var)
        self.act = trained.act

    def forward(self, values: Tensor) -> Tensor:
        """Normalised `values`."""
        mean, var = self.running_mean, self.running_var
        return self.act(
            F.batch_norm(values, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        )


def export_config(
    model: ModelConfig, image: ImageConfig, embedding_dim: int, normalise: bool
) -> dict[str, Any]:
    """What `rebuild` needs beside the weights, as JSON."""
    return {
        "format_version": 1,
        # Weights come from the file: nothing is to be fetched or read from elsewhere.
        "model": model.model_dump(mode="json") | {"pretrained": False, "weights": ""},
        "image": image.model_dump(mode="json"),
        "embedding_dim": embedding_dim,
        "normalise": normalise,
    }


def rebuild(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ImageEmbedder:
    """The module of an export, from its `config.json` and the tensors of `model.safetensors`.

    Raises:
        UsageError: the backbone cannot be built.
        RuntimeError: tensors are missing, too many, or of other shapes.
    """
    model = ModelConfig.model_validate(config["model"])
    image = ImageConfig.model_validate(config["image"])
    module = ImageEmbedder(build_embedder(model, image, 0, None), config["normalise"])
    module.embedder.load_state_dict(dict(tensors))
    return module


def preprocessing_of(image: ImageConfig, normalise: bool) -> dict[str, Any]:
    """`preprocessing.json`: from a file to the model's input, in the words of `embed_images.py`."""
    return {
        "size": image.size,
        "resize": image.resize,
        "channels": image.channels,
        "colour": "grey" if image.channels == 1 else "RGB",
        "crop": "everything" if not image.resize else "centre: size / resize of the short side",
        "interpolation": "area averaging where it shrinks, bilinear where it grows (OpenCV)",
        "exif_orientation": "ignored",
        "input": {"name": "images", "dtype": "uint8", "layout": "n, height, width, channel"},
        "inside_the_model": {"divide_by": 255, "mean": image.mean, "std": image.std},
        "output": {"name": "embeddings", "dtype": "float32", "unit_length": normalise},
    }


def example_images(image: ImageConfig, count: int, seed: int = 0) -> UInt8[Tensor, "n S S C"]:
    """Smooth random pictures: noise blurred over the image, where no data set is at hand."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, image.channels, 5, 5), generator=generator)
    size = (image.size, image.size)
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
