"""ENTRY: a run's embeddings of any shards as Parquet, in parallel and resumable.

    dist-dml embed runs/demo --out embeddings/test
    dist-dml embed runs/demo --out embeddings/others --data datasets/others --split train test

or the same under torchrun, deepspeed or srun: `torchrun ... -m dist_dml.embed runs/demo ...`. The
folder gets parts of a fixed number of samples, and a manifest when all are there. Started again
with the same words it goes on where it was killed. `dist-dml evaluate --embeddings` measures it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Run by path: this folder must not hide installed packages.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_dml.checkpoint import load_embedder_tensors
from dist_dml.checkpoint_manifest import MANIFEST, Manifest
from dist_dml.command_line import run_command
from dist_dml.config import Config
from dist_dml.config_loading import Resolved
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index
from dist_dml.embedding_parts import Samples, claim_folder, embed_parts
from dist_dml.entry import add_config_arguments, run_worker
from dist_dml.errors import UsageError
from dist_dml.evaluate import choose_checkpoint, use_config_of_run
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.world import World
from dist_dml.retrieval.embedding_manifest import EmbeddingJob, file_digest
from dist_dml.split_embedding import embed_with

PART_ROWS = 16_384
"""Samples of a part, about; 32 MiB at 512 float32. A kill costs a worker at most one."""


def _embed(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    """Embed with a checkpoint into a folder; worker 0 says what it holds."""
    config = resolved.config
    out = Path(arguments.out)
    found = choose_checkpoint(Path(arguments.run), arguments.checkpoint)
    index = open_index(config.data)
    splits = list(dict.fromkeys(arguments.split or [config.evaluation.protocols[0].query]))
    ids = samples_of(index, splits)
    embedder = build_embedder(config.model, config.data.image, config.run.seed, world.group)
    embedder.load_state_dict(load_embedder_tensors(found[0]))
    job = job_of(config, index, found, splits, len(ids), embedder.embedding_dim, world, arguments)
    embed = embed_with(embedder.to(world.device).eval(), config, world)
    with claim_folder(out, job, world):
        manifest = embed_parts(embed, index, ids, job, out, config, world)
    if not world.is_first:
        return
    size = sum(part.bytes for part in manifest.parts) / 2**20
    print(
        f"{out}: {manifest.rows:,} embeddings of {job.embedding_dim} {job.dtype} in "
        f"{len(manifest.parts)} part(s), {size:,.1f} MiB"
    )
    if manifest.left_out:
        print(
            f"note: {manifest.left_out} damaged images are left out; `dist-dml verify "
            f"{index.folder}` names them",
            file=sys.stderr,
        )


def samples_of(index: Index, splits: Sequence[str]) -> Samples:
    """The samples of the splits, one split after the other, each by sample id.

    Raises:
        UsageError: the data set has no such split.
    """
    return np.concatenate([index.select(split).astype(np.int64) for split in splits])


def job_of(
    config: Config,
    index: Index,
    found: tuple[Path, Manifest],
    splits: list[str],
    num_samples: int,
    embedding_dim: int,
    world: World,
    arguments: argparse.Namespace,
) -> EmbeddingJob:
    """What is embedded by what: equal jobs make equal files."""
    checkpoint, manifest = found
    batch = config.evaluation.batch_size
    # Whole batches, so that a part's end cuts none: the batches are those of an evaluation.
    rows = arguments.part_rows or batch * max(1, PART_ROWS // batch)
    decides = {
        "model": config.model.model_dump(mode="json"),
        "image": config.data.image.model_dump(mode="json"),
        "batch_size": batch,
        "precision": config.engine.precision,
        "deterministic": config.engine.deterministic,
        "device": world.device.type,
    }
    text = json.dumps(decides, sort_keys=True)
    return EmbeddingJob(
        run=config.run.name,
        checkpoint=checkpoint.name,
        checkpoint_step=manifest.progress.step,
        checkpoint_digest=file_digest(checkpoint / MANIFEST),
        config_digest=hashlib.sha256(text.encode()).hexdigest(),
        data=config.data.path,
        splits=splits,
        fingerprint=index.fingerprint,
        num_samples=num_samples,
        dtype=arguments.dtype,
        embedding_dim=embedding_dim,
        part_rows=rows,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the parts go")
    parser.add_argument(
        "--split",
        nargs="+",
        metavar="SPLIT",
        help="splits to embed; by default the queries of the run's first protocol",
    )
    parser.add_argument(
        "--data", default="", metavar="DATASET", help="another indexed data set than the run's"
    )
    parser.add_argument("--checkpoint", default="best", help="best (default), last or a path")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument(
        "--part-rows",
        type=int,
        default=0,
        metavar="N",
        help=f"samples of a part; by default {PART_ROWS:,} in whole batches",
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Embed with the run's own configuration, unless another is given. Returns the exit code."""
    if arguments.part_rows < 0:
        raise UsageError(f"--part-rows {arguments.part_rows}; give 1 or more samples a part")
    use_config_of_run(arguments)
    overrides = []
    if arguments.data:
        # The run's folds and mixture speak of the run's own data.
        overrides = [f"data.path={arguments.data}", "data.mixture=[]", "data.folds=0"]
        overrides.append("data.fold=0")
    return run_worker(_embed, arguments, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.embed ...`."""
    return run_command(
        "dist_dml.embed", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.embed import main as only_main  # one copy of the module

    sys.exit(only_main())
