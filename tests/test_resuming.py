"""Checkpoints with right checksums and contents that do not fit: refused before work starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_trainee import CASES, SETTINGS, trainee
from safetensors.torch import load_file, save_file

from dist_dml.checkpoint import flushed_entry
from dist_dml.checkpoint_manifest import MANIFEST, manifest_checksum, verify_checkpoint
from dist_dml.config_loading import resolve
from dist_dml.errors import UsageError
from dist_dml.models.embedder import build_embedder
from dist_dml.resuming import restore

PLAN = {"seed": 0, "fingerprint": "abc"}


def edited_tensors(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Writes a file of tensors anew."""

    def edit(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name)

    return edit


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content) and None


OPTIMIZER, EMBEDDER, CONFIG = "optimizer.safetensors", "embedder.safetensors", "config.yaml"
CONTENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no safetensors": (written(EMBEDDER, b"x" * 100), "does not fit the model"),
    "no safetensors either": (written(OPTIMIZER, b"x" * 100), "does not fit the model"),
    "a key without a parameter": (
        edited_tensors(OPTIMIZER, lambda t: t.update(step=torch.ones(()))),
        "optimizer.safetensors has step, no parameter's state",
    ),
    "another shape": (
        edited_tensors(
            OPTIMIZER, lambda t: t.update({"backbone.layers.0.weight|exp_avg": torch.ones(3)})
        ),
        r"backbone\.layers\.0\.weight\|exp_avg is \[3\], expected \[",
    ),
    "half a state": (
        edited_tensors(OPTIMIZER, lambda t: t.pop("backbone.layers.0.weight|exp_avg")),
        r"has exp_avg_sq, step of backbone\.layers\.0\.weight, expected exp_avg, exp_avg_sq, step",
    ),
    "a list for a config": (written(CONFIG, b"- 1\n"), r"config\.yaml: expected sections"),
    "a number for a section": (written(CONFIG, b"loss: 3\n"), r"config\.yaml: expected sections"),
    "a tag": (written(CONFIG, b"loss: !!python/name:os.system x\n"), r"config\.yaml at line 1"),
    "not UTF-8": (written(CONFIG, b"\xff\xfe"), r"is unreadable \(config\.yaml"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_that_do_not_fit_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    worker = trainee("adamw")
    worker.train(range(1))
    path = worker.save(tmp_path, 1)
    change, expected = CONTENTS[what]
    change(path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = {name: flushed_entry(path / name) for name in manifest["files"]}
    manifest.pop("sha256")
    manifest["sha256"] = manifest_checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))

    config = resolve(None, [*SETTINGS, *CASES["adamw"]]).config
    embedder = build_embedder(config.model, config.data.image, 0, None)
    found = path, verify_checkpoint(path)
    with pytest.raises(UsageError, match=expected) as caught:
        restore(config, worker.world, embedder, worker.classifier, PLAN, found)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
