"""BN-Inception: the backbone of paper C and of the metric learning reality check; timm has none.

Ioffe & Szegedy, Batch Normalization (2015), appendix, figure 5, as in the Caffe model from which
the known PyTorch weights (`bn_inception-52deb4733.pth`) were ported: their module names and shapes
are the names and shapes here. 10.3 M parameters, 11.3 M with the classifier of 1000 classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Output channels of each block's branches: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, both 3x3; the
# projection after the pool. Blocks without 1x1 (0) halve height and width and pass the pool on.
_BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}
_MAX_POOLED = "5b"  # The one block without stride whose pool takes the maximum.


class BNInception(nn.Module):
    """RGB images (r, 3, H, W) to a feature map (r, 1024, h, w) of about H / 32.

    The published weights expect BGR in 0..255 minus the mean, as Caffe did. The order is turned
    here, so that images come as RGB for every backbone. For those weights set
    `data.image.mean=[0.50196,0.45882,0.40784]` (128, 117, 104 of 255) and
    `data.image.std=[0.00392157,0.00392157,0.00392157]` (1 / 255).

    The port that the weights come from sets torch's momentum to 0.9, a slip (Caffe's 0.9 is torch's
    0.1); here it is torch's default. Papers that freeze batch norm are not affected.
    """

    num_features = 1024

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels = in_channels
        self._add("conv1_7x7_s2", in_channels, 64, 7, 2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        channels = 192
        for block, (single, reduce, triple, double_reduce, double, projected) in _BLOCKS.items():
            name, stride = f"inception_{block}", 1 if single else 2
            if single:
                self._add(f"{name}_1x1", channels, single, 1)
            self._add(f"{name}_3x3_reduce", channels, reduce, 1)
            self._add(f"{name}_3x3", reduce, triple, 3, stride)
            self._add(f"{name}_double_3x3_reduce", channels, double_reduce, 1)
            self._add(f"{name}_double_3x3_1", double_reduce, double, 3)
            self._add(f"{name}_double_3x3_2", double, double, 3, stride)
            if projected:
                self._add(f"{name}_pool_proj", channels, projected, 1)
            channels = single + triple + double + (projected or channels)
        assert channels == self.num_features

    def _add(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        """A convolution and its norm. The norm makes the bias idle, but the weights have it."""
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        self.add_module(name, convolution)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))

    def _apply_layer(self, name: str, values: Tensor) -> Tensor:
        normalised = self.get_submodule(f"{name}_bn")(self.get_submodule(name)(values))
        return F.relu(normalised, inplace=True)

    def forward(self, images: Float[Tensor, "r channels H W"]) -> Float[Tensor, "r F h w"]:
        """The feature map of the last block; 227 and 224 pixels both give 7 x 7."""
        values = images.flip(1) if self.in_channels == 3 else images
        values = _halving_pool(self._apply_layer("conv1_7x7_s2", values))
        values = self._apply_layer("conv2_3x3_reduce", values)
        values = _halving_pool(self._apply_layer("conv2_3x3", values))
        for block in _BLOCKS:
            values = self._apply_block(block, values)
        return values

    def _apply_block(self, block: str, values: Tensor) -> Tensor:
        name = f"inception_{block}"
        triple = self._apply_layer(f"{name}_3x3_reduce", values)
        triple = self._apply_layer(f"{name}_3x3", triple)
        double = self._apply_layer(f"{name}_double_3x3_reduce", values)
        double = self._apply_layer(f"{name}_double_3x3_1", double)
        double = self._apply_layer(f"{name}_double_3x3_2", double)
        if not _BLOCKS[block][0]:
            return torch.cat((triple, double, _halving_pool(values)), dim=1)
        if block == _MAX_POOLED:
            pooled = F.max_pool2d(values, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(values, 3, stride=1, padding=1)
        projected = self._apply_layer(f"{name}_pool_proj", pooled)
        return torch.cat(
            (self._apply_layer(f"{name}_1x1", values), triple, double, projected), dim=1
        )


def _halving_pool(values: Tensor) -> Tensor:
    """Caffe rounds up: the last window may hang over the border."""
    return F.max_pool2d(values, 3, stride=2, ceil_mode=True)
