"""The configuration of a class-parallel step: backend, sweeps, update, classes that take part.

None of these changes which loss is computed, except `sample=random|neighbours` and `filter_below`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0)]


class ClassesConfig(BaseModel):
    """How a worker computes and updates its share of the classes."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=False,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    backend: Literal["auto", "torch", "native", "triton"] = "auto"
    """Who runs the sweeps: `torch` operations (every loss, every device), the `native` kernels for
    CPUs (compiled at first use, needs a C++ compiler) or `triton` kernels for CUDA. The kernels
    know losses of softmax form in float32. `auto` takes the kernels where they apply, else `torch`.
    """
    sweep: Literal["auto", "keep", "recompute", "row_chunked"] = "auto"
    """`keep` the logits between the sweeps (6BCD operations, 4BC bytes), `recompute` them (8BCD),
    or recompute them for a chunk of rows at a time (8BCD, memory independent of the batch). `auto`
    asks the cost model; see `dist-dml estimate`.
    """
    tile_classes: Natural = 0
    """Classes of a tile; 0 chooses by the sizes of caches and `loss.tile_mebibytes`."""
    row_chunk: Natural = 0
    """Rows of a chunk of row-chunked sweeps; 0 chooses."""
    cache_mebibytes: NonNegative = 0.0
    """Cache that a tile should stay in; 0 asks the machine (a core's L2; a GPU's L2)."""
    optimizer: Literal["same", "sgd", "adamw", "adam", "adagrad"] = "same"
    """Optimizer of the class weights; `same` takes optimizer.name. `adagrad` keeps one number a
    row.
    """
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the class weights. bfloat16 halves memory and needs a `rounding`."""
    rounding: Literal["stochastic", "kahan"] = "stochastic"
    """How bfloat16 weights keep updates smaller than their spacing: rounded up or down by chance,
    so that the mean is right, or with the rest kept beside them (2 more bytes a number).
    """
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of SGD's momentum and Adam's first moment."""
    clip_row_norm: NonNegative = 0.0
    """Largest norm of the gradient of one class's weights; 0 does not clip. A row is clipped by
    itself: a norm over all classes would be known only after the last tile.
    """
    sample: Literal["all", "random", "neighbours"] = "all"
    """Classes that take part in a step: `all` (exact), the batch's labels and `random` others, or
    the `neighbours` of the batch's labels among the class weights.
    """
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each worker's classes that take part with sample=random (Partial FC's r)."""
    sample_correction: Literal["importance", "none"] = "importance"
    """`importance` divides the sampled classes' exponentials by their chance of being drawn, and
    not those that are always there, so that the normaliser is right in the mean; `none` as
    published.
    """
    num_neighbours: Annotated[int, Field(ge=1)] = 100
    """Classes for each label of the batch with sample=neighbours."""
    rebuild_steps: Annotated[int, Field(ge=1)] = 1000
    """Steps between two rebuilds of the index of class weights, which run in the background. Up to
    65,536 classes a worker the search is exact and needs none.
    """
    filter_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Tiles whose probabilities are all below this give no gradient; 0 computes all. The
    probability that was left out is reported as `class/filtered_mass`.
    """

    @model_validator(mode="after")
    def _only_keys_that_are_read(self) -> ClassesConfig:
        read_by = {
            "rounding": ("weight_dtype", "bfloat16"),
            "sample_rate": ("sample", "random"),
            "sample_correction": ("sample", "random"),
            "num_neighbours": ("sample", "neighbours"),
            "rebuild_steps": ("sample", "neighbours"),
        }
        for key, (other, needed) in read_by.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and getattr(self, other) != needed:
                raise ValueError(
                    f"classes.{key}={getattr(self, key)} is read with classes.{other}={needed} "
                    f"only, and classes.{other}={getattr(self, other)}; remove it or change that"
                )
        if self.row_chunk and self.sweep in ("keep", "recompute"):
            raise ValueError(
                f"classes.row_chunk={self.row_chunk} is read with classes.sweep=row_chunked or "
                f"auto, and classes.sweep={self.sweep}; remove it or change that"
            )
        return self
