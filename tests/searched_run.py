"""A data set, a run with an untrained checkpoint on it, and indexes of both, in two seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from stored_checkpoint import NUM_CLASSES, contents_of, store, write_contents

from dist_dml.checkpoint import flushed_entry
from dist_dml.config_loading import resolve, to_yaml
from dist_dml.data.index import Index, load_index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard
from dist_dml.models.embedder import build_embedder
from dist_dml.retrieval.search_files import SearchFacts
from dist_dml.search import build_command

WIDTH = 6
"""D, as of the stored checkpoint's classes."""
FIRST = 2 * NUM_CLASSES
"""Row of the first training image: `test` comes before `train`."""


def image_of(label: int, number: int) -> np.ndarray:
    """20 x 16 grey: a pattern of the class and noise of the image; 0 and 1 of a class are equal."""
    draw = np.random.default_rng(label)
    pattern = cv2.resize(draw.integers(0, 256, (4, 4), dtype=np.uint8), (16, 20))
    noise = np.random.default_rng([label, max(1, number)]).normal(0, 30, (20, 16))
    return np.clip(pattern + noise, 0, 255).astype(np.uint8)


def png_of(label: int, number: int) -> bytes:
    """The same, encoded."""
    return cv2.imencode(".png", image_of(label, number))[1].tobytes()


def pack_images(folder: Path, per_class: int = 4) -> Index:
    """`NUM_CLASSES` classes in `train`, half of the images again in `test`."""
    for split, numbers in (("train", range(per_class)), ("test", range(2))):
        rows = [
            {"__key__": f"{split}{label}_{number}", "png": png_of(label, number), "cls": name}
            for label in range(NUM_CLASSES)
            for name in [f"class <b>{label:02d}</b>".encode()]
            for number in numbers
        ]
        write_shard(folder / f"{split}-000000.tar", rows)
    build_index(folder)
    return load_index(folder)


def make_run(run: Path, index: Index, *words: str) -> Path:
    """A run folder with the checkpoint of an untrained network. Returns the checkpoint."""
    settings = [
        f"data.path={index.folder}",
        "data.loader_processes=0",
        "data.image={size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
        f"model={{embedding_dim: {WIDTH}}}",
        "engine.threads=1",
        "evaluation.protocols=[{name: known, query: test, gallery: train}]",
        *words,
    ]
    config = resolve(None, settings).config
    embedder = build_embedder(config.model, config.data.image, config.run.seed, None)
    tensors = {"embedder.safetensors": embedder.state_dict()}
    checkpoint = store(run / "checkpoints", tensors=tensors)
    for folder in (checkpoint, run):
        (folder / "config.yaml").write_text(to_yaml(config))
    contents = contents_of(checkpoint)
    contents["files"]["config.yaml"] = flushed_entry(checkpoint / "config.yaml")
    contents["plan"]["fingerprint"] = index.fingerprint
    write_contents(checkpoint, contents)
    return checkpoint


def build(*words: str | Path) -> SearchFacts:
    """`dist-dml search build WORDS`, without its printing."""
    parser = argparse.ArgumentParser()
    build_command.add_arguments(parser)
    return build_command.build(parser.parse_args([str(word) for word in words]))
