"""The sections on what is found for which query: gallery, confusions, class sizes."""

from __future__ import annotations

from dataclasses import dataclass

from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.report.class_sizes import class_points, class_size_figure
from dist_dml.report.confusions import confusions
from dist_dml.report.figure_folder import FigureFolder
from dist_dml.report.galleries import Samples, confusions_html, gallery_html, legend
from dist_dml.report.page import Html, element, joined, paragraph, table
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.groups import class_sizes, scores_by_class_size
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.report import GalleryRows

MOST_CONFUSIONS = 12


@dataclass(frozen=True)
class Shown:
    """The measurement that the pictures are of: the first protocol, by its first distance."""

    protocol: ProtocolConfig
    distance: Distance
    queries: Embeddings
    gallery: Embeddings | None
    scores: QueryScores
    samples: Samples
    seed: int

    @property
    def searched(self) -> Embeddings:
        """The gallery, or the queries themselves."""
        return self.queries if self.gallery is None else self.gallery

    @property
    def title(self) -> str:
        """Protocol and distance in words."""
        return f"protocol {self.protocol.name}, {self.distance.name}"


def gallery_body(shown: Shown, rows: GalleryRows) -> Html:
    """Queries with their nearest images."""
    if not len(rows.queries):
        return paragraph("No query has an image of its class in the gallery.", "empty")
    about = paragraph(
        f"Of {shown.title}. Half of the lines are the hardest misses (fewest hits among the images "
        "shown, then the nearest wrong image), the others are drawn at random by the seed.",
        "note",
    )
    found = gallery_html(rows, shown.queries, shown.searched, shown.distance, shown.samples)
    return joined((about, legend(shown.distance), found))


def confusions_body(shown: Shown) -> Html:
    """The pairs of classes that are most often taken for each other."""
    found = confusions(shown.scores, MOST_CONFUSIONS)
    if not found:
        return paragraph("Every nearest neighbour is of the query's class.", "empty")
    answerable = shown.scores.has_match
    wrong = answerable & (shown.scores.nearest_label != shown.scores.query_label)
    about = paragraph(
        f"{wrong.sum():,} of {answerable.sum():,} queries have a nearest image of another class "
        f"({shown.title}). The {len(found)} pairs that occur most often, each with its first "
        "query and the image that is nearest to it:",
    )
    rows = confusions_html(found, shown.queries, shown.searched, shown.distance, shown.samples)
    return joined((about, rows))


def class_size_body(shown: Shown, figures: FigureFolder) -> Html:
    """Recall@1 and MAP@R by the number of images that a class has."""
    sizes = class_sizes(
        shown.queries.labels, None if shown.gallery is None else shown.gallery.labels
    )
    groups = scores_by_class_size(shown.scores, sizes)
    if not shown.scores.has_match.any():
        return paragraph("No query has an image of its class in the gallery.", "empty")
    figure = figures.add(
        "class_sizes",
        class_size_figure(groups, class_points(shown.scores, sizes), shown.seed),
        "Recall@1 and MAP@R against the number of gallery images of a class; the table has the "
        "same numbers",
    )
    rows = [
        (
            group.name.replace("-", " to "),
            f"{group.num_classes:,}",
            f"{group.num_queries:,}",
            *(
                f"{group.scores[name]:.4f}" if group.scores else "\u2013"
                for name in ("precision_at_1", "r_precision", "map_at_r")
            ),
        )
        for group in groups
    ]
    headings = ("images of the class", "classes", "queries", "Recall@1", "R-precision", "MAP@R")
    itself = ", the query among them" if shown.gallery is None else ""
    about = paragraph(
        f"Of {shown.title}. The size of a class is what the gallery holds of it{itself}; each line "
        "of the table is a range of sizes with its means over queries.",
        "note",
    )
    return joined((about, element("div", figure, table(headings, rows), class_="figures")))
