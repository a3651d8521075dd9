"""ENTRY: checkpoint -> embeddings -> neighbours -> scores -> report.

`dist-dml evaluate runs/demo --baselines`, or the same under torchrun, deepspeed or srun.
`dist-dml evaluate --embeddings Q.parquet --gallery G.parquet` scores anybody's files.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Run by path: this folder must not hide installed packages.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dist_dml.checkpoint import load_embedder_tensors, load_head
from dist_dml.checkpoint_manifest import Manifest, newest_checkpoint, verify_checkpoint
from dist_dml.command_line import run_command
from dist_dml.config import Config
from dist_dml.config_loading import Resolved
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index
from dist_dml.entry import add_config_arguments, run_worker
from dist_dml.errors import UsageError
from dist_dml.evaluate_embeddings import (
    add_file_arguments,
    check_file_arguments,
    evaluate_files,
)
from dist_dml.measurement import check_evaluation, measure_model
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import World
from dist_dml.report.evaluated import Evaluated
from dist_dml.report.evaluation_files import tables
from dist_dml.report.evaluation_report import FILE as REPORT_FILE
from dist_dml.report.evaluation_report import write_files, write_report
from dist_dml.retrieval.distances import named_distance
from dist_dml.split_embedding import embed_pixels, embed_with
from dist_dml.split_vectors import Model


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


def choose_checkpoint(run: Path, which: str) -> tuple[Path, Manifest]:
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
    found = choose_checkpoint(run, arguments.checkpoint)
    checkpoint = found[0]
    index = open_index(config.data)
    check_evaluation(index, config, index.num_classes, world.ranks.local_size)
    rows: dict[str, dict[str, float]] = {}
    if arguments.baselines:
        pixels = measure_model(Model(embed_pixels), index, config, world, nmi=False, whole=False)
        blank = load_for_evaluation(config, world, None, index)
        rows["pixels"] = pixels.scores
        bare = measure_model(blank, index, config, world, nmi=False, whole=False)
        rows["untrained"] = bare.scores
    model = load_for_evaluation(config, world, found, index)
    name = "trained" if arguments.baselines else checkpoint.name
    measured = measure_model(model, index, config, world, config.evaluation.nmi)
    rows[name] = measured.scores
    if not world.is_first:
        return
    evaluated = Evaluated(run, config, index, measured, rows, checkpoint.name, found[1])
    certificates = write_files(evaluated)
    for split, count in sorted(measured.left_out.items()):
        if count:
            print(
                f"note: {count} damaged images of split {split} are left out of all scores; "
                f"`dist-dml verify {index.folder}` names them",
                file=sys.stderr,
            )
    if arguments.json:
        print(json.dumps(evaluated.printed), flush=True)
    else:
        print(f"{certificates}\n\n" * bool(certificates) + tables(rows, config), flush=True)
    if arguments.report:
        write_report(evaluated)
    if not arguments.json:
        print(f"\nrun:     {run}/ ({checkpoint.name}; scores and pictures in report/)")
        if arguments.report:
            print(f"report:  {evaluated.folder / REPORT_FILE}")
        if config.tracking.mlflow:
            print(f"MLflow:  dist-dml ui --root {config.run.root}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    # Not `--run`: torchrun takes that for one of its own, wherever it stands.
    parser.add_argument("run", metavar="RUN", nargs="?", help="run folder, for example runs/demo")
    parser.add_argument("--checkpoint", default="best", help="best (default), last or a path")
    parser.add_argument(
        "--baselines", action="store_true", help="also score raw pixels and the untrained network"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="scores without report.html"
    )
    add_file_arguments(parser)
    add_config_arguments(parser)


def use_config_of_run(arguments: argparse.Namespace) -> None:
    """The run's own configuration, unless another is given.

    Raises:
        UsageError: `arguments.run` is not the folder of a run.
    """
    stored = Path(arguments.run) / "config.yaml"
    if not stored.is_file():
        raise UsageError(
            f"{arguments.run} is not the folder of a run (it has no config.yaml); give one that "
            "`dist-dml train` has made, for example runs/demo"
        )
    arguments.config = arguments.config or str(stored)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a run's checkpoint, or files of embeddings. Returns the exit code."""
    if check_file_arguments(arguments):
        return evaluate_files(arguments)
    use_config_of_run(arguments)
    return run_worker(_evaluate, arguments, [])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.evaluate ...`."""
    return run_command(
        "dist_dml.evaluate", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.evaluate import main as only_main  # one copy of the module

    sys.exit(only_main())
