"""ENTRY: checkpoint -> embeddings -> neighbours -> scores -> report.

`dist-dml evaluate runs/demo --baselines`, or the same under torchrun, deepspeed or srun.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Run by path: this folder must not hide installed packages.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_dml.checkpoint import load_embedder_tensors
from dist_dml.checkpoint_manifest import newest_checkpoint, verify_checkpoint
from dist_dml.command_line import run_command
from dist_dml.config import Config, ProtocolConfig
from dist_dml.config_loading import Resolved
from dist_dml.data.index import Index, load_index
from dist_dml.data.loader import evaluation_batches
from dist_dml.data.plan import row_counts, worker_slice
from dist_dml.engine import autocast
from dist_dml.entry import add_config_arguments, run_worker
from dist_dml.errors import UsageError
from dist_dml.models.embedder import Embedder, build_embedder
from dist_dml.parallel.collectives import gather_objects, gather_uneven
from dist_dml.parallel.world import World
from dist_dml.retrieval.clustering import cluster_nmi
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.metrics import QueryScores, score_names, summarise
from dist_dml.retrieval.protocol import Embeddings, score_slice
from dist_dml.retrieval.report import recall_curve, retrieval_gallery, score_table
from dist_dml.tracking.run_files import append_event

Embed = Callable[[Tensor], Tensor]


def embed_with(embedder: Embedder, config: Config, world: World) -> Embed:
    """Retrieval features of uint8 images, under the precision of training, without dropout."""

    def embed(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(config, world.device):
            return embedder(images.to(world.device, non_blocking=True))

    return embed


def embed_pixels(images: Tensor) -> Tensor:
    """The baseline without a network: the image itself as a vector."""
    return images.flatten(1).float() / 255


def embed_split(embed: Embed, index: Index, split: str, config: Config, world: World) -> Embeddings:
    """Embeddings of a whole split, on every worker; each embeds its slice.

    Costs one pass over the slice and an all-gather of the embeddings: N * D * 4 bytes a worker.
    """
    ids = index.select(split)
    counts = row_counts(len(ids), world.size)
    batches = evaluation_batches(
        index, split, config.data, config.evaluation.batch_size, world.rank, world.size
    )
    parts = [embed(batch.images).float() for batch in batches]
    if not parts:  # More workers than images: learn the width from a blank one.
        image = config.data.image
        blank = torch.zeros(1, image.channels, image.size, image.size, dtype=torch.uint8)
        parts = [embed(blank).float()[:0]]
    vectors = gather_uneven(torch.cat(parts).to(world.device), counts, world.group)
    return Embeddings(vectors.cpu().numpy(), index.class_id[ids], ids.astype(np.int64))


def measure_protocols(
    embed: Embed, index: Index, config: Config, world: World, nmi: bool
) -> tuple[dict[str, float], dict[str, Embeddings]]:
    """All scores as `protocol/distance/score`, the same on every worker, and the embeddings used.

    The queries are divided among the workers; k-means runs on worker 0 alone.
    """
    splits: dict[str, Embeddings] = {}
    scores: dict[str, float] = {}
    for protocol in config.evaluation.protocols:
        for split in filter(None, (protocol.query, protocol.gallery)):
            if split not in splits:
                splits[split] = embed_split(embed, index, split, config, world)
        queries = splits[protocol.query]
        gallery = splits[protocol.gallery] if protocol.gallery else None
        mine = worker_slice(len(queries), world.rank, world.size)
        for name in config.evaluation.distances:
            distance = named_distance(name)
            part = score_slice(queries, gallery, mine, distance, config.evaluation.recall_at)
            every = QueryScores.concatenate(gather_objects(part, world.group))
            summary = summarise(every)
            if nmi and world.is_first:
                summary["nmi"] = cluster_nmi(
                    queries.vectors, queries.labels, distance, config.run.seed
                )
            scores |= {f"{protocol.name}/{name}/{key}": value for key, value in summary.items()}
    return gather_objects(scores, world.group)[0], splits


def check_evaluation(index: Index, config: Config) -> None:
    """Refuse, before any work, protocols whose splits are missing and a best metric never measured.

    Raises:
        UsageError: names the key and what there is.
    """
    names = [protocol.name for protocol in config.evaluation.protocols]
    if len(set(names)) < len(names):
        raise UsageError(f"evaluation.protocols has a name twice ({names}); give each its own")
    for protocol in config.evaluation.protocols:
        for split in filter(None, (protocol.query, protocol.gallery)):
            index.select(split)
    best = config.checkpoint.best_metric
    measured = {
        f"{name}/{distance}/{score}"
        for name in names
        for distance in config.evaluation.distances
        for score in score_names(config.evaluation.recall_at)
    }
    if best and best not in measured:
        near = difflib.get_close_matches(best, measured, n=3, cutoff=0.0)
        raise UsageError(
            f"checkpoint.best_metric={best!r} is not measured; use PROTOCOL/DISTANCE/SCORE, for "
            f"example {' or '.join(near)}, or '' to keep none"
        )


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
        for distance in reversed(config.evaluation.distances):
            shown = {name: scores_of(scores, protocol, distance) for name, scores in rows.items()}
            title = f"{protocol.name}, {distance}: queries {protocol.query}, {searched}"
            texts.append(f"{title}\n{score_table(shown)}")
    return "\n\n".join(texts)


def write_gallery(
    path: Path, index: Index, splits: Mapping[str, Embeddings], config: Config, title: str
) -> None:
    """The picture of hits and misses of the first protocol and distance."""
    from dist_dml.data.reader import open_reader, read_image

    protocol = config.evaluation.protocols[0]
    reader = open_reader(index, config.data.image.channels)
    figure = retrieval_gallery(
        splits[protocol.query],
        splits[protocol.gallery] if protocol.gallery else None,
        named_distance(config.evaluation.distances[0]),
        lambda sample_id: read_image(index, reader, sample_id),
        dict(enumerate(index.class_names)),
        seed=config.run.seed,
        title=title,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def load_for_evaluation(
    config: Config, world: World, checkpoint: Path | None, index: Index
) -> Embedder:
    """The embedder of a checkpoint, or of the seed alone (untrained), ready to embed."""
    embedder = build_embedder(config.model, config.data.image, config.run.seed, world.group)
    if checkpoint is not None:
        manifest = verify_checkpoint(checkpoint)
        if manifest.plan["fingerprint"] != index.fingerprint and world.is_first:
            print(
                f"note: {checkpoint.name} was trained on other data (fingerprint "
                f"{manifest.plan['fingerprint']}) than {config.data.path} ({index.fingerprint})",
                file=sys.stderr,
            )
        embedder.load_state_dict(load_embedder_tensors(checkpoint))
    return embedder.to(world.device).eval()


def _find_checkpoint(run: Path, which: str) -> Path:
    """`best`, `last` or a path."""
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        return Path(which)
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UsageError(f"{run} holds no checkpoint; train it first, or give --checkpoint PATH")
    path, manifest = newest
    if which == "best" and manifest.progress.best_step is not None:
        best = folder / f"step-{manifest.progress.best_step:09d}"
        return best if best.exists() else path
    return path


def _evaluate(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    """Score a checkpoint, and on request pixels and the untrained network; print and write."""
    config = resolved.config
    run = Path(arguments.run)
    checkpoint = _find_checkpoint(run, arguments.checkpoint)
    index = load_index(config.data.path)
    check_evaluation(index, config)
    rows: dict[str, dict[str, float]] = {}
    if arguments.baselines:
        rows["pixels"], _ = measure_protocols(embed_pixels, index, config, world, nmi=False)
        blank = embed_with(load_for_evaluation(config, world, None, index), config, world)
        rows["untrained"], _ = measure_protocols(blank, index, config, world, nmi=False)
    embedder = load_for_evaluation(config, world, checkpoint, index)
    embed = embed_with(embedder, config, world)
    name = "trained" if arguments.baselines else checkpoint.name
    rows[name], splits = measure_protocols(embed, index, config, world, config.evaluation.nmi)
    if not world.is_first:
        return
    report = run / "report"
    report.mkdir(parents=True, exist_ok=True)
    scores = {"checkpoint": checkpoint.name, "scores": rows}
    (report / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    write_gallery(report / "gallery.png", index, splits, config, f"{config.run.name}: retrieval")
    _write_recall(report / "recall.png", rows, config)
    for name in ("scores.json", "gallery.png", "recall.png"):
        # The next `dist-dml track sync` takes them to MLflow.
        append_event(run, {"path": f"report/{name}", "folder": "report"})
    if arguments.json:
        print(json.dumps(scores))
    else:
        print(tables(rows, config))
        print(f"\nrun:     {run}/ ({checkpoint.name}; scores and pictures in report/)")
        if config.tracking.mlflow:
            print(f"MLflow:  dist-dml ui --root {config.run.root}")


def _write_recall(path: Path, rows: Mapping[str, Mapping[str, float]], config: Config) -> None:
    protocol, distance = config.evaluation.protocols[0], config.evaluation.distances[0]
    curves = {}
    for name, scores in rows.items():
        found = scores_of(scores, protocol, distance)
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
