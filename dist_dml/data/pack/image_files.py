"""What packers of image files share: where the files lie, how they are read, shrunk and named.

An official data set is a `Tree`: a folder, or a zip that is read member by member and never
extracted. A compressed tar can only be read from its start, so it is extracted by hand first.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.errors import RunError, UsageError

_JPEG_QUALITY = 95
_MAX_BYTES = 2**30
"""Largest file that is read: a small zip can claim, and hold, a huge member."""
_TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class ImageSample:
    """One image file of a data set.

    Attributes:
        key: its WebDataset key, see `unique_keys`.
        label: its class.
        path: of the file, below the tree; part of the sample's `.json`.
        facts: what else goes to the `.json`, as JSON values.
        box: x, y, width, height of the object, in pixels of the file; None where there is none. The
            `.json` has it in pixels of the stored image.
    """

    key: str
    label: str
    path: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    box: tuple[float, float, float, float] | None = None


def unique_keys(paths: Iterable[str]) -> list[str]:
    """A key for each path: without its ending, and unlike all others.

    WebDataset ends a key at the first dot of the file name, so dots of the name become `_`. A key
    that an earlier path has gets `-2`, `-3`: keys depend on the paths and their order alone.
    """
    taken: set[str] = set()
    keys = []
    for path in paths:
        folder, slash, name = path.rpartition("/")
        stem = name.rpartition(".")[0].replace(".", "_") or "_"
        key, number = f"{folder}{slash}{stem}", 2
        while key in taken:
            key, number = f"{folder}{slash}{stem}-{number}", number + 1
        taken.add(key)
        keys.append(key)
    return keys


@dataclass(frozen=True)
class Tree:
    """A folder, or a zip that is not extracted; picklable. Names are relative, with slashes.

    Attributes:
        path: the folder or the zip.
        inside: folder below it in which the names start, with a slash at its end, or "".
        zipped: whether `path` is a zip.
    """

    path: Path
    inside: str = ""
    zipped: bool = False

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}/{self.inside}{name}"

    def below(self, folder: str) -> Tree:
        """The same tree from one of its folders on."""
        return Tree(self.path, f"{self.inside}{folder}/" if folder else self.inside, self.zipped)

    def size(self, name: str) -> int:
        """Bytes of a file; -1 where there is no such file. 2 us in a folder (2026-11)."""
        if self.zipped:
            info = _open_zip(self.path).NameToInfo.get(self.inside + name)
            return -1 if info is None or info.is_dir() else info.file_size
        try:
            status = os.stat(f"{self.path}/{self.inside}{name}")
        except (OSError, ValueError):  # A name with a zero byte is a ValueError.
            return -1
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            RunError: it cannot be read, has more than 1 GiB, or is a damaged or encrypted member.
        """
        try:
            if self.size(name) > _MAX_BYTES:
                raise RuntimeError(f"{self.size(name):,} bytes, expected at most {_MAX_BYTES:,}")
            if self.zipped:
                return _open_zip(self.path).read(self.inside + name)
            return Path(self.path, self.inside + name).read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__
        except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{self.where(name)}: cannot be read ({reason}); repair it and pack again")

    def folders(self) -> list[str]:
        """The folders at the top of the tree, sorted, without hidden ones; none where it is not."""
        if self.zipped:
            start = len(self.inside)
            names = [n for n in _open_zip(self.path).NameToInfo if n.startswith(self.inside)]
            found = {n[start:].partition("/")[0] for n in names if "/" in n[start:]}
        elif (self.path / self.inside).is_dir():
            with os.scandir(self.path / self.inside) as entries:
                found = {entry.name for entry in entries if entry.is_dir()}
        else:
            found = set()
        return sorted(name for name in found if name and not name.startswith("."))


def open_tree(path: Path, layout: str) -> Tree:
    """The tree of a folder or a zip.

    Args:
        path: of it.
        layout: what the data set looks like, for messages.

    Raises:
        UsageError: there is nothing, a tar, or something else.
    """
    if path.is_dir():
        return Tree(path)
    if not path.exists():
        raise UsageError(f"{path}: no such folder or zip; expected {layout}")
    if zipfile.is_zipfile(path):
        try:
            _open_zip(path)
        except zipfile.BadZipFile as error:
            raise UsageError(f"{path}: is a damaged zip ({error}); get it again") from None
        return Tree(path, zipped=True)
    if path.name.lower().endswith(_TAR_ENDINGS):
        raise UsageError(
            f"{path}: is a tar, whose files cannot be read in any order; extract it "
            f"(`tar xf {path.name}`) and give the folder, {layout}"
        )
    raise UsageError(f"{path}: is neither a folder nor a readable zip; expected {layout}")


