"""Whatever a checkpoint's manifest says: what was written, or one line that says what is wrong.

Its own checksum is made right again, so that what it protects is what is tested. Hypothesis draws
the same examples in every run.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FUZZED
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_checkpoint import (
    FIRST,
    NUM_CLASSES,
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
    Manifest,
    newest_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
)
from dist_dml.errors import UsageError
from dist_dml.resuming import step_in_plan

# What stands beside the checkpoints, and what no manifest may lead to.
SECRET = "secret.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 2, whose manifest is damaged, beside step 1, which stays whole."""
    folder = tmp_path_factory.mktemp("fuzzed")
    second = store(folder / "checkpoints")
    copy_of(second, 1, 1)
    (folder / "checkpoints" / SECRET).write_bytes((second / SECOND).read_bytes())
    return second


@pytest.fixture(autouse=True, scope="module")
def opened() -> Iterator[set[str]]:
    """The real paths of all files that are opened, by whichever way Python has."""
    found: set[str] = set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            found.add(os.fsdecode(arguments[0]))

    watching = [True]
    sys.addaudithook(watch)  # It stays until the process ends, and does nothing by then.
    yield found
    watching.clear()


def use(checkpoint: Path, opened: set[str]) -> Manifest | None:
    """Resume from a checkpoint as far as its manifest leads."""
    opened.clear()
    try:
        manifest = verify_checkpoint(checkpoint)
    except UsageError as error:
        check_line(str(error), checkpoint)
        manifest = None
    assert not [path for path in opened if SECRET in path or "passwd" in path], opened
    newest = newest_checkpoint(checkpoint.parent)
    assert newest is not None
    assert newest[0].name == ("step-000000001" if manifest is None else checkpoint.name)
    if manifest is None:
        return None
    # Everything that is done with its fields works.
    assert manifest.progress.step >= 0
    assert step_in_plan(manifest.progress.step, manifest.plan, {"steps_per_epoch": 7}) >= 0
    try:
        load_head(checkpoint, manifest, small_head())
    except UsageError as error:
        check_line(str(error), checkpoint)
        # The classes were others, or their files were interchanged.
        assert manifest.num_classes != NUM_CLASSES or manifest.class_files[0][1:] != [6, FIRST]
    return manifest


def check_line(line: str, checkpoint: Path) -> None:
    assert len(line.splitlines()) == 1, line
    assert line.startswith(f"checkpoint {checkpoint} "), line
    assert len(line) < 800 + len(str(checkpoint)), line


