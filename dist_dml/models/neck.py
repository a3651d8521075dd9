"""The neck: pooling, an optional linear layer, a norm and dropout (paper B, section 3.12).

Dimensions: r rows of this worker, F features of the backbone, D of the embedding, h x w positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dist_dml.config import ModelConfig
from dist_dml.errors import UsageError
from dist_dml.models.dropout import KeyedDropout, RowKeys
from dist_dml.parallel.batch_norm import ProcessGroup, WholeBatchNorm

_GEM_FLOOR = 1e-6  # The gradient of x^p at 0 is not finite for p < 1.
_NECK_SALT = 0


def average_pool(features: Float[Tensor, "r F h w"]) -> Float[Tensor, "r F"]:
    """Mean over positions."""
    return features.mean(dim=(2, 3))


def max_pool(features: Float[Tensor, "r F h w"]) -> Float[Tensor, "r F"]:
    """Largest value over positions."""
    return features.amax(dim=(2, 3))


def average_max_pool(features: Float[Tensor, "r F h w"]) -> Float[Tensor, "r F"]:
    """Sum of the two, as Proxy-Anchor's code pools."""
    return average_pool(features) + max_pool(features)


class GemPool(nn.Module):
    """Generalised mean with one learnable exponent (Radenovic et al., 2018): `mean(x^p)^(1/p)`."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor([3.0]))

    def forward(self, features: Float[Tensor, "r F h w"]) -> Float[Tensor, "r F"]:
        """`features` are taken as at least 1e-6."""
        powers = features.clamp(min=_GEM_FLOOR) ** self.exponent
        return powers.mean(dim=(2, 3)) ** (1 / self.exponent)


_POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": average_pool,
    "max": max_pool,
    "average_max": average_max_pool,
}


class Neck(nn.Module):
    """Feature map (r, F, h, w) or vectors (r, F) to embeddings (r, D).

    In evaluation the result is the retrieval feature: after the norm, without dropout. Computed in
    float32 at least, whatever the backbone's precision.

    Args:
        config: pooling, embedding_dim (0: D = F, no linear layer), norm, dropout.
        num_features: F.
        row_keys: shared with the embedder.
        group: the workers whose rows share the batch statistics.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_features: int,
        row_keys: RowKeys,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.pool = GemPool() if config.pooling == "gem" else None
        self.embedding_dim = config.embedding_dim or num_features
        self.linear: nn.Module = nn.Identity()
        if config.embedding_dim:
            # A norm subtracts the mean: a bias before it would never change anything.
            self.linear = nn.Linear(num_features, self.embedding_dim, bias=config.norm == "none")
        self.norm: nn.Module = nn.Identity()
        if config.norm == "batch":
            self.norm = WholeBatchNorm(self.embedding_dim, group, affine=False)
        elif config.norm == "layer":
            self.norm = nn.LayerNorm(self.embedding_dim, elementwise_affine=False)
        self.dropout = KeyedDropout(config.dropout, _NECK_SALT, row_keys)

    def forward(self, features: Float[Tensor, "r F *positions"]) -> Float[Tensor, "r D"]:
        """Embeddings; with dropout in training."""
        # A mean of bfloat16 loses what the norm and the classifier then need.
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        pooled = self._pooled(features)
        embeddings = self.linear(pooled).to(features.dtype)
        return self.dropout(self.norm(embeddings))

    def _pooled(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            pool = self.pool or _POOLINGS[self.pooling]
            return pool(features)
        if self.pooling != "average":
            raise UsageError(
                f"model.pooling={self.pooling} needs a feature map, and this backbone pools its "
                "tokens by itself; set model.pooling=average"
            )
        return features
