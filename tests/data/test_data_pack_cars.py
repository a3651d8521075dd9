"""Cars196 in its three layouts gives one data set; Matlab files are read without trust."""

from __future__ import annotations

import argparse
import shutil
from functools import partial

import numpy as np
import pytest
import simplejpeg
from scipy.io import savemat
from test_data_pack_cub import described, tars
from tiny_images import image_of

from dist_dml.data.pack import cars as cars_module
from dist_dml.data.pack.cars import pack_cars
from dist_dml.errors import UsageError

NAMES = [f"Maker Model {number} 2012" for number in range(1, 197)]
NAMES[0] = "Ram C/V Cargo Van Minivan 2012"
CLASSES = [1, 98, 99, 196]
pack_one = partial(pack_cars, processes=1)


def rows_of(part):
    """Class, image number and corners: two images of each class in a part."""
    start = 0 if part == "train" else 8
    return [(CLASSES[i // 2], start + i, (2, 4, 12 + i, 10)) for i in range(8)]


def jpeg(number):
    return simplejpeg.encode_jpeg(image_of(number))


def cells(texts):
    array = np.empty((1, len(texts)), object)
    array[0] = texts
    return array


def structs(rows):
    """A 1 x n struct array as the official files have it: small unsigned numbers and texts."""
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for number, row in enumerate(rows):
        values = (np.uint16(v) if not isinstance(v, str) else v for v in row.values())
        array[0, number] = tuple(values)
    return array


def corners(box):
    return dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), box, strict=True))


def classic(root):
    (root / "car_ims").mkdir(parents=True)
    rows = []
    for part in ("test", "train"):
        for class_id, number, box in rows_of(part):
            name = f"car_ims/{len(rows) + 1:06d}.jpg"
            (root / name).write_bytes(jpeg(number))
            test = int(part == "test")
            row = {"relative_im_path": name, **corners(box), "class": class_id, "test": test}
            rows.append(row)
    savemat(root / "cars_annos.mat", {"annotations": structs(rows), "class_names": cells(NAMES)})
    return root


def devkit(root):
    (root / "devkit").mkdir(parents=True)
    for part in ("train", "test"):
        (root / f"cars_{part}").mkdir()
        rows = []
        for i, (class_id, number, box) in enumerate(rows_of(part)):
            name = f"{i + 1:05d}.jpg"
            (root / f"cars_{part}" / name).write_bytes(jpeg(number))
            rows.append({**corners(box), "class": class_id, "fname": name})
        file = "cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        # The official files are compressed.
        savemat(root / "devkit" / file, {"annotations": structs(rows)}, do_compression=True)
        if part == "test":  # The official devkit has these without classes as well.
            bare = [{name: row[name] for name in row if name != "class"} for row in rows]
            savemat(root / "devkit" / "cars_test_annos.mat", {"annotations": structs(bare)})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(NAMES)})
    return root


def by_class(root):
    root.mkdir(parents=True)
    (root / "names.csv").write_text("".join(name + "\n" for name in NAMES))
    for part in ("train", "test"):
        lines = []
        for i, (class_id, number, box) in enumerate(rows_of(part)):
            folder = NAMES[class_id - 1].replace("/", "-")
            path = root / "car_data" / "car_data" / part / folder / f"{i + 1:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
            lines.append(",".join(map(str, (path.name, *box, class_id))) + "\n")
        (root / f"anno_{part}.csv").write_text("".join(lines))
    return root


LAYOUTS = {"classic": classic, "devkit": devkit, "by class": by_class}


@pytest.fixture(params=LAYOUTS)
def source(request, tmp_path):
    return LAYOUTS[request.param](tmp_path / "cars196")


def content(index):
    """What a data set holds, whatever the files were called: split, label, box, part, image."""
    rows = described(index)
    found = []
    for i in range(len(index)):
        row = rows[index.key(i)]
        split = index.split_names[index.split[i]]
        found.append((split, row["label"], *row["box"], row["official_split"], index.checksum[i]))
    return sorted(found)


def test_the_first_98_classes_train_and_both_parts_are_merged(source, tmp_path):
    index = pack_one(source, tmp_path / "out")
    rows = described(index).values()
    for split, labels in (("train", (1, 98)), ("test", (99, 196))):
        found = index.class_id[index.select(split)]
        expected = [f"{number:03d}.{NAMES[number - 1]}" for number in labels]
        assert sorted({index.class_names[c] for c in found}) == expected
        assert np.bincount(found)[found[0]] == 4
    assert sum(row["official_split"] == "train" for row in rows) == 8
    assert {row["class_id"] for row in rows} == set(CLASSES)


