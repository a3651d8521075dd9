"""Matlab files: what scipy reads, and damage that ends in a message and never in a crash."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.io.matlab import MatlabObject

from dist_dml.data.pack.matlab_files import read_structs, read_texts
from dist_dml.errors import UsageError

FIELDS = ("name", "x", "class")


def cells(values):
    array = np.empty((1, len(values)), object)
    array[0] = values
    return array


def structs(rows):
    array = np.empty((1, len(rows)), [("x", object), ("name", object), ("class", object)])
    for number, row in enumerate(rows):
        array[0, number] = row
    return array


def saved(content, compressed=False):
    stream = io.BytesIO()
    savemat(stream, content, do_compression=compressed)
    return stream.getvalue()


ROWS = [
    (np.uint16(60000), "car_ims/000001.jpg", np.uint8(3)),
    (np.float64(-1.25), "é日本.jpg", np.int8(-3)),
    (np.int64(2**40), "abc", np.float32(0.5)),
    (np.uint32(2**31), "", np.uint64(7)),
]


@pytest.mark.parametrize("compressed", [False, True])
def test_structs_and_texts_are_those_that_scipy_reads(compressed):
    texts = ["AM General Hummer SUV 2000", "a", "Ram C/V Cargo Van Minivan 2012", "été"]
    data = saved({"other": np.eye(3), "rows": structs(ROWS), "texts": cells(texts)}, compressed)
    twin = loadmat(io.BytesIO(data))
    found = read_structs(data, "rows", FIELDS, "file")
    for row, element in zip(found, twin["rows"][0], strict=True):
        assert row["x"] == element["x"].item()
        assert row["class"] == element["class"].item()
        assert row["name"] == (element["name"].item() if element["name"].size else "")
    assert read_texts(data, "texts", "file") == texts
    assert [cell.item() for cell in twin["texts"][0]] == texts
    assert read_structs(data, "rows", ("x",), "file") == [{"x": float(row[0])} for row in ROWS]


def element(kind, content):
    return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)


def big_endian_cells(texts, kind=4, encoding="utf-16-be"):
    def array(number, shape, content):
        flags = element(6, struct.pack(">II", number, 0))
        sizes = element(5, struct.pack(">ii", *shape))
        name = element(1, b"names") if number == 1 else element(1, b"")
        return element(14, flags + sizes + name + content)

    inside = [array(4, (1, len(t)), element(kind, t.encode(encoding))) for t in texts]
    return b"MATLAB".ljust(124) + b"\x01\x00MI" + array(1, (1, len(texts)), b"".join(inside))


def test_files_of_the_other_byte_order_are_read():
    data = big_endian_cells(["Audi", "Ram C/V"])
    assert read_texts(data, "names", "file") == ["Audi", "Ram C/V"]
    assert [cell.item() for cell in loadmat(io.BytesIO(data))["names"][0]] == ["Audi", "Ram C/V"]
    # scipy reads the S with a caron as a backtick.
    assert read_texts(big_endian_cells(["Škoda"]), "names", "file") == ["Škoda"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.eye(2)}, r"rows is missing \(it has: other\)"),
        ({"rows": np.zeros((1, 3))}, "rows is an array of numbers 1x3, expected an array of str"),
        ({"rows": cells(["a"])}, "rows is a cell array 1x1, expected"),
        ({"rows": MatlabObject(structs(ROWS[:1]), "timer")}, "rows is an object 1x1, expected"),
        ({"rows": np.zeros((1, 1), [("x", object)])}, r"rows has no field name \(it has: x\)"),
        ({"rows": structs([(1, "a", np.eye(2))])}, "wrong class in element 1: it is an array of n"),
        ({"rows": structs([ROWS[0], (1, cells(["a"]), 1)])}, "wrong name in element 2: it is a ce"),
    ],
)
def test_what_is_no_array_of_plain_structs_is_refused(content, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_structs(saved(content), "rows", FIELDS, "file")
    assert str(caught.value).startswith("file: its variable rows ")


def test_other_versions_and_other_files_are_refused():
    stream = io.BytesIO()
    savemat(stream, {"rows": np.eye(2)}, format="4")
    for data in (stream.getvalue(), b"", b"\x80\x04cos\nsystem\n" + saved({"rows": np.eye(2)})):
        with pytest.raises(UsageError, match=r"this is no \.mat file of version 5"):
            read_structs(data, "rows", FIELDS, "file")


def test_a_compressed_variable_of_gigabytes_is_refused_before_it_is_held():
    bomb = zlib.compress(struct.pack("<II", 14, 2**27) + bytes(2**27))
    assert len(bomb) < 200_000
    data = saved({})[:128] + struct.pack("<II", 15, len(bomb)) + bomb
    with pytest.raises(UsageError, match="has more than 67,108,864 bytes"):
        read_structs(data, "rows", FIELDS, "file")


def test_claimed_sizes_are_not_believed():
    """2^62 elements are claimed; the content ends after the first."""
    data = bytearray(saved({"rows": structs(ROWS)}))
    place = data.index(struct.pack("<IIii", 5, 8, 1, len(ROWS)))
    data[place + 8 : place + 16] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    with pytest.raises(UsageError, match="is damaged"):
        read_structs(bytes(data), "rows", FIELDS, "file")
    data[place + 8 : place + 16] = struct.pack("<ii", -1, 4)
    with pytest.raises(UsageError, match="damaged dimensions"):
        read_structs(bytes(data), "rows", FIELDS, "file")


@pytest.mark.parametrize("compressed", [False, True])
def test_any_damage_ends_in_one_line(compressed):
    good = saved({"rows": structs(ROWS)}, compressed)
    random = np.random.default_rng(0)
    messages = []
    for _ in range(400):
        data = bytearray(good[: random.integers(128, len(good)) if random.random() < 0.2 else None])
        for place in random.integers(124, len(data), random.integers(1, 9)):
            data[place] = random.integers(256)
        try:
            read_structs(bytes(data), "rows", FIELDS, "file")
        except UsageError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert not any("\n" in message for message in messages)
