"""Manifests with a right checksum that say what makes no sense, and what is kept of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_checkpoint import (
    FIRST,
    NUM_CLASSES,
    PROGRESS,
    SECOND,
    contents_of,
    copy_of,
    small_head,
    store,
    write_contents,
)

from dist_dml.checkpoint import load_head
from dist_dml.checkpoint_manifest import (
    MANIFEST,
    Progress,
    newest_checkpoint,
    prune_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from dist_dml.errors import UsageError


def refusal(checkpoint: Path) -> str:
    """What is said of a checkpoint that cannot be used: one line."""
    with pytest.raises(UsageError) as caught:
        verify_checkpoint(checkpoint)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"checkpoint {checkpoint} ")
    assert "resume" in message
    assert len(message) < len(str(checkpoint)) + 400
    return message


def put(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], object]:
    """Set an entry of nested containers."""

    def change(contents: Any) -> None:
        for key in keys[:-1]:
            contents = contents[key]
        contents[keys[-1]] = value

    return change


def take(*keys: str) -> Callable[[dict[str, Any]], object]:
    """Remove an entry of nested containers."""

    def change(contents: Any) -> None:
        for key in keys[:-1]:
            contents = contents[key]
        del contents[keys[-1]]

    return change


def rename(name: str) -> Callable[[dict[str, Any]], object]:
    """Call a class file otherwise, in both places."""

    def change(contents: dict[str, Any]) -> None:
        contents["files"][name] = contents["files"].pop(SECOND)
        contents["class_files"][1][2] = name

    return change


# A change of the manifest, and what the line says of it.
NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a step as text": (put("progress", "step", value="2"), r"progress\.step.*valid integer"),
    "a step as a truth": (put("progress", "step", value=True), r"progress\.step.*valid integer"),
    "a step as a fraction": (put("progress", "step", value=2.5), r"progress\.step.*integer"),
    "a negative step": (put("progress", "step", value=-1), r"progress\.step.*greater than or"),
    "a step of a thousand digits": (put("progress", "step", value=10**999), r"progress\.step"),
    "a time that is no number": (put("progress", "seconds", value=float("nan")), "NaN is no"),
    "a time without end": (put("progress", "seconds", value=float("inf")), "Infinity is no"),
    "a negative time": (put("progress", "seconds", value=-0.5), r"progress\.seconds"),
    "a score as text": (put("progress", "best_score", value="0.5"), r"progress\.best_score"),
    "skipped steps as text": (put("progress", "skipped", value="12"), r"progress\.skipped"),
    "a skipped step as text": (put("progress", "skipped", value=["1"]), r"progress\.skipped\.0"),
    "no step": (take("progress", "step"), r"progress\.step.*field required"),
    "no progress": (take("progress"), r"progress.*field required"),
    "an unknown field": (put("surprise", value=1), r"surprise.*not permitted"),
    "an unknown field of progress": (put("progress", "eval", value=1), r"progress\.eval"),
    "a plan that is a list": (put("plan", value=[]), r"plan.*valid dictionary"),
    "no steps an epoch": (put("plan", "steps_per_epoch", value=0), r"plan\.steps_per_epoch=0"),
    "steps an epoch as text": (
        put("plan", "steps_per_epoch", value="5\n"),
        r"plan\.steps_per_epoch='5\\n'",
    ),
    "no classes": (put("num_classes", value=0), r"num_classes.*greater than or equal to 1"),
    "a gap": (put("class_files", 1, 0, value=7), rf"has 7\.\.11 in {SECOND}, expected some from 6"),
    "an overlap": (put("class_files", 1, 0, value=5), r"has 5\.\.11 .*from 6"),
    "an empty part": (put("class_files", 0, 1, value=0), r"has 0\.\.0 .*from 0"),
    "too few classes": (put("num_classes", value=12), r"ends at 11, expected num_classes=12"),
    "too many classes": (put("num_classes", value=10), r"ends at 11, expected num_classes=10"),
    "no class files": (put("class_files", value=[]), r"ends at 0, expected num_classes=11"),
    "one file for two parts": (put("class_files", 1, 2, value=FIRST), r"a name twice"),
    "a class file of two entries": (put("class_files", 0, value=[0, 6]), r"class_files\.0"),
    "a class file that is not listed": (take("files", FIRST), rf"has {FIRST}, which files lacks"),
    "no embedder": (take("files", "embedder.safetensors"), r"files lacks embedder"),
    "no configuration": (take("files", "config.yaml"), r"files lacks config\.yaml"),
    "a file without bytes": (take("files", FIRST, "bytes"), r"bytes.*field required"),
    "a file without a checksum": (take("files", FIRST, "sha256"), r"sha256.*field required"),
    "a short checksum": (put("files", FIRST, "sha256", value="abc"), r"sha256.*match pattern"),
    "more about a file": (put("files", FIRST, "mode", value=1), r"mode.*not permitted"),
    "an entry that is a number": (put("files", FIRST, value=3), r"valid dictionary"),
    "another format as text": (put("format_version", value="1"), r"format_version is missing"),
    "another format as truth": (put("format_version", value=True), r"format_version is missing"),
    "another format": (put("format_version", value=2), r"has format 2, this version reads 1"),
    "a plan too deep": (
        put("plan", "order", value=json.loads("[" * 700 + "]" * 700)),
        r"is damaged: .",
    ),
}
NAMES = [
    "../secret",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "ü.safetensors",
    "\ud800",
    "-rf",
    ".hidden",
    "a" * 300,
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return store(tmp_path / "checkpoints")


def test_what_was_written_is_read(checkpoint: Path) -> None:
    manifest = verify_checkpoint(checkpoint)
    assert manifest.progress == PROGRESS
    assert manifest.class_files == [(0, 6, FIRST), (6, NUM_CLASSES, SECOND)]
    assert manifest.plan["weights"] == [0.5, 0.5]
    assert manifest.files[FIRST]["bytes"] == (checkpoint / FIRST).stat().st_size


@pytest.mark.parametrize("case", NONSENSE)
def test_a_manifest_that_makes_no_sense_is_refused(case: str, checkpoint: Path) -> None:
    change, expected = NONSENSE[case]
    contents = contents_of(checkpoint)
    change(contents)
    write_contents(checkpoint, contents)
    message = refusal(checkpoint)
    with pytest.raises(UsageError, match=expected):
        read_manifest(checkpoint)
    assert MANIFEST in message or "format 2" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name: str, checkpoint: Path) -> None:
    secret = checkpoint.parent / "secret"
    secret.write_bytes((checkpoint / SECOND).read_bytes())
    contents = contents_of(checkpoint)
    rename(name)(contents)
    write_contents(checkpoint, contents)
    assert re.search("match pattern|unicode string", refusal(checkpoint))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"format_version": 1, "format_version": 1}', "a name is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "a name is there twice"),
        ("[" * 100_000, "too many levels of nesting"),
        ('{"format_version": ' + "9" * 5000 + "}", "is damaged: Exceeds the limit"),
        ("7", "a int instead of an object"),
        ("{", "no JSON at line 1"),
        ("", "no JSON at line 1"),
        (" " * (2**24 + 1), "more than 16777216 bytes"),
        ('{"format_version": 1, "sha256": "\\ud800"}', "does not have the checksum"),
    ],
)
def test_json_that_is_no_manifest_is_refused(text: str, expected: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert expected in refusal(checkpoint)


@pytest.mark.parametrize("name", [MANIFEST, SECOND])
def test_links_and_pipes_in_a_checkpoint_are_refused(name: str, checkpoint: Path) -> None:
    outside = checkpoint.parent / "outside"
    (checkpoint / name).rename(outside)
    (checkpoint / name).symlink_to(outside)
    assert f"({name} is a symbolic link; put the file itself there)" in refusal(checkpoint)
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)  # Opening it would wait for somebody who writes.
    assert f"({name} is no regular file)" in refusal(checkpoint)


def test_the_folder_itself_may_be_a_link(checkpoint: Path) -> None:
    link = checkpoint.parents[1] / "elsewhere"
    link.symlink_to(checkpoint.parent, target_is_directory=True)
    found = newest_checkpoint(link)
    assert found is not None
    assert found[1].progress == PROGRESS


def test_a_manifest_of_before_the_ledger_is_read(checkpoint: Path) -> None:
    contents = contents_of(checkpoint)
    contents["progress"] = {
        "step": 2,
        "images_seen": 14,
        "seconds": 2,  # JSON writers that know no 2.0
        "best_score": None,
        "best_step": None,
    }
    del contents["extra"]
    write_contents(checkpoint, contents)
    assert verify_checkpoint(checkpoint).progress == Progress(2, 14, 2.0)


def test_ledger_and_skipped_steps_are_read_as_they_were(tmp_path: Path) -> None:
    progress = Progress(9, 14, 1.5, 0.25, 1, ledger=2**127, skipped=(3, 5))
    assert read_manifest(store(tmp_path, progress)).progress == progress


def test_folders_that_are_not_ours_are_no_checkpoints(checkpoint: Path) -> None:
    for name in ("step-²", "step-7", "step-", "step-00000000٣", "step-000000009.tmp", "step-x"):
        (checkpoint.parent / name).mkdir()
    found = newest_checkpoint(checkpoint.parent)
    assert found is not None
    assert found[0] == checkpoint
    prune_checkpoints(checkpoint.parent, 1, None)
    assert len(list(checkpoint.parent.iterdir())) == 7


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_a_best_that_was_not_written_does_not_cost_the_one_before(checkpoint: Path) -> None:
    folder = checkpoint.parent
    # Step 3 was the best of its time; that of step 6 could not be written.
    for step, best in ((3, 3), (4, 3), (5, 3), (7, 6), (8, 6)):
        copy_of(checkpoint, step, best)
    prune_checkpoints(folder, 2, best_step=6)
    assert steps_in(folder) == [3, 7, 8]
    copy_of(folder / "step-000000008", 9, 9)
    prune_checkpoints(folder, 2, best_step=9)
    assert steps_in(folder) == [8, 9]


def test_pruning_passes_over_manifests_that_cannot_be_read(checkpoint: Path) -> None:
    folder = checkpoint.parent
    for step, best in ((3, 3), (4, 4), (5, 3), (7, 6), (8, 6)):
        copy_of(checkpoint, step, best)
    (folder / "step-000000004" / MANIFEST).write_text("[")
    (folder / "step-000000005" / MANIFEST).unlink()
    prune_checkpoints(folder, 1, best_step=6)
    assert steps_in(folder) == [3, 8]


# What a class file holds instead of the head's own, and what the line says of it.
OTHER_TENSORS = {
    "another embedding_dim": ({"weight": torch.zeros(5, 7)}, r"weight is \[5, 7\], expected"),
    # Both of these would be copied without a word: PyTorch repeats what is missing.
    "one feature": ({"weight": torch.zeros(5, 1)}, r"weight is \[5, 1\], expected \[5, 6\]"),
    "one number": ({"weight": torch.zeros(())}, r"weight is \[\], expected \[5, 6\]"),
    "other classes": ({"bias": torch.zeros(4)}, r"bias is \[4\], expected \[5\]"),
    "integers": ({"bias": torch.zeros(5, dtype=torch.int64)}, r"bias is of torch\.int64, exp"),
    "a step count for each class": (
        {"weight|step": torch.zeros(5)},
        r"step is \[5\], expected \[\]",
    ),
    "no bias": ({"bias": None}, r"files of classes lack bias"),
}


@pytest.mark.parametrize("case", OTHER_TENSORS)
def test_whole_files_of_other_tensors_are_refused(case: str, tmp_path: Path) -> None:
    changed, expected = OTHER_TENSORS[case]
    files = {}
    for name, bounds in ((FIRST, (0, 6)), (SECOND, (6, NUM_CLASSES))):
        tensors = small_head(*bounds).shard_tensors()
        if name == SECOND or None in changed.values():
            tensors = {k: v for k, v in (tensors | changed).items() if v is not None}
        files[name] = tensors
    checkpoint = store(tmp_path, tensors=files)
    with pytest.raises(UsageError, match=expected) as caught:
        load_head(checkpoint, verify_checkpoint(checkpoint), small_head())
    assert "does not fit the configuration" in str(caught.value)


def test_a_whole_file_that_is_no_safetensors_is_refused(checkpoint: Path) -> None:
    (checkpoint / SECOND).write_bytes(b"\xff" * 64)
    with pytest.raises(UsageError, match=rf"not fit the configuration \({SECOND}: .*header"):
        load_head(checkpoint, read_manifest(checkpoint), small_head())


def test_rows_come_back_from_either_file(checkpoint: Path) -> None:
    whole, part = small_head(), small_head(4, 8)
    with torch.no_grad():
        part.weight.zero_()
    load_head(checkpoint, verify_checkpoint(checkpoint), part)
    assert torch.equal(part.weight, whole.weight[4:8])
