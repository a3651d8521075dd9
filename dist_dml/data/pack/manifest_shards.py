"""The shards of a manifest: files and downloads in the order of the rows, and what failed.

A shard that is without some images has `failed/SHARD.csv` beside it: row, label, url, reason.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.credentials import redact
from dist_dml.data.pack.columns import image_extension
from dist_dml.data.pack.image_files import Tree, shrink
from dist_dml.data.pack.listed_images import note
from dist_dml.data.pack.manifest_rows import LABEL, NUMBER, OTHERS, PATH
from dist_dml.data.pack.url_images import Fetching, fetch_images, is_url
from dist_dml.data.pack.writing import PACK_FILE, ShardPlan
from dist_dml.errors import RunError, UsageError

FAILED = "failed"
"""Folder below the data set with a csv of the images that each shard is without."""


def render_shard(
    tree: Tree, resize: int, fetching: Fetching, max_failed: float, out: Path, shard: ShardPlan
) -> Iterator[dict[str, str | bytes]]:
    """The samples of one shard, without those that cannot be fetched; these are listed.

    Args:
        tree: where the paths start.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        fetching: how URLs are asked for.
        max_failed: share of the shard's URLs that may fail.
        out: data set folder, for the list.
        shard: rows of a manifest.

    Raises:
        RunError: a file is no image, or too many URLs failed.
    """
    rows = [tuple(row) for row in np.asarray(shard.samples).tolist()]
    urls = [row[PATH] for row in rows if is_url(row[PATH])]
    failed: list[tuple[str, str, str, str]] = []
    # Its connections end with it, not when its memory is found: then in whatever thread that is.
    with closing(fetch_images(urls, fetching)) as answers:
        for row in rows:
            remote = is_url(row[PATH])
            answer = next(answers) if remote else tree.read(row[PATH])
            sample = answer if isinstance(answer, str) else _sample(tree, resize, row, answer)
            if not isinstance(sample, str):
                yield sample
                continue
            if not remote:
                raise RunError(f"{tree.where(row[PATH])}: {sample}; correct row {row[NUMBER]}")
            # Signatures and passwords of URLs stay in the manifest.
            failed.append((row[NUMBER], row[LABEL], redact(row[PATH]), sample))
            if len(failed) > max_failed * len(urls):
                raise RunError(
                    f"{shard.name}: {len(failed):,} of {len(urls):,} URLs failed "
                    f"({_kinds(failed)}), first {failed[0][2]}; run the same command again, or "
                    f"raise --max-failed={max_failed}"
                )
    _list_failed(_failed_file(out, shard), failed)


def _sample(
    tree: Tree, resize: int, row: Sequence[str], data: bytes
) -> dict[str, str | bytes] | str:
    """The members of one sample, or why its bytes are no image."""
    extension = image_extension(data)
    if not extension:
        return "no JPEG, PNG or WebP image"
    remote = is_url(row[PATH])
    if resize:
        try:
            data, extension, *_ = shrink(data, extension, resize, row[PATH])
        except RunError:
            return "it cannot be decoded"
    place = redact(row[PATH]) if remote else row[PATH]
    own = {"label": row[LABEL], "url" if remote else "file": place, "row": int(row[NUMBER])}
    return {
        "__key__": f"{int(row[NUMBER]):09d}",
        extension: data,
        "cls": row[LABEL].encode(),
        "json": json.dumps({**json.loads(row[OTHERS]), **own}).encode(),
    }


def _kinds(failed: Sequence[Sequence[str]]) -> str:
    counts = Counter(row[3] for row in failed).most_common(3)
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts)


def _failed_file(out: Path, shard: ShardPlan) -> Path:
    return out / FAILED / f"{shard.name.removesuffix('.tar')}.csv"


def _list_failed(path: Path, failed: Sequence[Sequence[str]]) -> None:
    """List what a shard is without, before the shard itself appears."""
    if not failed:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("row", "label", "url", "reason"), *failed])
    os.replace(temporary, path)


def report_failed(out: Path, shards: Sequence[ShardPlan]) -> None:
    """Say how many images the shards are without."""
    failed: list[list[str]] = []
    for path in filter(Path.is_file, (_failed_file(out, shard) for shard in shards)):
        with path.open(encoding="utf-8", newline="") as stream:
            failed += list(csv.reader(stream))[1:]
    if failed:
        note(
            f"{len(failed):,} images could not be fetched ({_kinds(failed)}); they are listed in "
            f"{out / FAILED}, try them again with --retry-failed"
        )


def forget_failed(out: Path, source: dict[str, Any]) -> None:
    """Remove the shards that are without some images, if they are of this pack."""
    try:
        mine = json.loads((out / PACK_FILE).read_text(encoding="utf-8"))["source"] == source
    except (OSError, ValueError, KeyError, TypeError):
        mine = False
    if not mine:
        raise UsageError(f"{out}: --retry-failed needs a pack of the same manifest and parameters")
    for path in sorted((out / FAILED).glob("*.csv")):
        (out / f"{path.stem}.tar").unlink(missing_ok=True)
