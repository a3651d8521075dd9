"""The section `evaluation`: what is measured, how often, and by what means."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_dml.config_types import Count, Section
from dist_dml.errors import UsageError
from dist_dml.metric_parameters import parse_metric


class ProtocolConfig(Section):
    """One retrieval measurement."""

    name: str
    """First part of the names of its scores, for example `unseen`."""
    query: str = "test"
    """Split whose images are the queries."""
    gallery: str = ""
    """Split that is searched; empty searches the queries themselves, each without itself."""


class EvaluationConfig(Section):
    """What is measured, how often."""

    every_epochs: Annotated[int, Field(ge=0)] = 1
    """Evaluate every this many epochs; 0 evaluates only at the end."""
    protocols: Annotated[tuple[ProtocolConfig, ...], Field(min_length=1)] = (
        ProtocolConfig(name="unseen"),
    )
    """The measurements."""
    distances: Annotated[tuple[str, ...], Field(min_length=1)] = ("cosine", "l2")
    """Distances to rank by: `cosine` and `l2` of embeddings, `probability_l2` and the learned
    `metric(p=0.1)`, `metric(k=0.8,p=0.5)`, `metric(p=0.1,top=64)` of class probabilities (closed
    sets: the classes of the training). Without k, the largest that makes a metric.
    """
    certificates: tuple[str, ...] = ()
    """Metrics whose certificates are measured on held-out images of the training classes, for
    example `metric(p=0.5)`; see docs/metric_space.md.
    """
    certificate_split: str = "seen"
    """Split with held-out images of training classes."""
    recall_at: tuple[Count, ...] = (1, 2, 4, 8)
    """The K of Recall@K."""
    nmi: bool = True
    """Measure, at the last evaluation, what costs a pass of its own: NMI and AMI (FAISS k-means,
    one cluster a class), mean reciprocal rank, verification (TAR at FAR).
    """
    batch_size: Count = 256
    """Images a worker embeds at a time."""
    search_backend: Literal["auto", "native", "torch", "faiss", "faiss_gpu"] = "auto"
    """Who multiplies for exact neighbours of embeddings: C++ kernels on CPUs, torch on any device,
    FAISS. All give the same neighbours, to the bit.
    """
    search_mebibytes: Annotated[int, Field(ge=16)] = 512
    """What a worker's search may hold beyond vectors and results."""

    @model_validator(mode="after")
    def _distances_readable(self) -> EvaluationConfig:
        for key, named in (("distances", ("cosine", "l2", "probability_l2")), ("certificates", ())):
            for text in getattr(self, key):
                if text in named:
                    continue
                if not text.startswith("metric("):
                    known = ", ".join((*named, "metric(p=0.1)"))
                    raise ValueError(f"evaluation.{key} has {text!r}; use {known}")
                try:
                    parse_metric(text)
                except UsageError as error:
                    raise ValueError(f"evaluation.{key}: {error}") from None
        return self
