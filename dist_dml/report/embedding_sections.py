"""The sections on the embeddings themselves: map, covering radii."""

from __future__ import annotations

import numpy as np

from dist_dml.report.covering import MOST_ROWS, reach_figure, reach_of_classes
from dist_dml.report.embedding_map import MOST_POINTS, choose_points, map_figure, plane
from dist_dml.report.figure_folder import FigureFolder
from dist_dml.report.galleries import Samples
from dist_dml.report.page import Html, element, joined, paragraph, table
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings


def map_body(
    embeddings: Embeddings, distance: Distance, samples: Samples, seed: int, figures: FigureFolder
) -> Html:
    """The embeddings on a plane.

    Args:
        embeddings: of the queries; embeddings proper, no probabilities.
        distance: cosine or l2; says what is near.
        samples: knows the classes' names.
        seed: of the draw and of t-SNE.
        figures: where the picture goes.
    """
    points = choose_points(embeddings.labels, seed)
    part = embeddings.rows(points.rows)
    try:
        places = plane(distance.prepare(part.vectors), seed)
    except ValueError as reason:
        return paragraph(f"No map: {reason}.", "empty")
    names = {label: samples.name(label) for label in points.coloured}
    picture = figures.add(
        "embedding_map",
        map_figure(places, part.labels, points.coloured, names),
        f"Map of {len(part)} embeddings by t-SNE; the largest classes have colours",
    )
    capped = len(part) < len(embeddings)
    shown = (
        f"{len(part):,} of {len(embeddings):,} images (the cap is {MOST_POINTS:,}: some of each of "
        "the largest classes, the others drawn at random)"
        if capped
        else f"all {len(part):,} images"
    )
    about = paragraph(
        f"t-SNE of {shown} by {distance.name}, seed {seed}. What is near stays near; sizes of "
        "groups, distances between groups and the axes mean nothing.",
        "note",
    )
    return joined((about, picture))


def covering_body(embeddings: Embeddings, distance: Distance, figures: FigureFolder) -> Html:
    """How far classes reach, against how far the next one is."""
    vectors = distance.prepare(embeddings.vectors)
    reach = reach_of_classes(vectors, embeddings.labels)
    if reach is None:
        return paragraph("Fewer than two classes have two images: no radius to speak of.", "empty")
    space = "unit embeddings" if distance.name == "cosine" else "embeddings"
    about = paragraph(
        f"Euclidean distances of {space}, {len(reach.labels):,} whole classes with "
        f"{reach.num_rows:,} images (at most {MOST_ROWS:,}). A class's centre is its image nearest "
        "to its mean, its radius the distance from there to its farthest image. Below the dashed "
        "line a class reaches the centre of another one."
    )
    figure = figures.add(
        "covering_radii",
        reach_figure(reach, space),
        f"Radius of {len(reach.labels)} classes against the distance to the next class's centre",
    )
    low, middle, high = np.quantile(reach.radius, (0.1, 0.5, 0.9))
    near, usual, far = np.quantile(reach.next_centre, (0.1, 0.5, 0.9))
    share = reach.num_overlapping / len(reach.labels)
    rows = [
        ("radius of a class: 10%, median, 90%", f"{low:.3f}, {middle:.3f}, {high:.3f}"),
        ("next class's centre: 10%, median, 90%", f"{near:.3f}, {usual:.3f}, {far:.3f}"),
        ("classes that reach the next centre", f"{reach.num_overlapping:,} ({share:.1%})"),
        ("covering radius (paper C: mean over 1, 2, .. centres)", f"{reach.mean_radius:.3f}"),
        ("distance of images of different classes, mean", f"{reach.inter_class:.3f}"),
    ]
    numbers = table(("", ""), rows)
    return joined((about, element("div", figure, numbers, class_="figures")))
