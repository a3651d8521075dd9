"""A folder of embeddings in parts: the job that writes it, and the manifest that says it is whole.

`job.json` is written first and says what is being embedded by what; `embeddings.json` is written
last, when every part is there. Both are read without trust.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from dist_dml.errors import UsageError
from dist_dml.strict_json import Natural, StrictModel, first_problem, read_object

JOB_FILE = "job.json"
MANIFEST_FILE = "embeddings.json"
_MOST_BYTES = 2**26

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_PartName = Annotated[str, Field(pattern=r"^part-[0-9]{6,}\.parquet$")]


class EmbeddingJob(StrictModel):
    """All that decides what the parts hold. Jobs that are equal make the same files.

    Bit for bit on one kind of device and version of PyTorch; see docs/embeddings.md.
    """

    format_version: Literal[1] = 1
    run: str
    checkpoint: str
    checkpoint_step: Natural
    checkpoint_digest: _Digest
    """Of the checkpoint's manifest, which holds the checksums of all its files."""
    config_digest: _Digest
    """Of the keys that embeddings depend on: model, image, batch, device and precision."""
    data: str
    splits: list[str]
    fingerprint: str
    num_samples: Natural
    """Of all splits, damaged ones included."""
    dtype: Literal["float32", "float16"]
    embedding_dim: Annotated[int, Field(ge=1, lt=2**31)]
    part_rows: Annotated[int, Field(ge=1, lt=2**31)]
    """Samples of a part, damaged ones included; the last part has the rest."""

    @property
    def num_parts(self) -> int:
        """Files of the finished folder."""
        return -(-self.num_samples // self.part_rows)

    @property
    def digest(self) -> str:
        """SHA-256 of the job: what each part says that it belongs to."""
        text = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def facts(self) -> dict[str, str]:
        """What made the embeddings, for the files' footers and for readers."""
        return {
            name: ", ".join(value) if isinstance(value, list) else str(value)
            for name, value in self.model_dump().items()
        }

    def differences(self, other: EmbeddingJob) -> list[str]:
        """`name: own value -> other value` of the fields that differ."""
        own, its = self.model_dump(), other.model_dump()
        return [f"{name}: {own[name]} -> {its[name]}" for name in own if own[name] != its[name]]


class EmbeddingPart(StrictModel):
    """One finished file."""

    name: _PartName
    rows: Natural
    left_out: Natural
    """Damaged images that have no row."""
    bytes: Natural
    sha256: _Digest


class EmbeddingManifest(StrictModel):
    """A finished folder."""

    job: EmbeddingJob
    rows: Natural
    left_out: Natural
    parts: list[EmbeddingPart]


def part_name(number: int) -> str:
    """The file of part `number`; names sort as numbers do."""
    return f"part-{number:06d}.parquet"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_Model = TypeVar("_Model", EmbeddingJob, EmbeddingManifest)


def read_job(folder: Path) -> EmbeddingJob | None:
    """What is embedded into a folder; None if nothing says so.

    Raises:
        UsageError: the file is damaged.
    """
    return _read(folder / JOB_FILE, EmbeddingJob)


def read_manifest(folder: Path) -> EmbeddingManifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        UsageError: it is damaged.
    """
    return _read(folder / MANIFEST_FILE, EmbeddingManifest)


def _read(path: Path, model: type[_Model]) -> _Model | None:
    if not path.exists():
        return None
    try:
        return model.model_validate(read_object(path, _MOST_BYTES))
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_problem(error)}; embed anew") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; embed anew") from None


def finished_parts(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder in their order, and what made them.

    Of a folder that `dist-dml embed` wrote, those of its manifest, compared by size; of any other,
    all `*.parquet` files that begin neither with a dot nor with an underscore, in the order of
    their names.

    Raises:
        UsageError: nothing is there, the embedding has not come to its end, or parts are missing.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if read_job(folder) is not None:
            raise UsageError(
                f"{folder} is unfinished: `dist-dml embed` has not come to its end; start it again "
                "with the same words, it keeps the parts that are there"
            )
        names = sorted(path for path in folder.glob("*.parquet") if path.name[0] not in "._")
        if not names:
            raise UsageError(f"{folder} holds no *.parquet files; name a file or a folder of parts")
        return names, {}
    for part in manifest.parts:
        path = folder / part.name
        size = path.stat().st_size if path.is_file() else -1
        if size != part.bytes:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise UsageError(
                f"{path} {found}, and {MANIFEST_FILE} says {part.bytes} bytes; copy the folder "
                "again, or embed anew"
            )
    return [folder / part.name for part in manifest.parts], manifest.job.facts