def test_the_layouts_give_the_same_samples(tmp_path):
    first, *others = [
        content(pack_one(make(tmp_path / name), tmp_path / f"{name} out"))
        for name, make in LAYOUTS.items()
    ]
    assert len(first) == 16
    assert others == [first, first]
    label = f"001.{NAMES[0]}"
    assert ("train", label, 2.0, 4.0, 10.0, 6.0, "train") in [row[:7] for row in first]


def test_the_split_is_that_of_pytorch_metric_learning(tmp_path):
    from pytorch_metric_learning.datasets.cars196 import Cars196

    root = by_class(tmp_path / "cars196")
    index = pack_one(root, tmp_path / "out")
    files = {key: row["file"] for key, row in described(index).items()}
    for split in ("train", "test"):
        peer = Cars196(str(root), split=split)
        ours = {str(root / files[index.key(int(i))]) for i in index.select(split)}
        assert ours == set(peer.paths)


def test_a_folder_above_a_zip_and_a_second_run_change_nothing(source, tmp_path):
    first = pack_one(source, tmp_path / "a")
    written = tars(tmp_path / "a")
    assert pack_one(source, tmp_path / "a").fingerprint == first.fingerprint
    assert tars(tmp_path / "a") == written
    (tmp_path / "above").mkdir()
    source.rename(tmp_path / "above" / "cars")
    assert pack_one(tmp_path / "above", tmp_path / "b").fingerprint == first.fingerprint
    archive = shutil.make_archive(str(tmp_path / "cars"), "zip", tmp_path / "above")
    assert pack_one(archive, tmp_path / "c").fingerprint == first.fingerprint


def test_folders_that_were_packed_twice_are_found(tmp_path):
    root = devkit(tmp_path / "cars")
    first = content(pack_one(root, tmp_path / "a"))
    for part in ("train", "test"):
        (root / "moved").mkdir()
        (root / f"cars_{part}").rename(root / "moved" / f"cars_{part}")
        (root / "moved").rename(root / f"cars_{part}")
    (root / "car_devkit").mkdir()
    (root / "devkit" / "cars_test_annos_withlabels.mat").rename(
        root / "cars_test_annos_withlabels.mat"
    )
    (root / "devkit").rename(root / "car_devkit" / "devkit")
    assert content(pack_one(root, tmp_path / "b")) == first


def test_resizing_shrinks_images_and_boxes_alike(tmp_path):
    root = classic(tmp_path / "cars")
    row = described(pack_one(root, tmp_path / "out", resize=10))["car_ims/000001"]
    assert row["box"] == [1.0, 2.0, 5.0, 3.0]


def test_counts_are_noted_and_strictly_refused(source, tmp_path, capsys):
    pack_one(source, tmp_path / "out")
    noted = capsys.readouterr().err
    assert "train has 8 images of 2 classes (published 8,054 of 98)" in noted
    assert "test has 8 images of 2 classes (published 8,131 of 98)" in noted
    with pytest.raises(UsageError, match="is not the whole Cars196"):
        pack_one(source, tmp_path / "strict", strict_counts=True)


