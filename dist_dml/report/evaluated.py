"""What an evaluation knows when its scores are printed, for its files and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dist_dml.checkpoint_manifest import Manifest
from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.measurement import Measurement
from dist_dml.report.evaluation_files import shown_names
from dist_dml.report.galleries import Samples
from dist_dml.report.retrieval_sections import Shown
from dist_dml.retrieval.distances import Distance, named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.intervals import score_intervals
from dist_dml.retrieval.report import GalleryRows, choose_rows

RESAMPLES, CONFIDENCE = 1000, 0.95
"""Of the intervals."""
_ROWS, _NEIGHBOURS = 12, 8


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation knows when its scores are printed."""

    run: Path
    config: Config
    index: Index
    measured: Measurement
    rows: Mapping[str, Mapping[str, float]]
    """Scores of each model as `protocol/distance/score`; the last one is the checkpoint's."""
    checkpoint: str
    manifest: Manifest

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.run / "report"

    @property
    def printed(self) -> dict[str, object]:
        """What `--json` prints and report/scores.json begins with."""
        return {"checkpoint": self.checkpoint, "scores": self.rows}

    @cached_property
    def shown(self) -> Shown:
        """The first protocol by its first distance."""
        from dist_dml.data.reader import open_reader, read_image

        protocol = self.config.evaluation.protocols[0]
        distance = named_distance(self.config.evaluation.distances[0])
        queries = self.measured.of(protocol.query, distance)
        gallery = self.measured.of(protocol.gallery, distance) if protocol.gallery else None
        reader = open_reader(self.index, self.config.data.image.channels, self.config.data.storage)
        names = shown_names(self.index, queries, *([gallery] if gallery is not None else []))
        return Shown(
            protocol,
            distance,
            queries,
            gallery,
            self.measured.query_scores[protocol.name, distance.name],
            Samples(lambda sample: read_image(self.index, reader, sample), names),
            self.config.run.seed,
        )

    @cached_property
    def gallery_rows(self) -> GalleryRows:
        """The queries of the gallery, in the picture and in the page."""
        shown = self.shown
        return choose_rows(
            shown.queries, shown.gallery, shown.distance, _ROWS, _NEIGHBOURS, shown.seed
        )

    @cached_property
    def intervals(self) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
        """Of the checkpoint's scores, by protocol and distance; see `retrieval.intervals`."""
        return {
            key: score_intervals(scores, RESAMPLES, CONFIDENCE, self.config.run.seed)
            for key, scores in self.measured.query_scores.items()
        }

    def ids_of_queries(self, protocol: str, distance: str) -> Int64[np.ndarray, " q"]:
        """The sample ids behind `Measurement.query_scores`, by the names there."""
        one = next(one for one in self.config.evaluation.protocols if one.name == protocol)
        named = map(named_distance, self.config.evaluation.distances)
        found = next(each for each in named if each.name == distance)
        return self.measured.of(one.query, found).ids

    @property
    def embedding(self) -> tuple[Embeddings, Distance]:
        """The queries' embeddings, and the first distance that compares embeddings."""
        named = [named_distance(text) for text in self.config.evaluation.distances]
        plain = [one for one in named if one.space == "embedding"] or [named_distance("cosine")]
        return self.measured.of(self.shown.protocol.query, plain[0]), plain[0]
