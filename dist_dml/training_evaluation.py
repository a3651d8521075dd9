"""The evaluations of a training: scores, their record, and what is drawn at the end of the run."""

from __future__ import annotations

import time

from dist_dml.checkpoint_manifest import Progress
from dist_dml.config import Config
from dist_dml.journal import Journal
from dist_dml.measurement import measure_model
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import World
from dist_dml.report.evaluation_files import tables, write_certificates, write_gallery
from dist_dml.resources import peak_mebibytes
from dist_dml.split_embedding import embed_with
from dist_dml.split_vectors import Model
from dist_dml.training_run import TrainingRun


def evaluate(
    config: Config,
    run: TrainingRun,
    world: World,
    journal: Journal,
    progress: Progress,
    ends_run: bool,
) -> dict[str, float]:
    """All retrieval scores, recorded; at the end of the run also NMI, the gallery and the table."""
    embedder = run.engine.embedder.eval()
    classifier = run.head if isinstance(run.head, ClassParallelClassifier) else None
    model = Model(embed_with(embedder, config, world), classifier)
    nmi = config.evaluation.nmi and ends_run
    started = time.perf_counter()
    measured = measure_model(model, run.index, config, world, nmi, whole=ends_run)
    scores = measured.scores
    seconds = time.perf_counter() - started
    costs = {"evaluation/seconds": seconds, "memory/peak_mebibytes": peak_mebibytes(world)}
    journal.record(progress, scores | costs)
    shown = {name: value for name, value in scores.items() if name == config.checkpoint.best_metric}
    journal.say(
        f"step {progress.step}: evaluated in {seconds:.1f} s"
        + "".join(f", {name} {value:.4f}" for name, value in shown.items())
    )
    if world.is_first and measured.certificates:
        path = run.folder / "report" / "certificates.png"
        with journal.drawing(path):
            journal.table = write_certificates(path, measured) + "\n\n"
    if ends_run and world.is_first:
        path = run.folder / "report" / "gallery.png"
        title = f"{config.run.name}: step {progress.step}"
        with journal.drawing(path):
            write_gallery(path, run.index, measured, config, title)
        certificates = journal.table if measured.certificates else ""
        journal.table = certificates + tables({"trained": scores}, config)
    embedder.train()
    return scores