def paths_in(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON tree."""
    found = [path] if path else []
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += paths_in(value, (*path, key))
    return found


STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 5, 6, 7, 11, 12, 2**62, 2**64, 10**400, 0.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "2",
        "\0",
        "\ud800",
        "a\nb",
        "x" * 3000,
        [],
        {},
        [[]],
        {"": 1},
    ),
    *(FIRST, SECOND, f"../{SECRET}", "/etc/passwd", "..", ".", MANIFEST, "config.yaml"),
    *([0, 6, FIRST], [6, 11, SECOND], [0, 11, f"../{SECRET}"], [0, 0, FIRST], [6, 6, SECOND]),
    {"bytes": 0, "sha256": "0" * 64},
    {"bytes": -1, "sha256": "0" * 64},
    {"bytes": 1, "sha256": "a\n" * 32},
    json.loads("[" * 200 + "]" * 200),
]
values = st.sampled_from(STRANGE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=5,
)
actions = st.tuples(
    st.integers(0, 100), st.sampled_from(["set", "set", "remove", "add", "rename"]), values
)


def act(tree: dict[str, Any], at: int, action: str, value: Any) -> None:
    """Change one place of a JSON tree."""
    every = paths_in(tree)
    if not every:
        return
    value = copy.deepcopy(value)  # Another change may come to it.
    *above, last = every[at % len(every)]
    place: Any = tree
    for key in above:
        place = place[key]
    if action == "set":
        place[last] = value
    elif action == "remove":
        del place[last]
    elif isinstance(place, list):
        place.append(value if action == "add" else copy.deepcopy(place[last]))
    elif action == "rename":
        place[value if isinstance(value, str) else "renamed"] = place.pop(last)
    else:
        place[value if isinstance(value, str) else "added"] = copy.deepcopy(place[last])


@settings(FUZZED, max_examples=400)
@given(changes=st.lists(actions, min_size=1, max_size=3))
def test_a_manifest_with_a_right_checksum_leads_nowhere_else(
    checkpoint: Path, opened: set[str], changes: list[tuple[int, str, Any]]
) -> None:
    before = (checkpoint / MANIFEST).read_bytes()
    try:
        contents = contents_of(checkpoint)
        for at, action, value in changes:
            act(contents, at, action, value)
        write_contents(checkpoint, contents)
        use(checkpoint, opened)
    finally:
        (checkpoint / MANIFEST).write_bytes(before)


@settings(FUZZED, max_examples=100)
@given(
    bounds=st.lists(st.integers(-1, 12), min_size=2, max_size=6),
    names=st.lists(st.sampled_from([FIRST, SECOND, "config.yaml"]), min_size=1, max_size=3),
    num_classes=st.sampled_from([NUM_CLASSES, NUM_CLASSES, 10, 12, 0]),
)
def test_only_parts_that_tile_the_classes_are_read(
    checkpoint: Path, opened: set[str], bounds: list[int], names: list[str], num_classes: int
) -> None:
    before = (checkpoint / MANIFEST).read_bytes()
    parts = [
        [start, stop, name] for start, stop, name in zip(bounds, bounds[1:], names, strict=False)
    ]
    try:
        write_contents(
            checkpoint,
            {**contents_of(checkpoint), "class_files": parts, "num_classes": num_classes},
        )
        manifest = use(checkpoint, opened)
    finally:
        (checkpoint / MANIFEST).write_bytes(before)
    if manifest is not None:
        owned = [c for start, stop, _ in manifest.class_files for c in range(start, stop)]
        assert sorted(owned) == list(range(num_classes))
        assert len({name for _, _, name in manifest.class_files}) == len(manifest.class_files)


@settings(FUZZED, max_examples=150)
@given(
    places=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), max_size=4),
    share=st.just(1.0) | st.floats(0, 1),
    tail=st.binary(max_size=10) | st.sampled_from([b"[" * 5000, b"\xef\xbb\xbf", b"\0"]),
)
def test_a_manifest_of_other_bytes_is_refused(
    checkpoint: Path,
    opened: set[str],
    places: list[tuple[int, int]],
    share: float,
    tail: bytes,
) -> None:
    before = (checkpoint / MANIFEST).read_bytes()
    changed = bytearray(before[: int(share * len(before))] + tail)
    for place, bits in places:
        if changed:
            changed[place % len(changed)] ^= bits
    try:
        (checkpoint / MANIFEST).write_bytes(bytes(changed))
        manifest = use(checkpoint, opened)
        whole = contents_of(checkpoint) if manifest else None
    finally:
        (checkpoint / MANIFEST).write_bytes(before)
    if manifest is not None:  # White space may change.
        assert whole == contents_of(checkpoint)


@settings(FUZZED, max_examples=60)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True),
    texts=st.lists(st.sampled_from(["", "[", "{}", "whole", "best"]), min_size=5, max_size=5),
    best=st.none() | st.integers(0, 10),
    keep=st.integers(1, 3),
)
def test_pruning_keeps_the_newest_and_never_fails(
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[int],
    texts: list[str],
    best: int | None,
    keep: int,
) -> None:
    folder = tmp_path_factory.mktemp("pruned")
    for step, text in zip(sorted(steps), texts, strict=False):
        place = folder / f"step-{step:09d}"
        place.mkdir()
        contents = contents_of(checkpoint)
        contents["progress"] |= {"step": step, "best_step": step if text == "best" else 99}
        write_contents(place, contents)
        if text not in ("whole", "best"):
            (place / MANIFEST).write_text(text)
    prune_checkpoints(folder, keep, best)
    kept = sorted(int(path.name[5:]) for path in folder.iterdir())
    newest = sorted(steps)[-keep:]
    were_best = [s for s, text in zip(sorted(steps), texts, strict=False) if text == "best"]
    if best is None:
        assert kept == newest
    elif best in steps:
        assert kept == sorted({*newest, best})
    else:
        assert kept == sorted({*newest, *were_best[-1:]})
