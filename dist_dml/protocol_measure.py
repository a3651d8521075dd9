"""ENTRY: the one look of a fold at the test split, from its best checkpoint.

`dist-dml protocol` starts it after each fold's training, with the same workers; nobody else should:
whatever is chosen after a look at these scores is chosen on the test set.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.checkpoint_manifest import Manifest, newest_checkpoint, verify_checkpoint
from dist_dml.command_line import run_command
from dist_dml.config_loading import Resolved
from dist_dml.data.opening import open_index
from dist_dml.entry import run_worker
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluate import load_for_evaluation
from dist_dml.measurement import measure_model
from dist_dml.parallel.world import World
from dist_dml.protocol_folds import TEST_FILE
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.tracking.recorder import Recorder, read_metrics
from dist_dml.tracking.run_files import CONFIG
from dist_dml.whole_files import replaced, write_json

PEAK = "memory/peak_mebibytes"
"""Metric under which a training records the most memory that one of its workers has held."""


def measure_fold(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    """Embed the test splits, score them, write embeddings and then `test.json`; by all workers.

    The scores also join the run's metrics, as `test/DISTANCE/SCORE` at the step that was tested.
    """
    config = resolved.config
    run = Path(arguments.run)
    found, newest = best_checkpoint(run)
    index = open_index(config.data)
    model = load_for_evaluation(config, world, found, index)
    measured = measure_model(model, index, config, world, nmi=False)
    if not world.is_first:
        return
    protocol = config.evaluation.protocols[0]
    distance = named_distance(config.evaluation.distances[0])
    prefix = f"{protocol.name}/{distance.name}/"
    files = {}
    for split in filter(None, (protocol.query, protocol.gallery)):
        files[split] = f"embeddings-{split}.npz"
        write_embeddings(run / files[split], measured.of(split, distance))
    checkpoint, manifest = found
    content: dict[str, Any] = {
        "data": config.data.path,
        "folds": config.data.folds,
        "fold": config.data.fold,
        "seed": config.run.seed,
        "fingerprint": index.fingerprint,
        "config_hash": manifest.config_hash,
        "checkpoint": checkpoint.name,
        "validation_map_at_r": manifest.progress.best_score,
        "best_step": manifest.progress.step,
        "best_seconds": manifest.progress.seconds,
        "best_images_seen": manifest.progress.images_seen,
        "total_steps": newest.progress.step,
        "total_seconds": newest.progress.seconds,
        "total_images_seen": newest.progress.images_seen,
        "workers": len(manifest.class_files),
        "peak_mebibytes": _peak(run),
        "protocol": {"query": protocol.query, "gallery": protocol.gallery},
        "distance": distance.name,
        "embedding_dim": int(measured.of(protocol.query, distance).vectors.shape[1]),
        "embeddings": files,
        "scores": {
            key.removeprefix(prefix): value
            for key, value in measured.scores.items()
            if key.startswith(prefix)
        },
    }
    tested = manifest.progress
    recorder = Recorder(run)
    scores = {key: value for key, value in measured.scores.items() if key.startswith(prefix)}
    recorder.record(tested.step, tested.images_seen, tested.seconds, scores)
    recorder.close()
    # Last, and whole or absent: whoever finds it finds the embeddings too.
    write_json(run / TEST_FILE, content)
    print(f"{run / TEST_FILE}: {checkpoint.name} tested")


def best_checkpoint(run: Path) -> tuple[tuple[Path, Manifest], Manifest]:
    """The checkpoint with the best validation score, verified, and the newest one's manifest.

    Raises:
        RunError: there is none: falling back to another would not be the protocol.
        UsageError: it is damaged.
    """
    newest = newest_checkpoint(run / "checkpoints")
    if newest is None or newest[1].progress.best_step is None:
        raise RunError(f"{run} has no checkpoint with a validation score; train it again")
    path = run / "checkpoints" / f"step-{newest[1].progress.best_step:09d}"
    return (path, verify_checkpoint(path)), newest[1]


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Replace `path` by vectors (n, D) float32, labels and ids (n,) int64, as an npz archive."""
    with replaced(path) as stream:
        np.savez(stream, vectors=embeddings.vectors, labels=embeddings.labels, ids=embeddings.ids)


def read_embeddings(path: Path) -> Embeddings:
    """What `write_embeddings` has written.

    Raises:
        UsageError: the file is damaged or another one; a pickle in it is never opened.
    """
    try:
        # Opened here: numpy leaves a file open that is no archive.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            return Embeddings(found["vectors"], found["labels"], found["ids"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(
            f"{path} cannot be read as embeddings ({reason}); delete {path.with_name(TEST_FILE)} "
            "and run the same command again"
        ) from None


def _peak(run: Path) -> float | None:
    """The most memory that the training has recorded, in MiB; None if it has recorded none."""
    recorded = read_metrics(run).get(PEAK)
    return float(max(recorded.value)) if recorded is not None else None


def measure_arguments(run: Path, query: str, gallery: str) -> list[str]:
    """The command line of this entry, for the splits of one measurement."""
    protocols = [{"name": "test", "query": query, "gallery": gallery}]
    return [str(run), f"evaluation.protocols={json.dumps(protocols)}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    # Not `--run`: torchrun takes that for one of its own, wherever it stands.
    parser.add_argument("run", metavar="RUN", help="run folder of one fold")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(arguments: argparse.Namespace) -> int:
    """Test one fold as one worker of the group that the environment describes."""
    arguments.config = str(Path(arguments.run) / CONFIG)
    return run_worker(measure_fold, arguments, [])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.protocol_measure RUN ...`."""
    return run_command(
        "dist_dml.protocol_measure", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.protocol_measure import main as only_main  # one copy of the module

    sys.exit(only_main())
