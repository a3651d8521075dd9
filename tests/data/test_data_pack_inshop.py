"""In-Shop Clothes Retrieval in its official layout: training, query and gallery."""

from __future__ import annotations

import argparse
import shutil
from functools import partial

import pytest
import simplejpeg
from test_data_pack_cub import described, replace, tars
from tiny_images import image_of

from dist_dml.data.pack import inshop as inshop_module
from dist_dml.data.pack.inshop import pack_inshop
from dist_dml.errors import UsageError

ITEMS = {1: ("query", "gallery", "gallery"), 2: ("train",) * 3, 7982: ("query", "gallery")}
pack_one = partial(pack_inshop, processes=1)


def write_list(path, header, rows):
    """A count, a header and rows padded with blanks, as the official lists are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [f"{row[0]:<70} " + "  ".join(map(str, row[1:])) + " " for row in rows]
    path.write_text("\n".join([str(len(rows)), header, *body]) + "\n")


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "In-shop Clothes Retrieval Benchmark"
    rows, boxes = [], []
    for item, statuses in ITEMS.items():
        for view, status in enumerate(statuses, 1):
            path = f"img/WOMEN/Dresses/id_{item:08d}/{view:02d}_{view}_front.jpg"
            file = root / "Img" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(simplejpeg.encode_jpeg(image_of(len(rows))))
            rows.append((path, f"id_{item:08d}", status))
            boxes.append((path, 3, view, 2, 4, 12, 10 + view))
    write_list(
        root / "Eval" / "list_eval_partition.txt", "image_name item_id evaluation_status", rows
    )
    write_list(
        root / "Anno" / "list_bbox_inshop.txt",
        "image_name clothes_type pose_type x_1 y_1 x_2 y_2",
        boxes,
    )
    return root


def test_items_are_trained_on_or_searched_and_queries_have_a_gallery(source, tmp_path):
    index = pack_one(source, tmp_path / "out")
    assert {name: len(index.select(name)) for name in index.split_names} == {
        "train": 3,
        "query": 2,
        "gallery": 3,
    }
    classes = {name: set(index.class_id[index.select(name)]) for name in index.split_names}
    assert classes["query"] == classes["gallery"] == {1, 2}
    assert classes["train"] == {0}
    assert index.class_names == ("id_00000002", "id_00000001", "id_00007982")
    assert index.num_classes == 1


def test_types_and_boxes_are_kept(source, tmp_path):
    rows = described(pack_one(source, tmp_path / "out"))
    key = "img/WOMEN/Dresses/id_00000001/02_2_front"
    assert rows[key] == {
        "label": "id_00000001",
        "file": f"{key}.jpg",
        "item_id": "id_00000001",
        "clothes_type": 3,
        "pose_type": 2,
        "box": [2.0, 4.0, 10.0, 8.0],
    }
    assert len(rows) == 8
    small = described(pack_one(source, tmp_path / "small", resize=10))
    assert small[key]["box"] == [1.0, 2.0, 5.0, 4.0]


def test_the_official_image_zip_need_not_be_extracted(source, tmp_path):
    first = pack_one(source, tmp_path / "a")
    shutil.make_archive(str(source / "Img" / "img"), "zip", source / "Img", "img")
    shutil.rmtree(source / "Img" / "img")
    assert pack_one(source, tmp_path / "b").fingerprint == first.fingerprint
    (source / "Img" / "img.zip").rename(source / "img.zip")
    assert pack_one(source, tmp_path / "c").fingerprint == first.fingerprint
    assert not (source / "img").exists()


def test_images_may_lie_beside_the_lists_or_all_in_one_zip(source, tmp_path):
    first = pack_one(source, tmp_path / "a")
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", source.parent, source.name)
    assert pack_one(archive, tmp_path / "b").fingerprint == first.fingerprint
    (source / "Img" / "img").rename(source / "img")
    assert pack_one(source, tmp_path / "c").fingerprint == first.fingerprint


def test_a_second_run_writes_nothing(source, tmp_path):
    first = pack_one(source, tmp_path / "out", shard_samples=2)
    written = tars(tmp_path / "out")
    assert set(written) >= {"query-000000.tar", "gallery-000001.tar", "train-000001.tar"}
    assert pack_one(source, tmp_path / "out", shard_samples=2).fingerprint == first.fingerprint
    assert tars(tmp_path / "out") == written


def test_an_item_that_is_trained_on_and_searched_is_refused(source, tmp_path):
    lists = source / "Eval" / "list_eval_partition.txt"
    lists.write_text(lists.read_text().replace("train", "gallery", 1))
    with pytest.raises(UsageError, match=r"class 'id_00000002' is in train \(.*\) and in gallery"):
        pack_one(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_query_without_gallery_is_noted(source, tmp_path, capsys):
    replace(
        source / "Eval" / "list_eval_partition.txt", "id_00007982  gallery", "id_00007982  query"
    )
    pack_one(source, tmp_path / "out")
    assert "1 query items are not in the gallery (id_00007982)" in capsys.readouterr().err


def test_a_list_that_was_cut_short_is_refused(source, tmp_path):
    path = source / "Eval" / "list_eval_partition.txt"
    path.write_text("\n".join(path.read_text().split("\n")[:-3]) + "\n")
    with pytest.raises(
        UsageError, match=r"its first line says 8 and 6 rows follow; it is cut short"
    ):
        pack_one(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "evaluation_status",
            "status",
            r"line 2: is 'image_name item_id status', expected the head",
        ),
        (
            "id_00000001  query",
            "id_00000001  test",
            r"line 3: status 'test', expected train, query",
        ),
        ("id_00000001  query", "query", r"line 3: has 2 columns, expected 'image_name item_id"),
    ],
)
def test_a_damaged_row_is_refused_with_its_line(source, tmp_path, old, new, message):
    replace(source / "Eval" / "list_eval_partition.txt", old, new)
    with pytest.raises(UsageError, match=message):
        pack_one(source, tmp_path / "out")


def test_boxes_are_not_needed(source, tmp_path, capsys):
    shutil.rmtree(source / "Anno")
    rows = described(pack_one(source, tmp_path / "out"))
    assert not any("box" in row or "pose_type" in row for row in rows.values())
    assert "list_bbox_inshop.txt: no such file" in capsys.readouterr().err


def test_a_wrong_layout_and_missing_files_are_named(source, tmp_path):
    with pytest.raises(UsageError, match=r"holds no Eval/list_eval_partition\.txt.*expected Eval/"):
        pack_one(source / "Img", tmp_path / "out")
    lost = sorted(source.rglob("*.jpg"))[0]
    lost.unlink()
    with pytest.raises(UsageError, match=rf"{lost.name}: missing or empty, as 1 of the 8 listed"):
        pack_one(source, tmp_path / "out")
    (source / "Img" / "img").rename(source / "Img" / "img_highres")
    with pytest.raises(UsageError, match=r"Img/img: no such folder \(img_highres is another data"):
        pack_one(source, tmp_path / "out")


def test_counts_are_noted_and_strictly_refused(source, tmp_path, capsys):
    pack_one(source, tmp_path / "out")
    noted = capsys.readouterr().err
    for text in ("train has 3 images of 1 classes (published 25,882 of 3,997)", "14,218 of 3,985"):
        assert text in noted
    with pytest.raises(UsageError, match=r"gallery has 3 images of 2 classes \(published 12,612"):
        pack_one(source, tmp_path / "strict", strict_counts=True)


def test_the_command_packs_and_reports(source, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    inshop_module.add_arguments(parser)
    arguments = parser.parse_args([str(source), str(tmp_path / "out"), "--processes", "1"])
    assert inshop_module.run(arguments) == 0
    assert "8 samples (gallery 3, query 2, train 3)" in capsys.readouterr().out
