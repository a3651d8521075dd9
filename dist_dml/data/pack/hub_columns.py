"""Which columns of a Hugging Face image set hold image and class, and how classes are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dml.data.pack.hub_files import Unit, features_of, schema_of
from dist_dml.errors import UsageError


@dataclass(frozen=True)
class HubColumns:
    """The columns that are used.

    Attributes:
        image: its name; {bytes, path} or bytes.
        label: its name.
        names: names of the classes, by the number that stands for them; empty where labels are
            texts or plain integers.
        others: columns that go to the `.json`: numbers, texts, truth values, times, lists of these.
    """

    image: str
    label: str
    names: tuple[str, ...]
    others: tuple[str, ...]


def choose_columns(handle: Any, path: Path, image: str, label: str) -> HubColumns:
    """The columns of an open file.

    Args:
        handle: see `open_file`.
        path: of the file.
        image: name of the column of images, or "" for the only one.
        label: name of the column of labels, or "" for the only one.

    Raises:
        UsageError: there is no such column, or several that it could be.
    """
    schema = schema_of(handle)
    features = features_of(handle, path)
    types = {name: kind.get("_type") for name, kind in features.items() if isinstance(kind, dict)}
    images = [name for name in schema.names if types.get(name) == "Image"]
    if not images:
        images = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    chosen_image = _one(path, "--image-column", image, images, schema.names)
    labels = [name for name in schema.names if types.get(name) == "ClassLabel"]
    usual = [name for name in ("label", "labels") if name in schema.names]
    if usual and (not labels or usual[0] in labels):
        labels = usual[:1]
    chosen_label = _one(path, "--label-column", label, labels, schema.names)
    names = _class_names(path, chosen_label, features.get(chosen_label))
    others = tuple(
        name
        for name in schema.names
        if name not in (chosen_image, chosen_label) and _is_plain(schema.field(name).type)
    )
    return HubColumns(chosen_image, chosen_label, names, others)


def _one(path: Path, option: str, asked: str, found: Sequence[str], known: Sequence[str]) -> str:
    """The column that was asked for, or the only candidate."""
    if asked:
        found = [asked] if asked in known else []
    if len(found) == 1:
        return found[0]
    what = "several could be it: " + ", ".join(found) if found else "it has " + ", ".join(known)
    missing = f"{asked!r} is no column" if asked else "the column is not clear"
    raise UsageError(f"{path}: {missing} ({what[:160]}); name it with {option}")


def _class_names(path: Path, column: str, feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, Mapping) else None
    if not names:
        return ()
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise UsageError(
            f"{path}: the class names of column {column!r} are not texts; save it again"
        )
    stripped = tuple(name.strip() for name in names)
    if len(set(stripped)) < len(stripped):
        raise UsageError(f"{path}: two classes of column {column!r} have one name; rename one")
    return stripped


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_plain(kind: Any) -> bool:
    """Whether values of a type are facts: no images, no nested records."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return text or number or types.is_boolean(kind) or types.is_temporal(kind)


def label_texts(column: Any, columns: HubColumns, unit: Unit) -> list[str]:
    """The class of each row of a unit, as text.

    Raises:
        UsageError: one has none (-1 where a test set hides them), or a number without name.
    """
    texts = []
    for number, value in enumerate(column.to_pylist()):
        where = f"{unit.file}: row {unit.start + number} of {unit.split}"
        if columns.names:
            if not isinstance(value, int) or not 0 <= value < len(columns.names):
                raise UsageError(
                    f"{where}: label {value} is none of the {len(columns.names)} classes (-1: the "
                    "split hides its labels); leave the split out with --splits train=train"
                )
            texts.append(columns.names[value])
            continue
        plain = isinstance(value, (int, str)) and not isinstance(value, bool)
        if not plain or not str(value).strip():
            raise UsageError(f"{where}: label {value!r:.40}, expected a name or an integer")
        texts.append(str(value).strip())
    return texts