@lru_cache(maxsize=4)
def _opened_zip(path: str, size: int, modified: int) -> zipfile.ZipFile:
    """Once a process: reading the list of 120,000 members takes a second."""
    return zipfile.ZipFile(path)


def _open_zip(path: Path) -> zipfile.ZipFile:
    status = os.stat(path)
    return _opened_zip(str(path), status.st_size, status.st_mtime_ns)


def find_tree(path: Path, files: Sequence[str], layout: str) -> Tree:
    """The folder that holds `files`: `path` itself or one directly below it.

    Args:
        path: a folder or a zip.
        files: names that must all be there.
        layout: what the data set looks like, for messages.

    Raises:
        UsageError: names the first file that is missing where most of them are.
    """
    top = open_tree(path, layout)
    best = top
    for tree in [top, *(top.below(folder) for folder in top.folders())]:
        missing = [name for name in files if tree.size(name) < 0]
        if not missing:
            return tree
        if len(missing) < sum(best.size(name) < 0 for name in files):
            best = tree
    missing = [name for name in files if best.size(name) < 0]
    if len(missing) == len(files):
        raise UsageError(f"{path}: holds no {files[0]}, nor does a folder in it; expected {layout}")
    raise UsageError(f"{best.where(missing[0])}: no such file; expected {layout}")


def shrink(data: bytes, extension: str, resize: int, path: str) -> tuple[bytes, str, float, float]:
    """The image with a short side of `resize`: PNG stays lossless, others become JPEG.

    Args:
        data: the file; returned as it is if its short side is no longer than `resize`.
        extension: of the file, lower case.
        resize: in pixels.
        path: of the file, for messages.

    Returns:
        File, extension, and the factors by which width and height changed.

    Raises:
        RunError: the image cannot be decoded.
    """
    import cv2
    import simplejpeg

    from dist_dml.data.decode import decode
    from dist_dml.data.faults import BadSample

    try:
        image = decode(data, channels=3)
    except BadSample as error:
        raise RunError(f"{path}: {error}; repair or remove it") from None
    height, width = image.shape[:2]
    if min(height, width) <= resize:
        return data, extension, 1.0, 1.0
    # Packing runs in as many processes as cores: threads inside would only get in their way.
    cv2.setNumThreads(0)
    scale = resize / min(height, width)
    size = (max(resize, round(width * scale)), max(resize, round(height * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    factors = size[0] / width, size[1] / height
    if extension == "png":
        encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        return encoded, "png", *factors
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), _JPEG_QUALITY, "RGB", "444")
    return encoded, "jpg", *factors


def render(tree: Tree, resize: int, sample: ImageSample) -> dict[str, str | bytes]:
    """The members of one sample: the image's bytes, or a smaller image; label; facts.

    Args:
        tree: where its file lies.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        sample: see `ImageSample`.

    Raises:
        RunError: the file cannot be read, or decoded where that is needed.
    """
    data, extension = tree.read(sample.path), sample.path.rpartition(".")[2].lower()
    x_factor = y_factor = 1.0
    if resize:
        where = tree.where(sample.path)
        data, extension, x_factor, y_factor = shrink(data, extension, resize, where)
    described = {"label": sample.label, "file": sample.path, **sample.facts}
    if sample.box is not None:
        factors = (x_factor, y_factor, x_factor, y_factor)
        described["box"] = [round(a * b, 2) for a, b in zip(sample.box, factors, strict=True)]
    return {
        "__key__": sample.key,
        extension: data,
        "cls": sample.label.encode(),
        "json": json.dumps(described).encode(),
    }


def encoders(resize: int) -> dict[str, str]:
    """Versions of the programs whose bytes `render` stores; none where it copies."""
    if not resize:
        return {}
    import cv2
    import simplejpeg

    return {"opencv": cv2.__version__, "simplejpeg": simplejpeg.__version__}
