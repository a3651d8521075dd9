"""The report of an evaluation: one HTML file with everything in it, and its figures as files.

Built by the first worker from what has been measured. Beyond that it costs one search of at most
20,000 queries, a map of at most 1,500 images and some reading of single images: see docs/report.md.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_dml.data.progress import ProgressLine
from dist_dml.report.embedding_sections import covering_body, map_body
from dist_dml.report.evaluated import CONFIDENCE, RESAMPLES, Evaluated
from dist_dml.report.evaluation_files import write_certificates, write_gallery, write_recall
from dist_dml.report.facts import Facts, data_facts, machine_facts, run_facts, throughput_facts
from dist_dml.report.figure_folder import FigureFolder
from dist_dml.report.page import Html, Section, element, joined, page, paragraph, table
from dist_dml.report.pair_histogram import pairs_body
from dist_dml.report.query_scores import FILE as QUERIES_FILE
from dist_dml.report.query_scores import write_query_scores
from dist_dml.report.retrieval_sections import (
    class_size_body,
    confusions_body,
    gallery_body,
)
from dist_dml.report.scores_section import headlines, scores_body, scores_of
from dist_dml.retrieval.certificates import COLUMNS, LEGEND
from dist_dml.tracking.plots import training_curves
from dist_dml.tracking.recorder import read_metrics
from dist_dml.tracking.run_files import append_event
from dist_dml.whole_files import write_json, write_text

FILE = "report.html"


def write_files(evaluated: Evaluated) -> str:
    """Write scores, the scores of single queries and pictures; have them mirrored to MLflow.

    Returns:
        The table of the certificates with what it means; empty without any.
    """
    config, measured, folder = evaluated.config, evaluated.measured, evaluated.folder
    folder.mkdir(parents=True, exist_ok=True)
    intervals = {
        f"{protocol}/{distance}/{score}": span
        for (protocol, distance), spans in evaluated.intervals.items()
        for score, span in spans.items()
    }
    write_json(folder / "scores.json", evaluated.printed | {"intervals": intervals})
    protocols = {one.name: (one.query, one.gallery) for one in config.evaluation.protocols}
    queries = {
        (protocol, distance): (evaluated.ids_of_queries(protocol, distance), scores)
        for (protocol, distance), scores in measured.query_scores.items()
    }
    fingerprint = evaluated.index.fingerprint
    write_query_scores(folder / QUERIES_FILE, queries, protocols, fingerprint, evaluated.checkpoint)
    title = f"{config.run.name}: retrieval"
    rows = evaluated.gallery_rows
    write_gallery(folder / "gallery.png", evaluated.index, measured, config, title, rows)
    write_recall(folder / "recall.png", evaluated.rows, config)
    certificates = write_certificates(folder / "certificates.png", measured)
    written = ["scores.json", QUERIES_FILE, "gallery.png", "recall.png"]
    _mirror(evaluated, written + ["certificates.png", "certificates.txt"] * bool(certificates))
    return certificates


def _mirror(evaluated: Evaluated, names: list[str]) -> None:
    """The next `dist-dml track sync` takes them to MLflow."""
    for name in names:
        append_event(evaluated.run, {"path": f"report/{name}", "folder": "report"})


def write_report(evaluated: Evaluated) -> None:
    """Write report/report.html and its figures, behind `write_files`."""
    figures = FigureFolder(evaluated.folder)
    shown = evaluated.shown
    bodies: list[tuple[str, str, Callable[[], Html]]] = [
        ("scores", "Scores", lambda: _scores(evaluated)),
        ("curves", "Curves", lambda: _curves(evaluated, figures)),
        ("gallery", "Hits and misses", lambda: gallery_body(shown, evaluated.gallery_rows)),
        ("confusions", "Confused classes", lambda: confusions_body(shown)),
        ("sizes", "Class size", lambda: class_size_body(shown, figures)),
        (
            "map",
            "Map of embeddings",
            lambda: map_body(*evaluated.embedding, shown.samples, shown.seed, figures),
        ),
        ("pairs", "Pairs and thresholds", lambda: _pairs(evaluated, figures)),
        ("radii", "Covering radii", lambda: covering_body(*evaluated.embedding, figures)),
        ("certificates", "Certificates", lambda: _certificates(evaluated, figures)),
        ("facts", "Data, speed, versions", lambda: _facts(evaluated)),
    ]
    progress = ProgressLine("report", len(bodies), "sections")
    sections = []
    for key, title, body in bodies:
        sections.append(Section(key, title, body()))
        progress.advance(1)
    progress.finish()
    config = evaluated.config
    lead = joined(
        (
            paragraph(
                f"Checkpoint {evaluated.checkpoint} of run {config.run.name}: {config.loss.name} "
                f"on {evaluated.manifest.num_classes:,} classes. Pictures are of {shown.title}; "
                "the search is exact, and a query never finds itself."
            ),
            headlines(
                scores_of(list(evaluated.rows.values())[-1], shown.protocol, shown.distance.name),
                evaluated.intervals.get((shown.protocol.name, shown.distance.name), {}),
            ),
        )
    )
    text = page(f"{config.run.name}: how well it retrieves", lead, sections)
    write_text(evaluated.folder / FILE, text)
    _mirror(evaluated, [FILE, *figures.written])


def _scores(evaluated: Evaluated) -> Html:
    about = (
        f"Small numbers: {CONFIDENCE:.0%} intervals by bootstrap over classes ({RESAMPLES:,} "
        "resamples). They speak of other classes, not of another training with another seed."
    )
    found = evaluated.intervals
    return scores_body(
        evaluated.rows, found, evaluated.config, about if any(found.values()) else ""
    )


def _pairs(evaluated: Evaluated, figures: FigureFolder) -> Html:
    queries, distance = evaluated.embedding
    protocol, measured = evaluated.shown.protocol, evaluated.measured
    gallery = measured.of(protocol.gallery, distance) if protocol.gallery else None
    found = measured.verifications.get((protocol.name, distance.name))
    return pairs_body(queries, gallery, distance, evaluated.shown.seed, figures, found)


def _curves(evaluated: Evaluated, figures: FigureFolder) -> Html:
    metrics = read_metrics(evaluated.run)
    recall = figures.existing("recall", "Recall@K over K, one line a model")
    if not metrics:
        reason = "No training curves: the run's folder has no metrics.jsonl."
        return joined((paragraph(reason, "empty"), recall))
    curves = figures.add(
        "curves",
        training_curves(metrics, evaluated.config.run.name),
        "Training loss, accuracy, scores and images per second over the steps",
    )
    return joined((curves, recall))


def _certificates(evaluated: Evaluated, figures: FigureFolder) -> Html:
    certificates = evaluated.measured.certificates
    if not certificates:
        reason = (
            "None measured: name metrics in evaluation.certificates, for example metric(p=0.5). A "
            "loss of pairs has no class probabilities, hence no certificate."
        )
        return paragraph(reason, "empty")
    picture = figures.existing(
        "certificates", "Distances of held-out images to their labels, and the certified share"
    )
    rows = [
        (name, *(cell(certificate) for cell in COLUMNS.values()))
        for name, certificate in certificates.items()
    ]
    notes = element("ul", joined(element("li", note) for note in LEGEND), class_="note")
    return joined((picture, table(("", *COLUMNS), rows, text_columns=2), notes))


def _facts(evaluated: Evaluated) -> Html:
    metrics = read_metrics(evaluated.run)
    speed = throughput_facts(metrics)
    parts = [
        _fact_table(
            "Data", data_facts(evaluated.index, evaluated.config, evaluated.measured.left_out)
        ),
        _fact_table(
            "Training",
            run_facts(evaluated.run, evaluated.config, evaluated.checkpoint, evaluated.manifest),
        ),
        _fact_table("Speed of the training", speed)
        if speed
        else paragraph("No speed: the run's folder has no records of its training.", "empty"),
        _fact_table("This evaluation's machine and software", machine_facts()),
    ]
    return joined(parts)


def _fact_table(title: str, facts: Facts) -> Html:
    return joined((element("h3", title), table(("", ""), facts, text_columns=2)))
