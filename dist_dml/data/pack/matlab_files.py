"""Reads struct arrays and lists of texts from Matlab's `.mat` files of version 5, and nothing else.

scipy reads these files too, without running anything in them, but does not survive damage: of 400
copies of a small file with one to eight wrong bytes, ten ended the process with a segmentation
fault and one kept it busy without end (scipy 1.17, 2026-11). A download is not trusted that far.
Here no length is believed, and what is not a struct, a cell, a number or a text is refused.

Format: "MAT-File Format", MathWorks, chapter 1. A file is a header of 128 bytes and *elements*: a
tag with type and length, and the content, filled up to 8 bytes. An array is an element that holds
elements: flags, dimensions, name, content.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_dml.errors import UsageError

Value = float | str
"""What a field of a struct may be: a single number, or a text."""
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMBERS = range(6, 16)
_CLASSES = {3: "an object", 5: "a sparse array", 16: "a function", 17: "an opaque object"}
_FORMATS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
"""Numbers by type of element, as `struct` calls them."""
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MAX_BYTES = 2**26
"""Of a variable: Cars196's 16,185 structs take 7 MB; a compressed one can claim a thousandfold."""


class _Damage(Exception):
    """The file breaks the format, or is not of the part of it that is read here."""


@dataclass(frozen=True)
class _Array:
    """An array of which only the head is read; `content` is what follows its name."""

    kind: int
    dimensions: tuple[int, ...]
    name: str
    content: memoryview

    @property
    def count(self) -> int:
        return math.prod(self.dimensions)


def read_structs(
    data: bytes, variable: str, fields: Sequence[str], where: str
) -> list[dict[str, Value]]:
    """The wanted fields of every element of a struct array, in Matlab's order.

    Takes 5 us a field, 0.5 s for all of Cars196 (2026-11).

    Args:
        data: the file.
        variable: name of the array.
        fields: of its structs; others are skipped.
        where: how messages call the file.

    Raises:
        UsageError: the file is damaged or of another version, or the variable or a field is missing
            or something else.
    """
    try:
        return list(_structs(*_find(data, variable), fields))
    except (_Damage, struct.error, zlib.error, UnicodeDecodeError) as error:
        raise _refusal(where, variable, error) from None


def read_texts(data: bytes, variable: str, where: str) -> list[str]:
    """The texts of a cell array, in Matlab's order.

    Args:
        data: the file.
        variable: name of the array.
        where: how messages call the file.

    Raises:
        UsageError: as `read_structs`.
    """
    try:
        array, order = _find(data, variable)
        if array.kind != _CELL:
            raise _Damage(f"is {_kind(array)}, expected a cell array of texts")
        texts = []
        for number, (cell, _) in enumerate(_arrays(array.content, array.count, order), 1):
            text = _value(cell, order)
            if not isinstance(text, str):
                raise _Damage(f"has a number in cell {number}, expected a text")
            texts.append(text)
        return texts
    except (_Damage, struct.error, zlib.error, UnicodeDecodeError) as error:
        raise _refusal(where, variable, error) from None


def _refusal(where: str, variable: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())
    if not isinstance(error, _Damage):
        reason = f"is damaged ({reason})"
    return UsageError(f"{where}: its variable {variable} {reason}; get the official file")


def _find(data: bytes, variable: str) -> tuple[_Array, str]:
    """The variable of that name, and the file's byte order as `struct` calls it."""
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(data[124:_HEADER])
    if order is None:
        raise _Damage("cannot be read: this is no .mat file of version 5")
    position, names = _HEADER, []
    while position < len(data):
        kind, content, position = _element(memoryview(data), position, order)
        if kind == _COMPRESSED:
            kind, content, _ = _element(_inflated(content), 0, order)
        if kind == _MATRIX:
            array = _array(content, order)
            if array.name == variable:
                return array, order
            names.append(array.name)
    raise _Damage(f"is missing (it has: {', '.join(names)[:80]})")


