"""ENTRY: a run's embedder as files that other programs use, each checked against the network.

    dist-dml export runs/demo --out exported
    dist-dml export runs/demo --out exported --formats onnx --mlflow-register shoes
    dist-dml export runs/demo --out exported --license apache-2.0 --push-to-hub ann/shoes

The folder appears whole or not at all. See docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dist_dml.checkpoint import load_embedder_tensors
from dist_dml.checkpoint_manifest import Manifest
from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.index import Index
from dist_dml.data.loader import image_batches
from dist_dml.data.opening import open_index
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluate import choose_checkpoint
from dist_dml.export_card import Exported, model_card
from dist_dml.models import embed_images
from dist_dml.models.embedder import Embedder, build_embedder
from dist_dml.models.export_formats import FILES, check_packages, write_formats
from dist_dml.models.export_hub import check_hub, push_to_hub
from dist_dml.models.export_module import (
    ImageEmbedder,
    example_images,
    export_config,
    preprocessing_of,
)
from dist_dml.models.export_parity import BATCH_SIZES, check_parity
from dist_dml.tracking.model_registry import check_registry, register_model

_PACKAGES = ("dist_dml", "torch", "onnx", "onnxruntime")


def export(arguments: argparse.Namespace) -> Path:
    """Export, and register or push where that is asked for. Returns the folder.

    Raises:
        UsageError: for a folder that is no run or is there already, a package or a token that is
            missing; before any work.
        RunError: a file differs from the network (nothing is written), or MLflow or the hub does
            not answer (the folder is complete then).
    """
    run, out = Path(arguments.run), Path(arguments.out)
    formats = tuple(name for name in FILES if name in arguments.formats)
    _check(arguments, run, out, formats)
    checkpoint, manifest = choose_checkpoint(run, arguments.checkpoint)
    config = resolve(str(run / "config.yaml"), arguments.overrides).config
    # Every weight comes from the checkpoint: nothing is to be fetched.
    architecture = config.model.model_copy(update={"pretrained": False, "weights": ""})
    embedder = build_embedder(architecture, config.data.image, config.run.seed, None)
    try:
        embedder.load_state_dict(load_embedder_tensors(checkpoint))
    except RuntimeError as error:
        raise UsageError(
            f"{checkpoint} is not of this model ({str(error).splitlines()[-1].strip()}); give the "
            "run that it belongs to, without overrides of model or data.image"
        ) from None
    index = _index_of(config, manifest, arguments.no_data)
    images = _images(config, index)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        facts = _write(temporary, run, checkpoint, manifest, config, embedder, index, images,
                       formats, arguments)  # fmt: skip
        temporary.rename(out)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written ({error}); free the disk or name another"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, difference in facts.differences.items():
        print(f"{out / FILES[name]}: within {difference:.2g} of the network")
    print(f"{out / 'README.md'}: the model card")
    _hand_on(arguments, run, out, manifest, images, facts)
    return out


def _check(arguments: argparse.Namespace, run: Path, out: Path, formats: tuple[str, ...]) -> None:
    """All that can be refused before anything is read or computed."""
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"{run} is not the folder of a run (it has no config.yaml); give one that "
            "`dist-dml train` has made, for example runs/demo"
        )
    if out.exists():
        raise UsageError(f"--out {out} is there already; name a new folder, or remove that one")
    check_packages(formats)
    if arguments.mlflow_register:
        if "onnx" not in formats:
            raise UsageError(
                "--mlflow-register logs the ONNX file, which --formats leaves out; add onnx"
            )
        check_registry()
    if arguments.private and not arguments.push_to_hub:
        raise UsageError("--private is about --push-to-hub OWNER/NAME, which is not given; add it")
    if arguments.push_to_hub:
        check_hub(arguments.push_to_hub)


def _index_of(config: Config, manifest: Manifest, without: bool) -> Index | None:
    """The data set of the run; None, with a note, where it is not there or is another one."""
    if without:
        return None
    try:
        index = open_index(config.data)
    except (UsageError, RunError) as error:
        print(
            f"note: files are checked on random pictures, and the card has no counts, as the data "
            f"set cannot be read ({error})",
            file=sys.stderr,
        )
        return None
    if index.fingerprint != manifest.plan["fingerprint"]:
        print(
            f"note: {config.data.path} has fingerprint {index.fingerprint} by now, and the "
            f"checkpoint was trained on {manifest.plan['fingerprint']}",
            file=sys.stderr,
        )
    return index


def _images(config: Config, index: Index | None) -> UInt8[Tensor, "n S S C"]:
    """Images as evaluation sees them, of the split that it queries first; without data, pictures.

    Raises:
        RunError: the storage failed.
    """
    count = max(BATCH_SIZES)
    if index is None:
        return example_images(config.data.image, count)
    splits = [protocol.query for protocol in config.evaluation.protocols]
    known = [split for split in splits if split in index.split_names]
    ids = index.select(known[0] if known else config.data.split)
    chosen = ids[np.linspace(0, len(ids) - 1, min(len(ids), 4 * count)).astype(int)]
    data = config.data.model_copy(update={"loader_processes": 0})
    parts = []
    for batch in image_batches(index, chosen, data, count):
        parts.append(batch.images[batch.readable].permute(0, 2, 3, 1))
    images = torch.cat(parts)[:: max(1, sum(map(len, parts)) // count)]
    if not len(images):
        return example_images(config.data.image, count)
    # Fewer than the largest batch are repeated: parity compares each row.
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count].contiguous()


def _write(
    folder: Path,
    run: Path,
    checkpoint: Path,
    manifest: Manifest,
    config: Config,
    embedder: Embedder,
    index: Index | None,
    images: Tensor,
    formats: tuple[str, ...],
    arguments: argparse.Namespace,
) -> Exported:
    """All files of the export into a folder, once they are known to agree."""
    image, normalise = config.data.image, arguments.normalise
    module = ImageEmbedder(embedder, normalise)
    preprocessing = preprocessing_of(image, normalise)
    rebuilt_by = export_config(config.model, image, embedder.embedding_dim, normalise)
    write_formats(module, rebuilt_by, preprocessing, images[:2].contiguous(), formats, folder)
    differences = check_parity(embedder, normalise, folder, formats, images)
    text = json.dumps(preprocessing, indent=1) + "\n"
    (folder / "preprocessing.json").write_text(text, encoding="utf-8")
    if "onnx" in formats:
        source = Path(embed_images.__file__).read_text(encoding="utf-8")
        (folder / "embed_images.py").write_text(source, encoding="utf-8")
    exported = Exported(
        config=config,
        manifest=manifest,
        checkpoint=checkpoint.name,
        index=index,
        embedding_dim=embedder.embedding_dim,
        normalise=normalise,
        differences=differences,
        real_images=index is not None,
        license=arguments.license,
        packages=_versions(),
    )
    (folder / "README.md").write_text(model_card(run, exported), encoding="utf-8")
    return exported


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # Not needed for the formats that were asked for.
            continue
    return found


def _hand_on(
    arguments: argparse.Namespace,
    run: Path,
    out: Path,
    manifest: Manifest,
    images: Tensor,
    facts: Exported,
) -> None:
    """To MLflow and to the hub."""
    step = manifest.progress.step
    if arguments.mlflow_register:
        example = images[:2].contiguous().numpy()
        done = register_model(run, out, arguments.mlflow_register, example, step)
        print(f"MLflow: models:/{done.name}/{done.version} in {done.store}, run {done.run_id}")
    if arguments.push_to_hub:
        message = f"{facts.config.run.name}, {facts.checkpoint}"
        print(f"hub: {push_to_hub(out, arguments.push_to_hub, arguments.private, message)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--checkpoint", default="best", help="best (default), last or a path")
    parser.add_argument(
        "--formats", nargs="+", choices=tuple(FILES), default=tuple(FILES), help="default: all"
    )
    parser.add_argument("--normalise", action="store_true", help="embeddings of length 1")
    parser.add_argument("--license", default="", help="for the model card, for example apache-2.0")
    parser.add_argument(
        "--no-data", action="store_true", help="do not open the data set: check on random pictures"
    )
    parser.add_argument(
        "--mlflow-register", default="", metavar="NAME", help="log to the run's MLflow and register"
    )
    parser.add_argument(
        "--push-to-hub", default="", metavar="OWNER/NAME", help="upload; token in HF_TOKEN"
    )
    parser.add_argument("--private", action="store_true", help="of a new repository on the hub")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for example data.path=..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Export. Returns the exit code."""
    export(arguments)
    return 0
