"""What the search page asks for, without the web: facts, neighbours, pictures of the gallery.

Searches go one after the other, and so do reads of pictures: a model and a reader serve one thread.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import cv2
import numpy as np

from dist_dml.data.decode import checked_size, decode_reduced, possible_reduction
from dist_dml.data.faults import BadSample, StorageFault
from dist_dml.data.index import Index
from dist_dml.data.reader import Reader, open_reader
from dist_dml.errors import UsageError
from dist_dml.retrieval.search_files import OpenIndex
from dist_dml.search.answers import UNITS, neighbours_of
from dist_dml.search.gallery import data_with_fingerprint
from dist_dml.search.query_model import QueryModel

THUMBNAIL_SIDE = 224
MOST_NEIGHBOURS = 200


class NotFound(Exception):
    """There is no such item, or no picture of it."""


class SearchService:
    """An index, the model that embeds queries, and the gallery's pictures where they are.

    Args:
        opened: the index.
        model: of the checkpoint it was built with.
        data: the data set of its images, if that is there.
    """

    def __init__(self, opened: OpenIndex, model: QueryModel, data: Index | None) -> None:
        self._opened, self._model, self._data = opened, model, data
        self._image_rows = opened.image_rows()
        self._searching, self._reading = threading.Lock(), threading.Lock()
        self._reader: Reader | None = None
        if data is not None:
            config = model.config.data
            self._reader = open_reader(data, 3, config.storage)

    def facts(self) -> dict[str, Any]:
        """What the index is, for the page's head."""
        facts = self._opened.facts
        return {
            "name": self._opened.folder.resolve().name,
            "kind": facts.kind,
            "distance": facts.distance,
            "unit": UNITS[facts.distance],
            "rows": facts.rows,
            "count": facts.count,
            "width": facts.width,
            "recall": facts.recall,
            "threshold": facts.threshold,
            "threshold_from": facts.threshold_from,
            "has_images": self._data is not None,
            "input_side": self._model.config.data.image.size,
            "most_neighbours": MOST_NEIGHBOURS,
        }

    def search_image(self, data: bytes, k: int) -> dict[str, Any]:
        """The neighbours of an encoded image.

        Raises:
            BadSample: it is none.
            UsageError: k is outside 1..200.
        """
        if not 1 <= k <= MOST_NEIGHBOURS:
            raise UsageError(f"k={k} is outside 1..{MOST_NEIGHBOURS}")
        with self._searching:
            start = time.perf_counter()
            vectors = self._model.embed_images([data])
            embedded = time.perf_counter()
            (found,) = neighbours_of(self._opened, vectors, k)
            searched = time.perf_counter()
        return {
            "distance": self._opened.facts.distance,
            "threshold": self._opened.facts.threshold,
            "milliseconds": {
                "embed": 1000 * (embedded - start),
                "search": 1000 * (searched - embedded),
            },
            "neighbours": found,
        }

    def search_item(self, text: str, k: int) -> dict[str, Any]:
        """The neighbours of the picture of a gallery item, itself among them.

        Raises:
            NotFound: there is no such item, or no picture of it.
            UsageError: k is outside 1..200.
        """
        data = self._stored(self._position(text))
        try:
            return self.search_image(data, k)
        except BadSample as error:
            raise NotFound(f"the picture of {text:.80} is damaged: {error.reason}") from None

    def sample(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Some items that have a picture, drawn by `seed`."""
        have = np.flatnonzero(self._image_rows >= 0) if self._data is not None else np.zeros(0, int)
        chosen = np.random.default_rng(seed).permutation(have)[:count]
        return [self._opened.item(int(position)) for position in chosen]

    def thumbnail(self, text: str) -> bytes:
        """The picture of a gallery item as JPEG, its longer side at most 224 pixels.

        Pictures that are small already are sent as PNG, pixel by pixel.

        Raises:
            NotFound: there is no such item, or no picture of it.
        """
        data = self._stored(self._position(text))
        try:
            height, width = checked_size(data)
            side = max(height, width)
            least = min(height, width) * min(1.0, THUMBNAIL_SIDE / side)
            reduction = possible_reduction(data, (height, width), (height, width), least)
            pixels, _ = decode_reduced(data, 3, (height, width), reduction)
        except BadSample as error:
            raise NotFound(f"the picture of {text:.80} is damaged: {error.reason}") from None
        is_small = side <= THUMBNAIL_SIDE
        if not is_small:
            size = [max(1, round(length * THUMBNAIL_SIDE / side)) for length in (width, height)]
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".png" if is_small else ".jpg", pixels[:, :, ::-1])[1]
        return encoded.tobytes()

    def _position(self, text: str) -> int:
        position = self._opened.position_of(text)
        if position is None:
            raise NotFound(f"the gallery has no item with the id {text:.80}")
        return position

    def _stored(self, position: int) -> bytes:
        """The encoded picture of an item, as the data set has it."""
        row = int(self._image_rows[position])
        if self._data is None or self._reader is None or row < 0:
            raise NotFound("there is no picture of this item: the gallery's images are not here")
        columns = (self._data.shard, self._data.offset, self._data.size, self._data.checksum)
        try:
            with self._reading:
                return self._reader.checked_bytes(*(int(column[row]) for column in columns))
        except (BadSample, StorageFault) as error:
            raise NotFound(f"the picture of this item cannot be read: {error}") from None


def images_of(opened: OpenIndex, model: QueryModel, data_path: str) -> tuple[Index | None, str]:
    """The data set with the gallery's images, or None and why there is none.

    Args:
        opened: the index.
        model: of its checkpoint, whose configuration says how the data set is put together.
        data_path: where it is now; empty: where the index says.

    Raises:
        UsageError: `data_path` is given and is not that data set.
    """
    stated = opened.facts.images
    if stated is None:
        return None, "the index does not say where its images are"
    place = data_path or opened.place(stated.path)
    try:
        data = data_with_fingerprint(model, place, stated.fingerprint)
        if data is None:
            raise UsageError(
                f"{place} is another data set than the index was built of (fingerprint "
                f"{stated.fingerprint}); name that one with --data"
            )
    except UsageError as error:
        if data_path:
            raise
        return None, str(error)
    if int(opened.image_rows().max()) >= len(data):
        raise UsageError(f"{opened.folder} names images beyond the {len(data)} of {place}")
    return data, ""
