"""Whatever the files of an index hold: the data set, or one line that says what is wrong with it.

Hypothesis draws the same examples in every run.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fuzzing import FUZZED
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dist_dml.cli import main
from dist_dml.config_loading import resolve
from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.opening import open_index, open_plan
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import RunError, UsageError

FILES = ["index.parquet", "classes.parquet", "dataset.json"]
WORDS = ("data.path", "shard", "quarantine.parquet", "data.batch_size", "index.parquet")
"""One of these is in each line: the key, or the file."""


@pytest.fixture(scope="module")
def whole(divisible: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a small data set, with the sidecars of its shards."""
    folder = tmp_path_factory.mktemp("fuzzed") / "whole"
    shutil.copytree(divisible.folder, folder)
    build_index(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """What is damaged must not ask for memory without end: 8 GiB beyond what is mapped already."""
    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@contextlib.contextmanager
def damaged(whole: Path) -> Iterator[Path]:
    """A copy to damage, whose tars are the same."""
    folder = whole.with_name("damaged")
    shutil.copytree(whole, folder, copy_function=shutil.copy2)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def check_line(line: str, folder: Path) -> None:
    assert len(line.splitlines()) == 1, line
    assert len(line) < 1500, line
    assert any(word in line for word in WORDS) or str(folder) in line, line


def use(folder: Path) -> None:
    """Open a data set as a training does, draw batches, and read some images of each split."""
    config = resolve(None, [f"data.path={folder}", "data.batch_size=3"]).config
    try:
        index = open_index(config.data)
        index.check_labels("train", index.num_classes)
        plan = open_plan(index, config.data, 1, 0)
        index.class_counts("train", index.num_classes)
        reader = open_reader(index, 3)
        for sample_id in (*plan.global_batch(0).tolist(), len(index) - 1):
            assert 0 <= int(index.class_id[sample_id]) < len(index.class_names)
            assert read_image(index, reader, sample_id).shape == (4, 4, 3)
            assert isinstance(index.key(sample_id), str)
    except (UsageError, RunError) as error:
        check_line(str(error), folder)


def command(*words: str) -> None:
    """Run a command of `dist-dml`: it ends with an exit code, and with a line where it failed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code in (0, 1, 2)
    said = [line for line in err.getvalue().splitlines() if line.startswith("dist_dml: error: ")]
    assert bool(said) == (code == 2) or code == 1, err.getvalue()
    for line in said:
        check_line(line, Path(words[-1]))


def flip(content: bytes, places: list[tuple[int, int]]) -> bytes:
    """Change some bytes; places count from the end if they are negative."""
    changed = bytearray(content)
    for place, bits in places:
        changed[place % len(changed)] ^= bits
    return bytes(changed)


places = st.lists(
    st.tuples(st.integers(0, 10**4) | st.integers(-400, -1), st.integers(1, 255)),
    min_size=1,
    max_size=3,
)


@settings(FUZZED, max_examples=100)
@given(name=st.sampled_from(FILES), places=places)
def test_flipped_bits_are_harmless_or_said(
    whole: Path, name: str, places: list[tuple[int, int]]
) -> None:
    with damaged(whole) as folder:
        (folder / name).write_bytes(flip((folder / name).read_bytes(), places))
        use(folder)


@settings(FUZZED, max_examples=50)
@given(name=st.sampled_from(FILES), share=st.floats(0, 1), tail=st.binary(max_size=20))
def test_files_that_were_cut_are_said(whole: Path, name: str, share: float, tail: bytes) -> None:
    with damaged(whole) as folder:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))] + tail)
        use(folder)


numbers = st.sampled_from(
    [-(2**31), -129, -1, 0, 1, 6, 127, 128, 511, 512, 2**31 - 1, 2**62, -(2**63)]
)
KINDS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()),
    *(pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(), pa.binary()),
    *(pa.date32(), pa.timestamp("ns"), pa.decimal128(20, 2), pa.null(), pa.list_(pa.int64())),
    pa.dictionary(pa.int32(), pa.string()),
]


def put_value(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    """Another value in a row, as far as the column's type holds it."""
    column = table[name].to_pylist()
    if isinstance(value, int) and not isinstance(column[0], int):
        value = str(value)
    with contextlib.suppress(OverflowError, pa.ArrowInvalid):
        column[row % len(column)] = value
        return table.set_column(
            table.schema.get_field_index(name), name, pa.array(column, table[name].type)
        )
    return table


def put_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    """The column as another type; of nothing but missing values where there is no cast."""
    at = table.schema.get_field_index(name)
    try:
        return table.set_column(at, name, table[name].cast(kind, safe=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return table.set_column(at, name, pa.nulls(len(table), kind))


def put_bytes(table: pa.Table, name: str, row: int) -> pa.Table:
    """A text that is not UTF-8."""
    column = [str(value).encode() for value in table[name].to_pylist()]
    column[row % len(column)] = b"\xff\xfe\xc3("
    texts = pa.array(column, pa.binary()).view(pa.string())
    return table.set_column(table.schema.get_field_index(name), name, texts)


NAMES = {
    "index.parquet": [
        *("key", "split", "class_id", "shard", "offset", "size", "extension", "checksum"),
        *("width", "height", "cls_offset", "json_size"),
    ],
    "classes.parquet": ["class_id", "name", "split", "num_samples"],
}
CHANGES: dict[str, Callable[..., pa.Table]] = {
    "value": lambda table, name, row, number, kind: put_value(table, name, row, number),
    "no value": lambda table, name, row, number, kind: put_value(table, name, row, None),
    "type": lambda table, name, row, number, kind: put_type(table, name, kind),
    "bytes": lambda table, name, row, number, kind: put_bytes(table, name, row),
    "gone": lambda table, name, row, number, kind: table.drop_columns([name]),
    "renamed": lambda table, name, row, number, kind: table.rename_columns(
        [f"{column}_" if column == name else column for column in table.column_names]
    ),
    "twice": lambda table, name, row, number, kind: table.append_column(name, table[name]),
    "fewer rows": lambda table, name, row, number, kind: table.slice(0, row),
    "more rows": lambda table, name, row, number, kind: pa.concat_tables([table, table]),
    "other order": lambda table, name, row, number, kind: table.take(
        np.random.default_rng(row).permutation(len(table))
    ),
    "stamp": lambda table, name, row, number, kind: table.replace_schema_metadata(
        {"fingerprint": b"\xff" * (abs(number) % 100), "layout": "a\nb", b"\xff": b"\x00"}
    ),
}


@settings(FUZZED, max_examples=160)
@given(
    file_and_name=st.sampled_from([(file, name) for file in NAMES for name in NAMES[file]]),
    change=st.sampled_from(sorted(CHANGES)),
    row=st.integers(0, 12),
    number=numbers,
    kind=st.sampled_from(KINDS),
)
def test_other_columns_are_harmless_or_said(
    whole: Path,
    file_and_name: tuple[str, str],
    change: str,
    row: int,
    number: int,
    kind: pa.DataType,
) -> None:
    file, name = file_and_name
    with damaged(whole) as folder:
        table = parquet.read_table(folder / file)
        # The stamp stays, unless it is what is changed: the inner checks are what is tested.
        parquet.write_table(CHANGES[change](table, name, row, number, kind), folder / file)
        use(folder)
        if file == "index.parquet":
            command("verify", "--processes", "1", str(folder))


def paths_in(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON tree."""
    found = [path] if path else []
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += paths_in(value, (*path, key))
    return found


STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**62, 2**70, 1.5, float("nan"), float("inf"), "", "a", "..", "\0"),
    *("\ud800", "train", "train-000000.tar", "/dev/zero", "/", "a\nb", [], [[]], {}, {"": 1}, [1]),
    json.loads("[" * 400 + "]" * 400),
    "x" * 3000,
]


@settings(FUZZED, max_examples=160)
@given(
    at=st.integers(0, 200),
    action=st.sampled_from(["set", "set", "set", "remove", "add", "repeat"]),
    value=st.sampled_from(STRANGE),
)
def test_other_metadata_are_harmless_or_said(whole: Path, at: int, action: str, value: Any) -> None:
    with damaged(whole) as folder:
        tree = json.loads((folder / "dataset.json").read_text())
        every = paths_in(tree)
        *above, last = every[at % len(every)]
        place = tree
        for key in above:
            place = place[key]
        if action == "set":
            place[last] = value
        elif action == "remove":
            del place[last]
        elif isinstance(place, list):
            place.append(value if action == "add" else place[last])
        else:
            place["added"] = value
        text = json.dumps(tree)
        if action == "repeat":
            text = text.replace('"num_samples"', '"num_classes"')
        (folder / "dataset.json").write_text(text)
        use(folder)
        command("verify", "--processes", "1", str(folder))


@settings(FUZZED, max_examples=50)
@given(
    which=st.integers(0, 2),
    change=st.sampled_from([*sorted(CHANGES), "flipped"]),
    name=st.sampled_from(["key", "label", "offset", "size", "extension", "checksum", "cls_offset"]),
    row=st.integers(0, 7),
    number=numbers,
    kind=st.sampled_from(KINDS),
    places=places,
)
def test_sidecars_are_used_or_made_again(
    whole: Path,
    which: int,
    change: str,
    name: str,
    row: int,
    number: int,
    kind: pa.DataType,
    places: list[tuple[int, int]],
) -> None:
    with damaged(whole) as folder:
        path = sorted((folder / "sidecars").iterdir())[which]
        if change == "flipped":
            path.write_bytes(flip(path.read_bytes(), places))
        else:
            table = parquet.read_table(path)
            parquet.write_table(CHANGES[change](table, name, row, number, kind), path)
        command("index", str(folder))
        use(folder)


@settings(FUZZED, max_examples=30)
@given(content=st.binary(max_size=30), number=numbers, kind=st.sampled_from([*KINDS, None]))
def test_quarantines_are_used_or_refused(
    whole: Path, content: bytes, number: int, kind: pa.DataType | None
) -> None:
    with damaged(whole) as folder:
        path = folder / "quarantine.parquet"
        path.write_bytes(content)
        if kind is not None:
            stated = json.loads((folder / "dataset.json").read_text())["fingerprint"]
            table = put_type(pa.table({"sample_id": [0, number]}), "sample_id", kind)
            parquet.write_table(table.replace_schema_metadata({"fingerprint": stated}), path)
        use(folder)
        command("verify", "--processes", "1", str(folder))
