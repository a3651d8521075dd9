"""Packs are deterministic, resumable and class-disjoint, and never mix two sets of parameters."""

from __future__ import annotations

import argparse
import json
from functools import partial

import numpy as np
import pytest
from tiny_images import image_of, png

from dist_dml.data.decode import decode
from dist_dml.data.index import load_index
from dist_dml.data.pack import folder as folder_module
from dist_dml.data.pack import glyphs as glyphs_module
from dist_dml.data.pack.folder import pack_folder
from dist_dml.data.pack.glyph_classes import draw_clean, find_classes, open_face
from dist_dml.data.pack.glyphs import default_fonts, draw_sample, pack_glyphs
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import UsageError

FONTS = [font for font in default_fonts() if "Mono" in font]
"""Four typefaces: enough to pack, few enough to be quick."""


@pytest.fixture(scope="module")
def all_classes():
    return find_classes(default_fonts(), min_faces=8)


@pytest.fixture
def tree(tmp_path):
    """Nine class folders of 8 to 16 images, with things that are not images beside them."""
    for number in range(9):
        folder = tmp_path / "src" / f"{number:03d}.some class"
        folder.mkdir(parents=True)
        for image in range(8 + number):
            (folder / f"img.v{image}.png").write_bytes(png(image_of(100 * number + image)))
        (folder / "notes.txt").write_text("no image")
    (tmp_path / "src" / ".hidden").mkdir()
    (tmp_path / "src" / "empty").mkdir()
    return tmp_path / "src"


pack_one = partial(pack_folder, processes=1)


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_look_alikes_of_several_alphabets_are_one_class(all_classes):
    of = {code: number for number, c in enumerate(all_classes) for code in c.codepoints}
    assert of[ord("A")] == of[ord("Α")] == of[ord("А")]
    assert len({of[ord(c)] for c in "ABCOQЖ0"}) == 7
    assert all_classes[of[ord("A")]].name.startswith("U+0041 LATIN CAPITAL LETTER A = U+0391")


def test_every_class_has_eight_drawings_one_a_typeface(all_classes):
    assert 2300 < len(all_classes) < 3200
    for glyph_class in all_classes:
        faces = [face for face, _ in glyph_class.drawings]
        assert len(faces) == len(set(faces)) >= 8
    codes = [code for glyph_class in all_classes for code in glyph_class.codepoints]
    assert len(codes) == len(set(codes))
    assert not any(0x2500 <= code <= 0x259F or 0x2800 <= code <= 0x28FF for code in codes)


def test_no_ink_of_a_clean_drawing_is_cut_off():
    """The twin draws on a canvas far larger than the character; bearings have both signs."""
    from matplotlib.ft2font import LoadFlags

    for font in FONTS:
        face = open_face(font)
        for codepoint in list(face.get_charmap())[::23]:
            for em in (30.3, 41.7):
                drawn = draw_clean(face, codepoint, em)
                face.set_size(em, 72)
                glyph = face.load_char(codepoint, flags=LoadFlags.NO_HINTING)
                canvas = np.zeros((300, 300), np.uint8)
                face.draw_glyph_to_bitmap(canvas, 100, 100, glyph)
                assert (0 if drawn is None else int(drawn.sum())) == int(canvas.sum())


def test_a_drawing_depends_on_seed_character_and_typeface_alone():
    first = draw_sample(FONTS[0], ord("g"), seed=1)
    draw_sample(FONTS[1], ord("g"), seed=1)
    assert np.array_equal(draw_sample(FONTS[0], ord("g"), seed=1), first)
    assert (first.shape, first.dtype) == ((64, 64), np.uint8)
    others = [(FONTS[0], "g", 2), (FONTS[1], "g", 1), (FONTS[0], "h", 1)]
    for font, character, seed in others:
        assert not np.array_equal(draw_sample(font, ord(character), seed), first)


def test_the_drawing_of_the_letter_l_never_moves():
    """The data set's version stands for its pixels: change VERSION where this changes."""
    assert glyphs_module.VERSION == 1
    view = draw_sample(default_fonts()[0], ord("L"), seed=0).astype(float)
    assert [round(float(x)) for x in (view.mean(), view.std(), view[:, :32].mean())] == [
        217,
        22,
        215,
    ]


def pack_few(out, monkeypatch, seed=0, processes=1):
    """The Greek letters of four typefaces: seconds instead of a minute."""
    import dist_dml.data.pack.glyph_classes as glyph_classes

    monkeypatch.setattr(glyph_classes, "_accepted", lambda code: 0x391 <= code <= 0x3C9)
    return pack_glyphs(out, FONTS, seed, min_faces=4, shard_samples=40, processes=processes)


def test_glyph_classes_are_disjoint_and_seen_are_training_classes(tmp_path, monkeypatch):
    index = pack_few(tmp_path, monkeypatch)
    classes = {name: set(index.class_id[index.select(name)]) for name in ("train", "seen", "test")}
    assert classes["train"] == set(range(index.num_classes))
    assert classes["seen"] <= classes["train"]
    assert not classes["train"] & classes["test"]
    assert abs(len(classes["train"]) - len(classes["test"])) <= 1
    keys = {index.key(i) for i in range(len(index))}
    assert len(keys) == len(index)
    assert all(key.startswith("U+0") and "DejaVuSansMono" in key for key in keys)
    image = read_image(index, open_reader(index, 1), 0)
    assert image.shape == (64, 64, 1)
    source = index.metadata["source"]
    assert (source["version"], source["seed"]) == (glyphs_module.VERSION, 0)


