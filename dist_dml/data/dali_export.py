"""The index that NVIDIA DALI's WebDataset reader takes, written for an indexed data set."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from dist_dml.data.index import Index
from dist_dml.data.progress import ProgressLine
from dist_dml.data.shard_changes import is_url
from dist_dml.data.shards import split_name
from dist_dml.data.tar_members import ForwardReader, TarDamage, TarMember, walk_members
from dist_dml.errors import UsageError


def export_dali(index: Index) -> list[Path]:
    """Write DALI's index of every shard, `SHARD.idx`, into the folder of the data set.

    Raises:
        UsageError: a shard is remote, two shards have the same name, or one cannot be listed.
    """
    targets = [
        index.folder / (name.rpartition("/")[2].removesuffix(".tar") + ".idx")
        for name in index.shards
    ]
    if any(is_url(name) for name in index.shards):
        raise UsageError(f"{index.folder}: --export dali reads local shards; fetch them first")
    if len(set(targets)) < len(targets):
        raise UsageError(f"{index.folder}: shards of one name in two folders; index each alone")
    progress = ProgressLine("export", len(targets), "shards")
    start = 0
    for code, target in enumerate(targets):
        stop = start + index.metadata["shards"][code]["samples"]
        write_dali(index.shard_location(code), target, frozenset(index.keys(start, stop)))
        start = stop
        progress.advance(1)
    progress.finish()
    return targets


def write_dali(shard: str, target: Path, keys: frozenset[str]) -> int:
    """Write the index that DALI's `readers.webdataset` takes, version 1.2, for the indexed samples.

    As `wds2idx` does it: members that follow one another with the same key are a sample. All of a
    sample's members are listed, with the names and extensions that the tar has.

    Args:
        shard: path of the tar.
        target: file to write; it appears whole.
        keys: samples to list; members of others are left out.

    Returns:
        The number of samples.

    Raises:
        UsageError: the tar cannot be read, or a name has a blank, which the format cannot hold.
    """

    def parts(member: TarMember) -> tuple[str, str]:
        dot = member.name.index(".", member.name.rfind("/") + 1)
        return member.name[:dot], member.name[dot + 1 :]

    lines = []
    try:
        with open(shard, "rb") as stream:
            members = walk_members(ForwardReader(stream, seeks=True))
            named = (member for member in members if split_name(member.name) is not None)
            for key, group in groupby(named, lambda member: parts(member)[0]):
                texts = [f"{parts(m)[1]} {m.offset} {m.size} {m.name}" for m in group]
                if key not in keys:
                    continue
                line = " ".join(texts)
                if len(line.split()) != 4 * len(texts):
                    raise UsageError(
                        f"shard {shard}: key {key!r} has a blank in a name, which DALI's index "
                        "cannot hold; rename it"
                    )
                lines.append(line)
    except (OSError, TarDamage) as error:
        raise UsageError(f"shard {shard}: cannot be read ({error})") from None
    if not lines:
        raise UsageError(f"shard {shard}: has no samples, which DALI's index cannot say")
    temporary = target.with_name(target.name + ".tmp")
    text = "".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines))
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return len(lines)
