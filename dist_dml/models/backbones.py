"""The backbones by name: each maps images to a feature map, or to one vector an image."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_dml.config import ModelConfig
from dist_dml.data_config import ImageConfig
from dist_dml.errors import RunError, UsageError
from dist_dml.models.bn_inception import BNInception
from dist_dml.models.small_conv import SmallConv
from dist_dml.models.torchvision_shim import ensure_torchvision_imports
from dist_dml.models.weights import load_weights

BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "small_conv": SmallConv,
    "bn_inception": BNInception,
}
"""Our own backbones: number of image channels -> module with `num_features`."""

_TIMM = "timm:"


def build_backbone(config: ModelConfig, image: ImageConfig) -> nn.Module:
    """A backbone with random, pretrained or local weights, drawn from torch's generator.

    It maps (r, channels, H, W) to a map (r, F, h, w), or to (r, F) where the architecture pools its
    tokens by itself (vision transformers); F is its attribute `num_features`.

    Raises:
        UsageError: for an unknown name, weights that do not fit, or an image size it cannot take.
        RunError: if pretrained weights cannot be fetched.
    """
    name = config.backbone
    if config.pretrained and config.weights:
        raise UsageError(
            f"model.pretrained=true and model.weights={config.weights} are two starts; keep one"
        )
    if name.startswith(_TIMM):
        model = _timm_model(name.removeprefix(_TIMM), config.pretrained, image)
        if config.weights:
            load_weights(model, config.weights)
        return TimmBackbone(model)
    if name not in BACKBONES:
        raise UsageError(
            f"model.backbone={name} is unknown; use {', '.join(BACKBONES)} or {_TIMM}NAME"
        )
    if config.pretrained:
        raise UsageError(
            f"model.pretrained=true, but nobody publishes weights of {name} through timm; "
            "set model.weights to a local file"
        )
    backbone = BACKBONES[name](image.channels)
    if config.weights:
        load_weights(backbone, config.weights)
    _probed(backbone, backbone, name, image)
    return backbone


class TimmBackbone(nn.Module):
    """A timm model without its classifier.

    Convolutional models give the map in front of the pooling. Where the features are tokens, timm's
    own pooling and last norm (`forward_head(pre_logits=True)`) give one vector an image.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features: int = getattr(model, "head_hidden_size", None) or model.num_features

    def forward(self, images: Float[Tensor, "r channels H W"]) -> Float[Tensor, "r F *positions"]:
        """The feature map, or (r, F)."""
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


def _timm_model(name: str, pretrained: bool, image: ImageConfig) -> nn.Module:
    ensure_torchvision_imports()
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise UsageError(
            f"model.backbone={_TIMM}{name} is no model of timm {timm.__version__}; did you mean "
            f"{', '.join(near) or 'one that timm.list_models() names'}?"
        )
    options: dict[str, Any] = {"num_classes": 0, "in_chans": image.channels}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image.size
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        reason = _first_line(error)
        if pretrained:
            raise RunError(
                f"model.pretrained=true: weights of {_TIMM}{name} cannot be fetched ({reason}); "
                "set model.weights to a local file, or model.pretrained=false"
            ) from error
        raise UsageError(f"model.backbone={_TIMM}{name} cannot be built: {reason}") from error
    features = _probed(model.forward_features, model, f"{_TIMM}{name}", image)
    if features.dim() == 4 and features.shape[1] == model.num_features:
        # A map (r, F, h, w): the neck pools it, so timm's pooling goes. Not before it is known to
        # be one: transformers place their last norm by the pooling that they were built with.
        model.reset_classifier(0, "")
    return model


def _probed(
    features_of: Callable[[Tensor], Tensor], model: nn.Module, name: str, image: ImageConfig
) -> Tensor:
    """The features of one black image, in evaluation mode: refuses a wrong image size early."""
    probe = torch.zeros(1, image.channels, image.size, image.size)
    model.eval()
    try:
        with torch.no_grad():
            return features_of(probe)
    except Exception as error:
        raise UsageError(
            f"model.backbone={name} does not take images of data.image.size={image.size} "
            f"({_first_line(error)}); change either"
        ) from error
    finally:
        model.train()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