def test_missing_files_are_named_with_the_layouts(tmp_path):
    with pytest.raises(UsageError, match=r"holds no annotations of Cars196; expected cars_annos"):
        pack_one(tmp_path, tmp_path / "out")
    root = devkit(tmp_path / "a")
    (root / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(
        UsageError, match=r"withlabels\.mat: no such file \(cars_test_annos\.mat has"
    ):
        pack_one(root, tmp_path / "out")
    root = devkit(tmp_path / "b")
    (root / "devkit" / "cars_meta.mat").unlink()
    with pytest.raises(UsageError, match=r"devkit/cars_meta\.mat: no such file; expected"):
        pack_one(root, tmp_path / "out")
    root = classic(tmp_path / "c")
    (root / "cars_annos.mat").unlink()
    with pytest.raises(UsageError, match=r"c/cars_annos\.mat: no such file; expected"):
        pack_one(root, tmp_path / "out")
    root = classic(tmp_path / "d")
    shutil.rmtree(root / "car_ims")
    with pytest.raises(UsageError, match=r"d/car_ims: no such folder; expected"):
        pack_one(root, tmp_path / "out")
    root = by_class(tmp_path / "e")
    (root / "names.csv").unlink()
    with pytest.raises(UsageError, match=r"e/names\.csv: no such file"):
        pack_one(root, tmp_path / "out")
    root = classic(tmp_path / "f")
    (root / "car_ims" / "000003.jpg").unlink()
    with pytest.raises(UsageError, match=r"000003\.jpg: missing or empty, as 1 of the 16 listed"):
        pack_one(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_of_a_training_and_a_test_class_is_refused(tmp_path):
    root = classic(tmp_path / "cars")
    rows = [
        {"relative_im_path": "car_ims/000001.jpg", **corners((1, 1, 2, 2)), "class": c, "test": 0}
        for c in (1, 196)
    ]
    savemat(root / "cars_annos.mat", {"annotations": structs(rows), "class_names": cells(NAMES)})
    with pytest.raises(UsageError, match=r"000001\.jpg: is listed twice"):
        pack_one(root, tmp_path / "out")


def test_a_matlab_file_of_another_kind_is_refused(tmp_path):
    root = classic(tmp_path / "cars")
    annos = root / "cars_annos.mat"
    good = annos.read_bytes()

    def refused(match):
        with pytest.raises(UsageError, match=match) as caught:
            pack_one(root, tmp_path / "out")
        assert "\n" not in str(caught.value)

    annos.write_bytes(b"\x80\x04cos\nsystem\n" + good)
    refused(r"cars_annos\.mat: its variable class_names cannot be read: this is no \.mat file")
    savemat(annos, {"annotations": np.zeros(3)}, format="4")
    refused("this is no .mat file of version 5")
    annos.write_bytes(good[:124] + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n")
    refused("no .mat file of version 5")
    annos.write_bytes(good[: len(good) // 2])
    refused(r"class_names is cut short or damaged at byte \d+; get the official file")
    savemat(annos, {"class_names": cells(NAMES)})
    refused(r"annotations is missing \(it has: class_names\)")
    savemat(annos, {"annotations": np.zeros((1, 3)), "class_names": cells(NAMES)})
    refused("annotations is an array of numbers 1x3, expected an array of structs")
    savemat(annos, {"annotations": cells(NAMES), "class_names": cells(NAMES)})
    refused("annotations is a cell array 1x196, expected an array of structs")
    savemat(annos, {"annotations": structs([{"class": 1}]), "class_names": cells(NAMES)})
    refused(r"annotations has no field relative_im_path \(it has: class\)")
    row = {"relative_im_path": "car_ims/000001.jpg", **corners((1, 1, 2, 2)), "class": 1, "test": 0}
    for change, match in (
        ({"class": 197}, r"annotation 1: '197' is no whole number in 1\.\.196"),
        ({"class": 0}, r"annotation 1: '0' is no whole number"),
        ({"class": "1"}, r"annotation 1: class is 1, expected a number"),
        ({"relative_im_path": 7}, r"annotation 1: relative_im_path is 7, expected a text"),
        ({"relative_im_path": "../../secret.jpg"}, "leads out of the data set"),
    ):
        rows = [{**row, **change}]
        savemat(annos, {"annotations": structs(rows), "class_names": cells(NAMES)})
        refused(match)


def test_matlab_objects_are_refused_and_never_built(tmp_path):
    """An object is a struct with the name of a class; functions and opaque data likewise."""
    from scipy.io.matlab import MatlabObject

    root = classic(tmp_path / "cars")
    row = {"relative_im_path": "car_ims/000001.jpg", **corners((1, 1, 2, 2)), "class": 1, "test": 0}
    harmful = MatlabObject(structs([row]), "timer")
    savemat(root / "cars_annos.mat", {"annotations": harmful, "class_names": cells(NAMES)})
    with pytest.raises(
        UsageError, match=r"annotations is an object 1x1, expected an array of structs"
    ):
        pack_one(root, tmp_path / "out")


def test_a_damaged_table_is_refused_with_its_line(tmp_path):
    root = by_class(tmp_path / "cars")
    table = root / "anno_test.csv"
    good = table.read_text().splitlines()
    for line, match in (
        ("00001.jpg,1,2,3,4", r"anno_test\.csv line 2: has 5 columns, expected fname,x1"),
        ("00001.jpg,1,2,3,4,999", r"line 2: '999' is no whole number in 1\.\.196"),
        ("00001.jpg,1,2,x,4,1", r"line 2: '1 2 x 4' is no box"),
    ):
        table.write_text("\n".join([good[0], line, *good[2:]]) + "\n")
        with pytest.raises(UsageError, match=match):
            pack_one(root, tmp_path / "out")


def test_the_command_packs_and_reports(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cars_module.add_arguments(parser)
    root = devkit(tmp_path / "cars")
    arguments = parser.parse_args([str(root), str(tmp_path / "out"), "--processes", "1"])
    assert cars_module.run(arguments) == 0
    assert "16 samples (test 8, train 8), 2 training classes of 4" in capsys.readouterr().out