def test_a_pack_is_the_same_from_one_and_two_processes_and_after_an_interruption(
    tmp_path, monkeypatch
):
    first = pack_few(tmp_path / "a", monkeypatch)
    written = tars(tmp_path / "a")
    assert len(written) > 3
    second = pack_few(tmp_path / "b", monkeypatch, processes=2)
    assert tars(tmp_path / "b") == written
    assert second.fingerprint == first.fingerprint

    names = sorted(written)
    (tmp_path / "b" / names[0]).unlink()
    (tmp_path / "b" / names[2]).rename(tmp_path / "b" / (names[2] + ".tmp"))
    kept = (tmp_path / "b" / names[1]).stat().st_mtime_ns
    assert pack_few(tmp_path / "b", monkeypatch).fingerprint == first.fingerprint
    assert tars(tmp_path / "b") == written
    assert (tmp_path / "b" / names[1]).stat().st_mtime_ns == kept
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_another_seed_is_another_data_set_and_is_not_mixed_in(tmp_path, monkeypatch):
    first = pack_few(tmp_path / "a", monkeypatch)
    with pytest.raises(UsageError, match=r"other parameters \(seed=0 \(now 1\)\)") as caught:
        pack_few(tmp_path / "a", monkeypatch, seed=1)
    assert "\n" not in str(caught.value)
    assert pack_few(tmp_path / "b", monkeypatch, seed=1).fingerprint != first.fingerprint


def test_an_unreadable_font_and_too_few_faces_are_refused(tmp_path):
    (tmp_path / "no.ttf").write_bytes(b"no font")
    with pytest.raises(UsageError, match=r"no\.ttf: no readable font"):
        pack_glyphs(tmp_path / "out", [tmp_path / "no.ttf"])
    with pytest.raises(UsageError, match="1 typefaces have 0 characters that 8"):
        pack_glyphs(tmp_path / "out", FONTS[:1])


def test_a_folder_is_packed_without_changing_a_byte(tree, tmp_path):
    index = pack_one(tree, tmp_path / "out", shard_samples=20)
    assert len(index) == sum(8 + n for n in range(9))
    stored = {p.read_bytes() for p in tree.rglob("*.png")}
    for i in range(len(index)):
        data = index.shard_path(int(index.shard[i])).read_bytes()
        assert data[index.offset[i] : index.offset[i] + index.size[i]] in stored
    label = index.class_names[index.class_id[0]]
    assert index.key(0).startswith(f"{label}/img_v")


def test_no_class_of_a_packed_folder_is_trained_on_and_tested(tree, tmp_path):
    index = pack_one(tree, tmp_path / "out", test_fraction=0.34, seen_per_class=2)
    classes = {name: set(index.class_id[index.select(name)]) for name in ("train", "seen", "test")}
    assert (len(classes["train"]), len(classes["test"])) == (6, 3)
    assert classes["seen"] == classes["train"]
    assert not classes["train"] & classes["test"]
    assert len(index.select("seen")) == 12


def test_train_and_test_folders_are_kept(tree, tmp_path):
    for side, number in (("train", 0), ("train", 3), ("test", 5)):
        (tmp_path / "sides" / side).mkdir(parents=True, exist_ok=True)
        name = f"{number:03d}.some class"
        (tree / name).rename(tmp_path / "sides" / side / name)
    index = pack_one(tmp_path / "sides", tmp_path / "out", seen_per_class=0)
    assert index.num_classes == 2
    assert len(index.select("test")) == 13
    (tmp_path / "sides" / "train" / "005.some class").mkdir()
    (tmp_path / "sides" / "train" / "005.some class" / "x.png").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"'005\.some class' is in train/ and in test/"):
        pack_one(tmp_path / "sides", tmp_path / "other")


def test_resizing_shortens_the_short_side(tree, tmp_path):
    index = pack_one(tree, tmp_path / "out", resize=10)
    reader = open_reader(index, 3)
    assert {read_image(index, reader, i).shape for i in range(len(index))} == {(10, 12, 3)}


def test_a_changed_source_is_not_mixed_in(tree, tmp_path):
    pack_one(tree, tmp_path / "out")
    (tree / "000.some class" / "img.v0.png").write_bytes(b"other")
    with pytest.raises(UsageError, match="other parameters"):
        pack_one(tree, tmp_path / "out")


def test_empty_missing_and_one_class_trees_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        pack_one(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "src" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="found no class_name/image"):
        pack_one(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "a" / "1.jpg").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"1 classes leave none for test.*--test-fraction"):
        pack_one(tmp_path / "src", tmp_path / "out", test_fraction=0.5)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_shards_is_refused(tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"someone else's")
    with pytest.raises(UsageError, match="not of this pack"):
        pack_one(tree, tmp_path / "out")


def test_a_full_disk_is_refused_before_the_first_byte(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=1000))
    with pytest.raises(UsageError, match=r"MiB and the disk has 0 MiB free"):
        pack_one(tree, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_the_folder_command_packs_and_reports(tree, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    folder_module.add_arguments(parser)
    arguments = parser.parse_args(
        [str(tree), str(tmp_path / "out"), "--test-fraction", "0.2", "--processes", "1"]
    )
    assert folder_module.run(arguments) == 0
    printed = capsys.readouterr()
    assert "108 samples" in printed.out
    assert "images in" in printed.err
    index = load_index(tmp_path / "out")
    row = int(index.select("test")[0])
    shard = index.shard_path(int(index.shard[row])).read_bytes()
    assert decode(shard[index.offset[row] :][: index.size[row]], 3).shape == (20, 24, 3)
    assert b'"file": "' in shard
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["source"]["seed"] == 0
