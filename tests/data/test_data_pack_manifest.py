"""A manifest's rows become samples: files and URLs, any label, every other column, no hang."""

from __future__ import annotations

import csv
import datetime
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_images import image_of, png

from dist_dml.data.pack.folder import pack_folder
from dist_dml.data.pack.manifest import Division, pack_manifest
from dist_dml.data.pack.manifest_rows import ManifestColumns
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import RunError, UsageError

WHOLE = Division(test_fraction=0.0, seen_per_class=0)


def save_images(root, count: int) -> list[str]:
    names = []
    for number in range(count):
        path = root / "images" / f"{number % 4}" / f"img.{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image_of(number)))
        names.append(str(path.relative_to(root)))
    return names


def write_csv(path, rows: list[dict], delimiter: str = ","):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def listed(tmp_path):
    """24 images of four classes with a comma, a quote and a line break in a column."""
    (tmp_path / "src").mkdir()
    names = save_images(tmp_path / "src", 24)
    rows = [
        {"path": name, "label": f"class {n % 4}", "note": f'a, "b"\nü {n}', "n": n}
        for n, name in enumerate(names)
    ]
    return tmp_path / "src", rows


def pack_one(src, out, **options):
    return pack_manifest(src, out, processes=1, **options)


def described(folder) -> dict[str, dict]:
    """The `.json` of every sample, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found[member.name.removesuffix(".json")] = json.loads(stream.read())
    return found


def stored(index) -> dict[int, tuple[str, bytes]]:
    found = {}
    for row in range(len(index)):
        shard = index.shard_path(int(index.shard[row])).read_bytes()
        data = shard[index.offset[row] :][: index.size[row]]
        found[int(index.key(row))] = (index.class_names[index.class_id[row]], data)
    return found


def refusal(call, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_row_is_a_sample_with_its_label_bytes_and_other_columns(listed, tmp_path):
    root, rows = listed
    index = pack_one(write_csv(root / "all.csv", rows), tmp_path / "out", division=WHOLE)
    assert stored(index) == {n: (f"class {n % 4}", png(image_of(n))) for n in range(24)}
    facts = described(tmp_path / "out")
    assert facts["000000007"] == {
        "note": 'a, "b"\nü 7',
        "n": "7",
        "label": "class 3",
        "file": "images/3/img.7.png",
        "row": 7,
    }
    assert read_image(index, open_reader(index, 3), 0).shape == (20, 24, 3)


def test_tsv_and_parquet_give_the_same_images(listed, tmp_path):
    root, rows = listed
    plain = [{"path": row["path"], "label": row["label"]} for row in rows]
    first = stored(pack_one(write_csv(root / "a.csv", plain), tmp_path / "a"))
    tsv = write_csv(root / "b.tsv", plain, "\t")
    assert stored(pack_one(tsv, tmp_path / "b")) == first
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), root / "c.parquet")
    assert stored(pack_one(root / "c.parquet", tmp_path / "c")) == first


def test_parquet_keeps_the_types_of_other_columns(listed, tmp_path):
    root, rows = listed
    day = datetime.date(2026, 11, 1)
    table = [
        {"path": r["path"], "label": n % 3, "x": n / 2, "tags": ["a", "b"], "day": day, "url": "u"}
        for n, r in enumerate(rows)
    ]
    table[5]["x"] = float("nan")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / "a.parquet")
    index = pack_one(root / "a.parquet", tmp_path / "out", division=WHOLE)
    assert index.class_names == ("0", "1", "2")
    facts = described(tmp_path / "out")
    assert facts["000000003"] == {
        "x": 1.5,
        "tags": ["a", "b"],
        "day": "2026-11-01",
        "url_": "u",
        "label": "0",
        "file": rows[3]["path"],
        "row": 3,
    }
    assert facts["000000005"]["x"] is None


def test_classes_are_divided_as_the_folder_packer_divides_them(tmp_path):
    for number in range(60):
        folder = tmp_path / "tree" / f"class {number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(png(image_of(number)))
    rows = [
        {"path": f"{path.parent.name}/{path.name}", "label": path.parent.name}
        for path in sorted((tmp_path / "tree").rglob("*.png"))
    ]
    path = write_csv(tmp_path / "tree.csv", rows)
    options = {"seed": 3, "test_fraction": 0.4, "seen_per_class": 2}
    ours = pack_one(path, tmp_path / "a", division=Division(**options), root=tmp_path / "tree")
    theirs = pack_folder(tmp_path / "tree", tmp_path / "b", processes=1, **options)
    assert ours.class_names == theirs.class_names
    for name in ("split", "class_id", "size", "checksum"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_column_of_splits_decides_and_shared_classes_are_refused(listed, tmp_path):
    root, rows = listed
    for n, row in enumerate(rows):
        row["split"] = "Test" if n % 4 == 3 else ("seen" if n > 20 else "train")
    index = pack_one(write_csv(root / "a.csv", rows), tmp_path / "a")
    assert index.metadata["samples_per_split"] == {"seen": 2, "test": 6, "train": 16}
    assert index.num_classes == 3
    rows[0]["split"] = "test"
    path = write_csv(root / "b.csv", rows)
    message = refusal(lambda: pack_one(path, tmp_path / "b"))
    assert "class 'class 0' is in train and in test (1 such classes of its 2)" in message
    rows[0]["split"], rows[23]["split"] = "train", "seen"
    message = refusal(lambda: pack_one(write_csv(root / "c.csv", rows), tmp_path / "c"))
    assert "split seen has class 'class 3', which is not in train" in message


def test_splits_can_be_chosen_and_renamed(listed, tmp_path):
    root, rows = listed
    for n, row in enumerate(rows):
        row["part"] = ("training", "test", "extra")[n % 3]
    path = write_csv(root / "a.csv", rows)
    columns = ManifestColumns(split="part")
    division = Division(splits="training=train, test=seen")
    index = pack_one(path, tmp_path / "a", division=division, columns=columns)
    assert index.metadata["samples_per_split"] == {"seen": 8, "train": 8}
    for splits, expected in (
        ("training", "not of the form theirs=ours"),
        ("training=Train!", "not of the form theirs=ours"),
        ("validation=val", "has no split 'validation'; it has training, test, extra"),
        ("training=train,test=train", "repeats a name"),
    ):
        message = refusal(
            lambda s=splits: pack_one(
                path, tmp_path / "b", division=Division(splits=s), columns=columns
            )
        )
        assert expected in message


def test_columns_have_the_names_that_are_given(listed, tmp_path):
    root, rows = listed
    named = [{"file name": r["path"], "species": r["label"], "label": "no"} for r in rows]
    path = write_csv(root / "a.csv", named)
    message = refusal(lambda: pack_one(path, tmp_path / "out"))
    assert "has no column 'path' (it has file name, species, label); name it with --path" in message
    columns = ManifestColumns(path="file name", label="species")
    pack_one(path, tmp_path / "out", columns=columns, division=WHOLE)
    assert described(tmp_path / "out")["000000001"]["label"] == "class 1"
    assert described(tmp_path / "out")["000000001"]["label_"] == "no"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"path": "../outside.png"}, "leads out of"),
        ({"path": "/etc/passwd"}, "leads out of"),
        ({"path": "images/../../outside.png"}, "leads out of"),
        ({"path": ""}, "expected a path or a URL"),
        ({"path": "a\0b.png"}, "expected a path or a URL"),
        ({"path": "s3://bucket/x.png"}, "only http:// and https:// are fetched"),
        ({"path": "file:///etc/passwd"}, "only http:// and https:// are fetched"),
        ({"label": " "}, "expected a name or an integer"),
    ],
)
def test_odd_rows_are_refused_with_their_line(listed, tmp_path, change, expected):
    root, rows = listed
    rows[1] |= change
    plain = [{"path": row["path"], "label": row["label"]} for row in rows]
    path = write_csv(root / "a.csv", plain)
    message = refusal(lambda: pack_one(path, tmp_path / "out"))
    assert expected in message
    assert "a.csv line 3" in message
    assert not (tmp_path / "out").exists()


def test_paths_lead_outside_only_where_that_is_allowed(listed, tmp_path):
    root, rows = listed
    plain = [{"path": row["path"], "label": row["label"]} for row in rows[:8]]
    plain[0]["path"] = str((root / plain[0]["path"]).resolve())
    (tmp_path / "lists").mkdir()
    plain[1]["path"] = "../src/" + plain[1]["path"]
    for row in plain[2:]:
        row["path"] = str(root / row["path"])
    path = write_csv(tmp_path / "lists" / "a.csv", plain)
    assert "--anywhere" in refusal(lambda: pack_one(path, tmp_path / "out"))
    index = pack_one(path, tmp_path / "out", anywhere=True, division=WHOLE)
    assert stored(index) == {n: (f"class {n % 4}", png(image_of(n))) for n in range(8)}


def test_a_missing_file_is_named_or_left_out_and_text_is_no_image(listed, tmp_path, capsys):
    root, rows = listed
    path = write_csv(root / "a.csv", rows)
    (root / rows[2]["path"]).unlink()
    message = refusal(lambda: pack_one(path, tmp_path / "out"))
    assert rows[2]["path"] in message
    assert "as 1 of the 24 listed images" in message
    index = pack_one(path, tmp_path / "out", division=WHOLE, skip_missing=True)
    assert 2 not in stored(index)
    assert "left out, as 1 images" in capsys.readouterr().err
    (root / rows[3]["path"]).write_text("no image")
    message = refusal(
        lambda: pack_one(path, tmp_path / "b", division=WHOLE, skip_missing=True), RunError
    )
    assert f"{rows[3]['path']}: no JPEG, PNG or WebP image; correct row 3" in message


def test_what_is_no_manifest_is_refused(listed, tmp_path):
    root, rows = listed
    good = write_csv(root / "a.csv", rows).read_text()
    for name, content, expected in (
        ("a.txt", b"path,label\n", "expected a manifest .csv, .tsv or .parquet"),
        ("b.csv", b"path,label\n", "has no row below its header"),
        ("c.csv", b"", "has no row below its header"),
        ("d.csv", b"path,label\nx.png\n", "d.csv line 2: has 1 columns, the header 2"),
        ("e.csv", b"path,path,label\n1,2,3\n", "a column comes twice"),
        ("f.csv", b"path,label\nx.png,\xff\xfe\n", "cannot be read as UTF-8 csv"),
        ("g.csv", b'path,label\n"x.png,a\n', "cannot be read as UTF-8 csv"),
        ("h.parquet", good.encode(), "no readable Parquet file"),
    ):
        (root / name).write_bytes(content)
        assert expected in refusal(lambda n=name: pack_one(root / n, tmp_path / "out"))
    assert "no such file" in refusal(lambda: pack_one(root / "absent.csv", tmp_path / "out"))
    table = [{"path": rows[0]["path"], "label": "a", "data": b"1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / "i.parquet")
    message = refusal(lambda: pack_one(root / "i.parquet", tmp_path / "out"))
    assert "column 'data' holds bytes" in message
    table = [{"path": rows[0]["path"], "label": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / "j.parquet")
    assert "its label is None" in refusal(lambda: pack_one(root / "j.parquet", tmp_path / "out"))


def test_an_interrupted_pack_goes_on_and_a_changed_manifest_is_refused(listed, tmp_path):
    root, rows = listed
    path = write_csv(root / "a.csv", rows)
    first = pack_one(path, tmp_path / "out", division=WHOLE, shard_samples=5)
    tars = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-000001.tar").unlink()
    again = pack_one(path, tmp_path / "out", division=WHOLE, shard_samples=5)
    assert again.fingerprint == first.fingerprint
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")} == tars
    write_csv(path, rows[1:] + rows[:1])
    message = refusal(lambda: pack_one(path, tmp_path / "out", division=WHOLE, shard_samples=5))
    assert "other parameters" in message


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(listed, tmp_path):
    root, rows = listed
    path = write_csv(root / "a.csv", rows)
    first = pack_manifest(path, tmp_path / "a", shard_samples=4, processes=1)
    second = pack_manifest(path, tmp_path / "b", shard_samples=4, processes=2)
    assert second.fingerprint == first.fingerprint
    for tar in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / tar.name).read_bytes() == tar.read_bytes()
