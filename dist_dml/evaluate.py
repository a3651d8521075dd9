"""ENTRY: checkpoint -> embeddings -> neighbours -> scores -> report.

`dist-dml evaluate runs/demo --baselines`, or the same under torchrun, deepspeed or srun.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Run by path: this folder must not hide installed packages.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dist_dml.checkpoint import load_embedder_tensors, load_head
from dist_dml.checkpoint_manifest import Manifest, newest_checkpoint, verify_checkpoint
from dist_dml.command_line import run_command
from dist_dml.config import Config, ProtocolConfig
from dist_dml.config_loading import Resolved
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index
from dist_dml.entry import add_config_arguments, run_worker
from dist_dml.errors import UsageError
from dist_dml.measurement import (
    Measurement,
    Model,
    check_evaluation,
    embed_pixels,
    embed_with,
    measure_model,
)
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import World
from dist_dml.retrieval.certificate_figure import certificate_figure
from dist_dml.retrieval.certificates import certificate_text
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.report import recall_curve, retrieval_gallery, score_table
from dist_dml.tracking.run_files import append_event


def scores_of(
    scores: Mapping[str, float], protocol: ProtocolConfig, distance: str
) -> dict[str, float]:
    """The scores of one protocol and distance, without the prefix."""
    prefix = f"{protocol.name}/{distance}/"
    return {key[len(prefix) :]: value for key, value in scores.items() if key.startswith(prefix)}


def tables(rows: Mapping[str, Mapping[str, float]], config: Config) -> str:
    """One table a protocol and distance; `rows` holds the scores of each model.

    The first protocol and distance, the ones that matter most, come last: next to the prompt.
    """
    texts = []
    for protocol in reversed(config.evaluation.protocols):
        searched = f"gallery {protocol.gallery}" if protocol.gallery else "each without itself"
        for text in reversed(config.evaluation.distances):
            distance = named_distance(text).name
            shown = {name: scores_of(scores, protocol, distance) for name, scores in rows.items()}
            shown = {name: scores for name, scores in shown.items() if scores}
            title = f"{protocol.name}, {text}: queries {protocol.query}, {searched}"
            texts.append(f"{title}\n{score_table(shown)}")
    return "\n\n".join(texts)


def write_gallery(
    path: Path, index: Index, measured: Measurement, config: Config, title: str
) -> None:
    """The picture of hits and misses of the first protocol and distance."""
    from dist_dml.data.reader import open_reader, read_image

    protocol = config.evaluation.protocols[0]
    distance = named_distance(config.evaluation.distances[0])
    reader = open_reader(index, config.data.image.channels, config.data.storage)
    queries = measured.of(protocol.query, distance)
    gallery = measured.of(protocol.gallery, distance) if protocol.gallery else None
    # Of the classes shown alone: there may be millions of others.
    labels = [queries.labels] if gallery is None else [queries.labels, gallery.labels]
    names = index.class_names
    figure = retrieval_gallery(
        queries,
        gallery,
        distance,
        lambda sample_id: read_image(index, reader, sample_id),
        {label: names[label] for label in np.unique(np.concatenate(labels)).tolist()},
        seed=config.run.seed,
        title=title,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write_certificates(path: Path, measured: Measurement) -> str:
    """The picture of the certificates, and their table with what it means; empty without any."""
    if not measured.certificates:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    certificate_figure(measured.certified).savefig(path)
    text = certificate_text(measured.certificates)
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return text


def load_for_evaluation(
    config: Config, world: World, found: tuple[Path, Manifest] | None, index: Index
) -> Model:
    """The model of a verified checkpoint, or the embedder of the seed alone (untrained)."""
    embedder = build_embedder(config.model, config.data.image, config.run.seed, world.group)
    classifier = None
    if found is not None:
        checkpoint, manifest = found
        if manifest.plan["fingerprint"] != index.fingerprint and world.is_first:
            print(
                f"note: {checkpoint.name} was trained on other data (fingerprint "
                f"{manifest.plan['fingerprint']}) than {config.data.path} ({index.fingerprint})",
                file=sys.stderr,
            )
        embedder.load_state_dict(load_embedder_tensors(checkpoint))
        if _asks_for_classes(config):
            check_evaluation(index, config, manifest.num_classes, world.ranks.local_size)
            classifier = _load_classifier(config, world, found, index, embedder.embedding_dim)
    return Model(embed_with(embedder.to(world.device).eval(), config, world), classifier)


def _asks_for_classes(config: Config) -> bool:
    """Whether anything configured needs class weights, which may be large."""
    spaces = {named_distance(text).space for text in config.evaluation.distances}
    return bool(config.evaluation.certificates) or spaces != {"embedding"}


def _load_classifier(
    config: Config, world: World, found: tuple[Path, Manifest], index: Index, embedding_dim: int
) -> ClassParallelClassifier:
    """This worker's share of a checkpoint's classes."""
    checkpoint, manifest = found
    num_classes = manifest.num_classes
    partition = ClassPartition.of_worker(world.rank, world.size, num_classes, world.group)
    classifier = ClassParallelClassifier(
        embedding_dim,
        partition,
        config.loss,
        config.optimizer,
        config.run.seed,
        max_rows=1,
        device=world.device,
        class_counts=index.class_counts(config.data.split, num_classes),
        # Evaluations read the weights by torch operations, whatever trained them.
        classes=config.classes.model_copy(update={"backend": "torch", "filter_below": 0.0}),
    )
    load_head(checkpoint, manifest, classifier)
    return classifier


def _find_checkpoint(run: Path, which: str) -> tuple[Path, Manifest]:
    """`best`, `last` or a path, verified: a pass over all bytes, so no more often than needed."""
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        return Path(which), verify_checkpoint(Path(which))
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UsageError(f"{run} holds no checkpoint; train it first, or give --checkpoint PATH")
    path, manifest = newest
    if which == "best" and manifest.progress.best_step is not None:
        best = folder / f"step-{manifest.progress.best_step:09d}"
        if best != path and best.exists():
            return best, verify_checkpoint(best)
    return newest


def _evaluate(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    """Score a checkpoint, and on request pixels and the untrained network; print and write."""
    config = resolved.config
    run = Path(arguments.run)
    found = _find_checkpoint(run, arguments.checkpoint)
    checkpoint = found[0]
    index = open_index(config.data)
    check_evaluation(index, config, index.num_classes, world.ranks.local_size)
    rows: dict[str, dict[str, float]] = {}
    if arguments.baselines:
        pixels = measure_model(Model(embed_pixels), index, config, world, nmi=False)
        blank = load_for_evaluation(config, world, None, index)
        rows["pixels"] = pixels.scores
        rows["untrained"] = measure_model(blank, index, config, world, nmi=False).scores
    model = load_for_evaluation(config, world, found, index)
    name = "trained" if arguments.baselines else checkpoint.name
    measured = measure_model(model, index, config, world, config.evaluation.nmi)
    rows[name] = measured.scores
    if not world.is_first:
        return
    report = run / "report"
    report.mkdir(parents=True, exist_ok=True)
    scores = {"checkpoint": checkpoint.name, "scores": rows}
    (report / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    write_gallery(report / "gallery.png", index, measured, config, f"{config.run.name}: retrieval")
    _write_recall(report / "recall.png", rows, config)
    certificates = write_certificates(report / "certificates.png", measured)
    written = ["scores.json", "gallery.png", "recall.png"]
    for name in written + ["certificates.png", "certificates.txt"] * bool(certificates):
        # The next `dist-dml track sync` takes them to MLflow.
        append_event(run, {"path": f"report/{name}", "folder": "report"})
    for split, count in sorted(measured.left_out.items()):
        if count:
            print(
                f"note: {count} damaged images of split {split} are left out of all scores; "
                f"`dist-dml verify {index.folder}` names them",
                file=sys.stderr,
            )
    if arguments.json:
        print(json.dumps(scores))
    else:
        print(f"{certificates}\n\n" * bool(certificates) + tables(rows, config))
        print(f"\nrun:     {run}/ ({checkpoint.name}; scores and pictures in report/)")
        if config.tracking.mlflow:
            print(f"MLflow:  dist-dml ui --root {config.run.root}")


def _write_recall(path: Path, rows: Mapping[str, Mapping[str, float]], config: Config) -> None:
    protocol = config.evaluation.protocols[0]
    distance = named_distance(config.evaluation.distances[0]).name
    curves = {}
    for name, scores in rows.items():
        found = scores_of(scores, protocol, distance)
        if not found:  # Pixels have no class probabilities.
            continue
        curves[name] = {k: found[f"recall_at_{k}"] for k in config.evaluation.recall_at}
    title = f"Recall@K, {protocol.name} ({distance})"
    recall_curve(curves, title).savefig(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    # Not `--run`: torchrun takes that for one of its own, wherever it stands.
    parser.add_argument("run", metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--checkpoint", default="best", help="best (default), last or a path")
    parser.add_argument(
        "--baselines", action="store_true", help="also score raw pixels and the untrained network"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate with the run's own configuration, unless another is given."""
    stored = Path(arguments.run) / "config.yaml"
    if not stored.is_file():
        raise UsageError(
            f"{arguments.run} is not the folder of a run (it has no config.yaml); give one that "
            "`dist-dml train` has made, for example runs/demo"
        )
    arguments.config = arguments.config or str(stored)
    return run_worker(_evaluate, arguments, [])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.evaluate ...`."""
    return run_command(
        "dist_dml.evaluate", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.evaluate import main as only_main  # one copy of the module

    sys.exit(only_main())
