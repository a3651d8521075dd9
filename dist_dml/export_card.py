"""The model card of an export: written from the run, so that it says nothing that was not recorded.

What was not recorded is left out, or named as missing with the command that records it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import yaml

from dist_dml.checkpoint_manifest import Manifest
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, differences
from dist_dml.credentials import redact
from dist_dml.data.index import Index
from dist_dml.models.export_formats import FILES
from dist_dml.retrieval.distances import named_distance
from dist_dml.tracking.run_files import IDENTITY, METRICS, complete_lines, read_json

_LEFT_OUT = (
    *("run.name", "run.root", "run.resume", "tracking.", "data.storage."),
    *("data.loader_processes", "data.prefetch"),
)
"""Keys that say where and how, not what: nobody else's machine has these places."""
_PATHS = ("data.path", "model.weights")
_PURPOSES = {
    "safetensors": "weights, rebuilt by `config.json`",
    "pt2": "`torch.export`, no code of dist_dml needed",
    "onnx": "ONNX, any runtime",
}


@dataclass(frozen=True)
class Exported:
    """What the card tells about.

    Attributes:
        config: of the run.
        manifest: of the checkpoint.
        checkpoint: its folder's name.
        index: the data set; None where it is not there any more.
        embedding_dim: features of an embedding.
        normalise: whether they have unit length.
        differences: the largest of each format to the network, see `check_parity`.
        real_images: whether these were compared on images of the data set.
        license: as given; may be empty.
        packages: versions that wrote the files, by name.
    """

    config: Config
    manifest: Manifest
    checkpoint: str
    index: Index | None
    embedding_dim: int
    normalise: bool
    differences: Mapping[str, float]
    real_images: bool
    license: str
    packages: Mapping[str, str]


def model_card(run: Path, exported: Exported) -> str:
    """The card, as Markdown with the hub's header."""
    config = exported.config
    header: dict[str, Any] = {"license": exported.license} if exported.license else {}
    header |= {
        "library_name": "dist_dml",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["metric-learning", "image-retrieval", *sorted(exported.differences)],
    }
    image = config.data.image
    kind = "grey" if image.channels == 1 else "RGB"
    length = " and length 1" if exported.normalise else ""
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {config.run.name}",
        f"Embeddings of {exported.embedding_dim} numbers{length} for {kind} images of "
        f"{image.size} x {image.size} pixels, made so that images of one class lie near each "
        f"other; the scores below say how far they do. Trained by `{config.loss.name}` on "
        f"{exported.manifest.num_classes:,} classes with the backbone `{config.model.backbone}`.",
        _use(exported),
        _scores(run, exported),
        _data(exported),
        _training(run, exported),
        _limits(exported),
    ]
    return "\n\n".join(parts) + "\n"


def _use(exported: Exported) -> str:
    rows = [
        f"| `{FILES[name]}` | {_PURPOSES[name]} | {difference:.2g} |"
        for name, difference in exported.differences.items()
    ]
    compared = "images of the data set" if exported.real_images else "random pictures"
    distance = named_distance(exported.config.evaluation.distances[0]).name
    text = (
        "## Use\n\n| file | what it is | largest difference |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nThe difference is that of a number of an embedding to the network in training's own "
        f"program, over batches of several sizes of {compared}. The files take decoded pixels "
        "0..255, `uint8` of shape (n, height, width, channel), in batches of any size; subtracting "
        "the mean and dividing by the deviation happens inside. `preprocessing.json` says how an "
        f"image file becomes such an array. Embeddings were compared by `{distance}` here."
    )
    if "onnx" in exported.differences:
        text += (
            "\n\nFrom image files, with numpy, onnxruntime and OpenCV and nothing else:\n\n"
            "```\npip install numpy onnxruntime opencv-python-headless\n"
            "python embed_images.py first.jpg second.png --out embeddings.npy\n```"
        )
    if "pt2" in exported.differences:
        text += (
            "\n\nIn PyTorch:\n\n```python\nimport torch\n\n"
            f'embed = torch.export.load("{FILES["pt2"]}").module()\n'
            "embeddings = embed(images)  # uint8 (n, height, width, channel)\n```"
        )
    return text


