"""What becomes an index: images of a run's data set, class weights, or anybody's Parquet.

Dimensions: n items of the gallery, D features, C classes with K centres each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64

from dist_dml.checkpoint_manifest import Manifest
from dist_dml.class_store import StoredClasses
from dist_dml.data.index import Index, load_index
from dist_dml.data.opening import open_index
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError
from dist_dml.retrieval.embedding_files import ColumnNames, EmbeddingTable, read_embeddings
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.search_files import METADATA
from dist_dml.search.query_model import QueryModel
from dist_dml.split_embedding import embed_split

_EXPORTED = ColumnNames(embedding="weight", label="name", id="class_id")
"""The columns of `dist-dml classes export`."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """Vectors with labels and ids, the table that search shows, and where images are.

    Attributes:
        embeddings: item i is row i of `table`.
        label_names: by label number.
        table: see `retrieval.search_files.OpenIndex.gallery`.
        rows: what an item is.
        data: the data set with the images; None where nobody knows.
    """

    embeddings: Embeddings
    label_names: Sequence[str]
    table: Any
    rows: Literal["images", "classes"]
    data: Index | None


def gallery_of_split(model: QueryModel, split: str, data_path: str) -> Gallery:
    """A split of the run's data set, embedded by this process; damaged images are left out.

    Raises:
        UsageError: the data set or the split is not there.
        RunError: no image can be read.
    """
    data = open_data(model, data_path)
    progress = ProgressLine("embed", len(data.select(split)), "images")

    def embed(images: Any) -> Any:
        vectors = model.embed(images)
        progress.advance(len(images))
        return vectors

    found = embed_split(embed, data, split, model.config, model.world)
    progress.finish()
    names = data.class_names
    classes, labels = np.unique(found.labels, return_inverse=True)
    label_names = [names[number] for number in classes.tolist()]
    embeddings = Embeddings(found.vectors, labels.astype(np.int64), found.ids)
    table = _table(found.ids.tolist(), label_names, embeddings.labels, found.ids, {})
    return Gallery(embeddings, label_names, table, "images", data)


def gallery_of_classes(checkpoint: Path, manifest: Manifest, data: Index, split: str) -> Gallery:
    """The class weights of a checkpoint, each centre a row of its own; biases are left out.

    An item's image is the first of its class in the training `split`.

    Raises:
        UsageError: the loss has no class weights, or the data set is another one.
    """
    if manifest.plan["fingerprint"] != data.fingerprint:
        raise UsageError(
            f"{data.folder} has fingerprint {data.fingerprint}, and {checkpoint} was trained on "
            f"{manifest.plan['fingerprint']}: its class ids mean other classes; name the data set "
            "as it was with --data"
        )
    stored = StoredClasses.open(checkpoint, manifest)
    key = next((key for key in ("weight", "proxies") if key in stored.layout), None)
    if key is None:
        raise UsageError(
            f"{checkpoint} has no class weights: its loss is one of pairs; leave --classes out and "
            "search its images"
        )
    classes = np.arange(stored.num_classes)
    weights = stored.take(key, classes).float().numpy()
    names = list(data.class_names[: min(data.num_classes, stored.num_classes)])
    names += [f"class {number}" for number in range(len(names), stored.num_classes)]
    return _class_gallery(weights.reshape(len(weights), -1, weights.shape[-1]), names, data, split)


def _class_gallery(
    weights: Float32[np.ndarray, "C K D"], names: Sequence[str], data: Index, split: str
) -> Gallery:
    """Proxies that were never chosen are zeros, and left out."""
    num_classes, centres, _ = weights.shape
    vectors = weights.reshape(num_classes * centres, -1)
    kept = np.flatnonzero(np.abs(vectors).max(axis=1) > 0)
    labels = kept // centres
    first = np.full(num_classes, -1, dtype=np.int64)
    training = data.select(split)
    found, places = np.unique(data.class_id[training], return_index=True)
    inside = found < num_classes
    first[found[inside]] = training[places[inside]]
    metadata = {"centre": (kept % centres).tolist()} if centres > 1 else {}
    embeddings = Embeddings(np.ascontiguousarray(vectors[kept]), labels, kept)
    table = _table(kept.tolist(), names, labels, first[labels], metadata)
    return Gallery(embeddings, names, table, "classes", data)


def gallery_of_table(read: EmbeddingTable, data: Index | None) -> Gallery:
    """Embeddings of a Parquet file.

    Args:
        read: of the file.
        data: the data set that ids are of: its row numbers, or its keys where they are texts.

    Raises:
        UsageError: an id is none of the data set.
    """
    rows = _image_rows(read, data)
    texts = _names_of_labels(read, data, rows)
    table = _table(read.id_values, texts, read.embeddings.labels, rows, read.metadata)
    return Gallery(read.embeddings, texts, table, "images", data)


def gallery_of_exported(path: Path, width: int | None) -> Gallery:
    """Class weights of a Parquet file of `dist-dml classes export`.

    Args:
        path: of the file.
        width: of the embedder, if one is known: cuts weights with several centres a class.

    Raises:
        UsageError: the file cannot be used.
    """
    read = read_embeddings(path, _EXPORTED)
    names = [str(value).lstrip("\0") for value in read.label_values]
    own = read.embeddings
    centres = own.vectors.shape[1] // width if width and own.vectors.shape[1] % width == 0 else 1
    each, number = np.repeat(np.arange(len(own)), centres), np.tile(np.arange(centres), len(own))
    ids = own.ids[each] * centres + number
    embeddings = Embeddings(own.vectors.reshape(len(each), -1), own.labels[each], ids)
    metadata = {"centre": number.tolist()} if centres > 1 else {}
    absent = np.full(len(each), -1, dtype=np.int64)
    table = _table(ids.tolist(), names, embeddings.labels, absent, metadata)
    return Gallery(embeddings, names, table, "classes", None)


def _names_of_labels(
    read: EmbeddingTable, data: Index | None, rows: Int64[np.ndarray, " n"]
) -> list[str]:
    """Labels as they are shown: names, where they are the class ids of the data set."""
    texts = [str(value) for value in read.label_values]
    if data is None or not read.has_ids or isinstance(read.label_values[0], str):
        return texts
    written = np.array(read.label_values, dtype=np.int64)
    if not np.array_equal(written[read.embeddings.labels], data.class_id[rows]):
        return texts
    names = data.class_names
    return [names[class_id] for class_id in written.tolist()]


def _image_rows(read: EmbeddingTable, data: Index | None) -> Int64[np.ndarray, " n"]:
    """Where the image of each row is in the data set; -1 without one."""
    if data is None or not read.has_ids:
        return np.full(len(read), -1, dtype=np.int64)
    if isinstance(read.id_values[0], int):
        rows = read.embeddings.ids
        outside = (rows < 0) | (rows >= len(data))
    else:
        by_key = {data.key(row): row for row in range(len(data))}
        rows = np.array([by_key.get(str(key), -1) for key in read.id_values], dtype=np.int64)
        outside = rows < 0
    if outside.any():
        raise UsageError(
            f"id {read.id_values[int(outside.argmax())]!r:.80} is none of the {len(data)} samples "
            f"of {data.folder}; name with --data the data set whose row numbers or keys the ids "
            "are, or leave it out to search without pictures"
        )
    return rows


def open_data(model: QueryModel, data_path: str) -> Index:
    """The run's data set, at another place if one is given.

    Raises:
        UsageError: it is not there.
    """
    data = model.config.data
    return open_index(data.model_copy(update={"path": data_path}) if data_path else data)


def data_with_fingerprint(model: QueryModel, place: str, fingerprint: str) -> Index | None:
    """The data set at a place, by itself or put together as the run's; None if it is another one.

    Raises:
        UsageError: there is none.
    """
    data = load_index(place)
    if data.fingerprint != fingerprint:
        data = open_data(model, place)
    return data if data.fingerprint == fingerprint else None


def _table(
    ids: Sequence[Any],
    label_names: Sequence[str],
    labels: np.ndarray,
    image_rows: np.ndarray,
    metadata: dict[str, list[Any]],
) -> Any:
    import pyarrow

    kind = pyarrow.int64() if isinstance(ids[0], int) else pyarrow.string()
    # Each name once and its number a row: names of a million images are few.
    names = pyarrow.array(list(label_names), pyarrow.string())
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array(labels), names)
    columns = {
        "id": pyarrow.array(ids, kind),
        "label": texts.cast(pyarrow.string()),
        "image_row": pyarrow.array(image_rows, pyarrow.int64()),
    }
    columns |= {f"{METADATA}{name}": pyarrow.array(values) for name, values in metadata.items()}
    return pyarrow.table(columns)