def _inflated(content: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    data = stream.decompress(content, _MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise _Damage(f"has more than {_MAX_BYTES:,} bytes")
    if not stream.eof:
        raise _Damage("is cut short")
    return memoryview(data)


def _element(data: memoryview, position: int, order: str) -> tuple[int, memoryview, int]:
    """Type and content of the element at `position`, and where the next one starts."""
    word, size = struct.unpack_from(order + "II", data, position)
    start = position + 8
    end = start + (size if word == _COMPRESSED else size + -size % 8)
    if word >> 16:  # Up to four bytes stand in the tag itself, whose first half is then the size.
        word, size, start, end = word & 0xFFFF, word >> 16, position + 4, position + 8
        if size > 4:
            raise _Damage(f"is damaged at byte {position}")
    if start + size > len(data):
        raise _Damage(f"is cut short or damaged at byte {position}")
    return word, data[start : start + size], end


def _array(content: memoryview, order: str) -> _Array:
    """The head of an array."""
    if not len(content):  # Matlab's way to write an empty array.
        return _Array(6, (0, 0), "", content)
    _, flags, position = _element(content, 0, order)
    (bits,) = struct.unpack_from(order + "I", flags)
    _, sizes, position = _element(content, position, order)
    dimensions = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    _, name, position = _element(content, position, order)
    if len(dimensions) > 8 or any(size < 0 for size in dimensions):
        raise _Damage(f"has damaged dimensions {dimensions[:8]}")
    return _Array(bits & 0xFF, dimensions, bytes(name).decode("ascii"), content[position:])


def _arrays(content: memoryview, count: int, order: str) -> Iterator[tuple[_Array, int]]:
    """`count` arrays, one after another, and the numbers of each."""
    position = 0
    for number in range(count):
        kind, inside, position = _element(content, position, order)
        if kind != _MATRIX:
            raise _Damage(f"is damaged: element {number} is of type {kind}, expected an array")
        yield _array(inside, order), number


def _structs(array: _Array, order: str, fields: Sequence[str]) -> Iterator[dict[str, Value]]:
    if array.kind != _STRUCT:
        raise _Damage(f"is {_kind(array)}, expected an array of structs")
    _, length, position = _element(array.content, 0, order)
    (width,) = struct.unpack_from(order + "i", length)
    _, text, position = _element(array.content, position, order)
    if width < 1 or len(text) % width:
        raise _Damage("has damaged names of fields")
    starts = range(0, len(text), width)
    names = [bytes(text[s : s + width]).partition(b"\0")[0].decode("ascii") for s in starts]
    missing = [field for field in fields if field not in names]
    if missing:
        raise _Damage(f"has no field {missing[0]} (it has: {', '.join(names)[:80]})")
    found: dict[str, Value] = {}
    content = array.content[position:]
    for value, number in _arrays(content, array.count * len(names), order):
        name = names[number % len(names)]
        if name in fields:
            try:
                found[name] = _value(value, order)
            except _Damage as error:
                place = number // len(names) + 1
                raise _Damage(f"has a wrong {name} in element {place}: it {error}") from None
        if number % len(names) == len(names) - 1:
            yield found
            found = {}


def _value(array: _Array, order: str) -> Value:
    """A single number or a text."""
    if array.kind == _CHAR:
        return _text(array, order)
    if array.kind not in _NUMBERS or array.count != 1:
        raise _Damage(f"is {_kind(array)}, expected one number or a text")
    kind, content, _ = _element(array.content, 0, order)
    if kind not in _FORMATS:
        raise _Damage(f"is a number of unknown type {kind}")
    return struct.unpack(order + _FORMATS[kind], content)[0]


def _text(array: _Array, order: str) -> str:
    if array.count == 0:
        return ""
    kind, content, _ = _element(array.content, 0, order)
    encoding = _ENCODINGS.get(kind)
    if encoding is None or array.dimensions[:-1] != (1,):
        raise _Damage(f"is {_kind(array)} in type {kind}, expected a text in one row")
    if encoding in ("utf-16", "utf-32"):
        encoding += "-le" if order == "<" else "-be"
    return bytes(content).decode(encoding)


def _kind(array: _Array) -> str:
    shape = "x".join(map(str, array.dimensions))
    names = {_CELL: "a cell array", _STRUCT: "a struct", _CHAR: "a text", **_CLASSES}
    return f"{names.get(array.kind, 'an array of numbers')} {shape}"
