"""The CPU default: four 3x3 convolutions and a projection, for images of about 32 pixels."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_GRID = 4


class SmallConv(nn.Module):
    """Images (r, channels, H, W) to features (r, 128, 1, 1); H and W of at least 8 pixels.

    Each of the four stages is convolution, batch norm, ReLU; a 2x2 maximum follows the first
    three. A convolution over the whole map of 4 x 4 (other maps are averaged to it) makes the
    features, so that they know where a stroke is: `model.pooling` finds one position and changes
    nothing.

    Chosen on unseen glyphs at 32 pixels after 45 s of one loaded core (2026-11, batch norm neck),
    Recall@1 / MAP@R: .71 / .39. The average of the last map instead of the projection gave
    .64 / .30; stages of 32, 64, 128, 128 channels see half the images in that time and gave
    .65 / .31. About 1,900 images/s forward and backward.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, int, int, int] = (16, 32, 64, 128),
        num_features: int = 128,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage, outputs in enumerate(widths):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            if stage < len(widths) - 1:
                layers.append(nn.MaxPool2d(2))
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.project = nn.Conv2d(inputs, num_features, _GRID, bias=False)

    def forward(self, images: Float[Tensor, "r channels H W"]) -> Float[Tensor, "r F 1 1"]:
        """The features, as a map of one position."""
        values = self.layers(images)
        if values.shape[2:] != (_GRID, _GRID):
            values = F.adaptive_avg_pool2d(values, _GRID)
        return self.project(values)
