"""Dropout whose masks belong to the rows of the global batch, not to the worker that computes them.

A torch generator gives a worker's rows other numbers for every cut of the batch. Here the mask of a
row depends on the row's key and on the layer alone, so that N workers train as one process does.

Dimensions: r rows of this worker, k parts of a row (windows) where a backbone folds them into rows.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor, nn

from dist_dml.errors import UsageError
from dist_dml.keyed_random import keyed_uniform

# Dimensions, from the left, along which torch's dropouts draw independently; 0 means all of them.
_DRAWN_DIMS: dict[type[nn.Module], int] = {
    nn.Dropout: 0,
    nn.Dropout1d: 2,
    nn.Dropout2d: 2,
    nn.Dropout3d: 2,
}
_REFUSED = ("AlphaDropout", "FeatureAlphaDropout", "DropBlock2d", "PatchDropout")


class RowKeys:
    """The keys of the rows that are now in the model: set by the embedder, read by its dropouts."""

    def __init__(self) -> None:
        self.keys: Int64[Tensor, " r"] | None = None


class KeyedDropout(nn.Module):
    """Dropout in training, keyed by row.

    Equal in distribution to `nn.Dropout(p)` (`drawn_dims=0`), `nn.Dropout2d(p)` (2: whole channels)
    or timm's `DropPath(p)` (1: whole rows). Costs an int64 and a float32 a drawn number.

    Args:
        p: probability of zero.
        salt: tells apart the layers of one model.
        row_keys: shared with the embedder.
        drawn_dims: dimensions from the left that draw independently; 0 means all.
        scale: factor of what is kept; 1 / (1 - p) keeps the mean.
    """

    def __init__(
        self,
        p: float,
        salt: int,
        row_keys: RowKeys,
        drawn_dims: int = 0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.p = p
        self.salt = salt
        self.row_keys = row_keys
        self.drawn_dims = drawn_dims
        self.scale = 1 / (1 - p) if scale is None else scale

    def forward(self, values: Float[Tensor, "rk *rest"]) -> Float[Tensor, "rk *rest"]:
        """`values` with a share `p` of zeros in training, unchanged otherwise.

        Raises:
            ValueError: in training, if the embedder was called without row keys, or if the rows of
                `values` are not a whole number of parts for each key.
        """
        if not self.training or self.p == 0:
            return values
        keys = self.row_keys.keys
        if keys is None:
            raise ValueError("dropout in training needs row_keys; pass them to the embedder")
        parts = _parts_of_a_row(len(values), len(keys))
        dims = self.drawn_dims or values.dim()
        drawn = values.shape[1:dims]
        uniform = keyed_uniform(keys, parts * drawn.numel(), self.salt)
        kept = (uniform >= self.p).to(values.dtype) * self.scale
        return values * kept.view(len(values), *drawn, *(1,) * (values.dim() - dims))

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}, salt={self.salt}, drawn_dims={self.drawn_dims}"


def _parts_of_a_row(num_values: int, num_keys: int) -> int:
    """Window attention folds the windows of a row into the batch, row by row: k parts follow."""
    if num_keys == 0 or num_values % num_keys:
        if num_values == 0:
            return 1
        raise ValueError(
            f"dropout got {num_values} rows for {num_keys} row keys; give one key to each image"
        )
    return num_values // num_keys


def convert_dropout(module: nn.Module, row_keys: RowKeys) -> nn.Module:
    """`module` with every active dropout and DropPath replaced by a `KeyedDropout`.

    Replaces children of `module` in place. Layers are salted 1, 2, ... in the order of the modules;
    salt 0 is left for the neck. Layers with probability 0 stay as they are.

    Raises:
        UsageError: for a random layer that has no keyed counterpart.
    """
    salt = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in _REFUSED:
                raise UsageError(
                    f"model.backbone has a layer of type {type(child).__name__}, whose random "
                    "numbers would depend on the number of workers; use another backbone"
                )
            keyed = _keyed(child, salt + 1, row_keys)
            if keyed is None:
                continue
            salt += 1
            setattr(parent, name, keyed)
            if name == "attn_drop" and getattr(parent, "fused_attn", False):
                # timm's fused attention reads only the probability and draws for itself.
                parent.fused_attn = False  # pyright: ignore[reportArgumentType]
    return module


def _keyed(layer: nn.Module, salt: int, row_keys: RowKeys) -> KeyedDropout | None:
    drawn_dims = _DRAWN_DIMS.get(type(layer))
    if drawn_dims is not None:
        p = float(getattr(layer, "p", 0.0))
        return KeyedDropout(p, salt, row_keys, drawn_dims) if p > 0 else None
    if type(layer).__name__ == "DropPath":
        p = float(getattr(layer, "drop_prob", 0.0) or 0.0)
        scale = None if getattr(layer, "scale_by_keep", True) else 1.0
        return KeyedDropout(p, salt, row_keys, 1, scale) if p > 0 else None
    return None