def _scores(run: Path, exported: Exported) -> str:
    scores, origin = recorded_scores(run, exported)
    if not scores:
        return (
            "## Scores\n\nNone are recorded for this checkpoint; `dist-dml evaluate` measures them."
        )
    blocks = ["## Scores", f"Of {exported.checkpoint}, {origin}."]
    for protocol in exported.config.evaluation.protocols:
        searched = (
            f"in the images of split `{protocol.gallery}`"
            if protocol.gallery
            else "among the others of the same split, itself left out"
        )
        rows: dict[str, dict[str, float]] = {}
        for key, value in scores.items():
            name, _, rest = key.partition("/")
            distance, _, score = rest.rpartition("/")
            if name == protocol.name and distance:
                rows.setdefault(score, {})[distance] = value
        if not rows:
            continue
        distances = sorted({distance for row in rows.values() for distance in row})
        lines = [f"| score | {' | '.join(distances)} |", "|---" * (len(distances) + 1) + "|"]
        for score, row in rows.items():
            shown = "{:,.0f}" if score.startswith("num_") else "{:.4f}"
            cells = [shown.format(row[d]) if d in row else "" for d in distances]
            lines.append(f"| {score} | {' | '.join(cells)} |")
        blocks.append(
            f"Protocol `{protocol.name}`: each image of split `{protocol.query}` is a query, "
            f"searched {searched}."
        )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def recorded_scores(run: Path, exported: Exported) -> tuple[dict[str, float], str]:
    """The scores of the checkpoint by `protocol/distance/score`, and where they come from.

    The report's if it is about this checkpoint, otherwise those that training recorded at its step.
    """
    names = tuple(f"{protocol.name}/" for protocol in exported.config.evaluation.protocols)
    report = read_json(run / "report" / "scores.json")
    if report.get("checkpoint") == exported.checkpoint:
        rows = report.get("scores", {})
        found = rows.get("trained") or rows.get(exported.checkpoint) or {}
        scores = {
            key: float(value)
            for key, value in found.items()
            if key.startswith(names) and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if scores:
            return scores, "as `dist-dml evaluate` measured them"
    scores = {}
    offset, following = -1, 0
    while following != offset:
        offset = following
        lines, following = complete_lines(run / METRICS, offset)
        for line in lines:
            if line.get("step") == exported.manifest.progress.step:
                name, value = str(line.get("name")), line.get("value")
                if name.startswith(names) and isinstance(value, (int, float)):
                    scores[name] = float(value)
    return scores, f"as training measured them at step {exported.manifest.progress.step:,}"


def _data(exported: Exported) -> str:
    fingerprint = exported.manifest.plan["fingerprint"]
    name = PurePath(exported.config.data.path).name or "unnamed"
    text = f"## Data\n\nData set `{_cell(name)}`, fingerprint `{fingerprint}`"
    split = exported.config.data.split
    index = exported.index
    if index is None:
        return f"{text}; trained on split `{split}`. It was not at hand when this was written."
    rows = []
    for code, known in enumerate(index.split_names):
        chosen = index.split == code
        chosen[index.quarantined] = False
        classes = len(np.unique(index.class_id[chosen]))
        rows.append(f"| {_cell(known)} | {int(chosen.sum()):,} | {classes:,} |")
    if index.fingerprint != fingerprint:
        text += f" (that at hand has {index.fingerprint}: the counts below are of that one)"
    source = index.metadata.get("source")
    kind = source.get("kind") if isinstance(source, dict) else None
    made = f", packed by `dist-dml pack {_cell(kind)}`" if isinstance(kind, str) else ""
    return (
        f"{text}{made}. Trained on split `{split}`.\n\n| split | images | classes |\n"
        "|---|---|---|\n" + "\n".join(rows)
    )


def _training(run: Path, exported: Exported) -> str:
    config, progress = exported.config, exported.manifest.progress
    minutes, seconds = divmod(round(progress.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    facts = [
        f"{progress.step:,} steps, {progress.images_seen:,} images seen, "
        f"{hours:d}:{minutes:02d}:{seconds:02d} hours of training.",
        f"{len(exported.manifest.class_files)} worker(s) wrote the checkpoint's classes; precision "
        f"`{config.engine.precision}`.",
        f"Configuration hash `{config_hash(config)}`.",
    ]
    commit = read_json(run / IDENTITY).get("git_commit")
    if commit:
        facts.append(f"Trained by dist_dml at commit `{_cell(str(commit))}`.")
    versions = ", ".join(f"{name} {number}" for name, number in exported.packages.items())
    facts.append(f"Exported with {versions}.")
    rows = [
        f"| `{key}` | `{_cell(_value(key, ours))}` |"
        for key, ours, _ in differences(config, Config())
        if not key.startswith(_LEFT_OUT)
    ]
    listing = "\n".join(f"- {fact}" for fact in facts)
    table = "| key | value |\n|---|---|\n" + "\n".join(rows) if rows else "All are the defaults."
    return f"## Training\n\n{listing}\n\nSettings that are not the defaults:\n\n{table}"


def _value(key: str, value: Any) -> str:
    """As JSON, without folders of a machine and without secrets."""
    if key in _PATHS and value:
        value = PurePath(str(value)).name
    elif key.startswith("data.mixture"):
        value = [part | {"path": PurePath(str(part.get("path"))).name} for part in value]
    return redact(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cell(text: str) -> str:
    """A text that ends neither its table's cell nor its code, and is no HTML."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;").split())


def _limits(exported: Exported) -> str:
    config = exported.config
    image = config.data.image
    texts = [
        "The scores speak of the images and splits above. Other images, cameras or kinds of "
        "classes were not measured; measure on your own before you rely on a threshold.",
        f"An image is seen at {image.size} x {image.size} pixels"
        + (
            ", stretched to a square."
            if not image.resize
            else f", cut from the centre ({image.size} / {image.resize} of the short side): what "
            "lies outside is not seen."
        ),
        "A rotation that a camera noted in the file (EXIF) is not applied, as in training.",
        "How the errors fall on groups of people or of things was not examined.",
    ]
    if config.engine.precision != "float32":
        texts.append(
            f"Training and its scores used {config.engine.precision}, the exported files compute "
            "in float32: scores may differ in their last digits."
        )
    if not exported.license:
        texts.append("No licence was stated: ask whoever gave you these files before you use them.")
    return "## Limits\n\n" + "\n".join(f"- {text}" for text in texts)
