"""`dist-dml search build` and `query` on real checkpoints and files, and all that they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from searched_run import FIRST, WIDTH, build, make_run, pack_images, png_of
from stored_checkpoint import NUM_CLASSES, small_head

from dist_dml.cli import main
from dist_dml.data.index import load_index
from dist_dml.errors import UsageError
from dist_dml.retrieval.search_files import open_search_index


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searches")
    (folder / "data").mkdir()
    make_run(folder / "run", pack_images(folder / "data"))
    build(folder / "run", folder / "index")
    (folder / "a.png").write_bytes(png_of(7, 2))
    (folder / "text.png").write_bytes(b"no image")
    make_run(folder / "other", load_index(folder / "data"), "run.seed=5")
    build(embeddings(folder / "g.parquet"), folder / "file")
    embeddings(folder / "wide.parquet", width=7)
    return folder


NO_ROWS = {"id": pyarrow.array([], pyarrow.int64()), "label": pyarrow.array([], pyarrow.string())}


def embeddings(path: Path, count: int = 30, width: int = WIDTH, **columns: object) -> Path:
    draw = np.random.default_rng(0)
    flat = pyarrow.array(draw.standard_normal(count * width).astype(np.float32))
    table = {
        "id": list(range(count)),
        "label": [f"c{number % 5}" for number in range(count)],
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, width),
    }
    pyarrow.parquet.write_table(pyarrow.table({**table, **columns}), path)
    return path


def test_an_index_of_a_run_says_what_it_is_and_what_was_measured(place: Path, capsys) -> None:
    assert main(["search", "build", str(place / "run"), str(place / "said"), "--split=test"]) == 0
    said = capsys.readouterr().out
    assert f"index: flat, {2 * NUM_CLASSES} images x {WIDTH}, cosine" in said
    assert f"recall@1 1.0000, recall@10 1.0000 against exact neighbours ({2 * NUM_CLASSES}" in said
    facts = json.loads((place / "said" / "search.json").read_text())
    assert facts["recall"] == {"1": 1.0, "10": 1.0}
    assert facts["checkpoint"]["path"] == "../run/checkpoints/step-000000002"
    assert facts["images"]["path"] == "../data"
    # Two equal images of each class: between them the cosine is 1.
    assert facts["threshold"] < 1


def test_neighbours_of_an_image_are_printed_with_the_line(place: Path, capsys) -> None:
    assert main(["search", "query", str(place / "index"), str(place / "a.png"), "--k", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{place / 'a.png'} (cosine, larger is nearer)"
    first = lines[1].split()
    assert first[:3] == ["1", "1.0000", str(FIRST + 30)]
    assert "class <b>07</b>" in lines[1]
    assert sum("threshold" in line for line in lines) == 1


def test_neighbours_as_json_and_k_beyond_the_gallery(place: Path, capsys) -> None:
    words = ["search", "query", str(place / "index"), str(place / "a.png"), "--json"]
    assert main([*words, "--k", "1000"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["query"] == str(place / "a.png")
    assert len(answer["neighbours"]) == 4 * NUM_CLASSES
    assert answer["neighbours"][0]["id"] == FIRST + 30
    near = [one["within"] for one in answer["neighbours"]]
    assert near == sorted(near, reverse=True)


def test_class_weights_are_a_gallery_with_an_image_of_each_class(place: Path) -> None:
    build(place / "run", place / "classes", "--classes", "--distance=l2")
    opened = open_search_index(place / "classes")
    assert opened.facts.rows == "classes"
    assert opened.facts.threshold is None
    assert "give --queries or --threshold" in opened.facts.threshold_from
    weights = small_head().weight.detach().numpy()
    positions, values = opened.index.search(weights, 1)
    assert positions[:, 0].tolist() == list(range(NUM_CLASSES))
    np.testing.assert_allclose(values, 0, atol=1e-6)
    assert opened.image_rows().tolist() == list(range(FIRST, FIRST + 4 * NUM_CLASSES, 4))
    assert opened.item(3)["label"] == "class <b>03</b>"


def test_exported_class_weights_are_the_same_gallery(place: Path) -> None:
    out = place / "weights.parquet"
    assert main(["classes", "export", str(place / "run"), str(out)]) == 0
    build(out, place / "exported", "--classes", f"--checkpoint={place / 'run'}")
    opened = open_search_index(place / "exported")
    weights = small_head().weight.detach().numpy()
    positions, _ = opened.index.search(weights, 1)
    assert [opened.item(int(row))["label"] for row in positions[:, 0]] == [
        f"class <b>{number:02d}</b>" for number in range(NUM_CLASSES)
    ]


def test_a_line_of_classes_comes_from_queries_with_labels(place: Path) -> None:
    weights = np.ascontiguousarray(np.repeat(small_head().weight.detach().numpy(), 3, axis=0))
    flat = pyarrow.array(weights.ravel())
    table = pyarrow.table(
        {
            "id": [f"q{i}" for i in range(3 * NUM_CLASSES)],
            "label": [f"class <b>{i // 3:02d}</b>" for i in range(3 * NUM_CLASSES)],
            "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, WIDTH),
        }
    )
    pyarrow.parquet.write_table(table, place / "q.parquet")
    queries = f"--queries={place / 'q.parquet'}"
    facts = build(place / "run", place / "lined", "--classes", queries)
    assert facts.measured_on == "of q.parquet"
    assert facts.num_measured == 3 * NUM_CLASSES
    unit = weights / np.linalg.norm(weights, axis=1)[:, None]
    others = (unit @ unit.T)[np.arange(33)[:, None] // 3 != np.arange(33) // 3].max()
    assert facts.threshold == pytest.approx((1 + others) / 2, abs=1e-5)


def test_anybodys_parquet_is_searched_with_its_ids_and_columns(tmp_path: Path, capsys) -> None:
    texts = [f"item/{number}" for number in range(30)]
    file = embeddings(tmp_path / "g.parquet", id=texts, price=[float(i) for i in range(30)])
    assert main(["search", "build", str(file), str(tmp_path / "index")]) == 0
    assert "queries need embeddings" in capsys.readouterr().out
    words = ["search", "query", str(tmp_path / "index"), "--embeddings", str(file), "--k", "2"]
    assert main([*words, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["query"] for one in answers] == texts
    assert [one["neighbours"][0]["id"] for one in answers] == texts
    assert answers[4]["neighbours"][0]["metadata"] == {"price": 4.0}


def test_what_embed_wrote_is_searched_with_its_pictures(place: Path, tmp_path: Path) -> None:
    run, out = str(place / "run"), str(tmp_path / "embedded")
    assert main(["embed", run, "--out", out, "--split", "train"]) == 0
    facts = build(out, tmp_path / "index", f"--checkpoint={run}")
    own = open_search_index(place / "index")
    found = open_search_index(tmp_path / "index")
    assert facts.images is not None
    assert facts.images.fingerprint == own.facts.images.fingerprint
    assert facts.checkpoint.embedder_sha256 == own.facts.checkpoint.embedder_sha256
    for name in ("id", "label", "image_row"):
        assert found.gallery[name].to_pylist() == own.gallery[name].to_pylist()
    with pytest.raises(UsageError, match="is not the checkpoint that made the embeddings"):
        build(out, tmp_path / "wrong", f"--checkpoint={place / 'other'}")


def test_control_characters_of_a_label_do_not_reach_the_terminal(tmp_path: Path, capsys) -> None:
    file = embeddings(tmp_path / "g.parquet", label=["\x1b[2J\x07"] * 30)
    build(file, tmp_path / "index", "--threshold=0.5")
    assert main(["search", "query", str(tmp_path / "index"), "--embeddings", str(file)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_held_out_queries_find_nothing_by_their_own_id(tmp_path: Path) -> None:
    """The same ids in both are the same samples: none finds itself, and recall is still right."""
    file = embeddings(tmp_path / "g.parquet")
    shutil.copy(file, tmp_path / "q.parquet")
    facts = build(file, tmp_path / "index", f"--queries={tmp_path / 'q.parquet'}")
    own = build(file, tmp_path / "own")
    assert facts.recall == own.recall == {"1": 1.0, "10": 1.0}
    assert facts.threshold == own.threshold


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}", "{index}"], "is there already"),
        (["absent", "{out}"], "absent: no such file or folder"),
        (["{run}", "absent/out"], "is no folder; make it"),
        (["{run}", "{out}", "--split=none"], "has no samples of split 'none'"),
        (["{run}", "{out}", "--classes", "--split=test"], "class weights have no split"),
        (["{run}", "{out}", "--checkpoint={run}"], "is for Parquet"),
        (["{g}", "{out}", "--split=test"], "--split=test is for runs"),
        (["{wide}", "{out}", "--checkpoint={run}"], "embeds into 6 numbers and the gallery has 7"),
        (["{run}", "{out}", "--queries={wide}"], "width 7 and the gallery of 6"),
        (["{run}", "{out}", "--kind=ivf_pq"], "needs at least 624 vectors"),
        (["{run}", "{out}", "--kind=tree"], "invalid choice: 'tree'"),
        (["{run}", "{out}", "--distance=metric"], "invalid choice: 'metric'"),
        (["{run}", "{out}", "--num-queries=0"], "--num-queries=0"),
        (
            ["{run}", "{out}", "--threshold=nan"],
            "--threshold=nan is neither a number nor one of neighbours, verif",
        ),
        (["{empty}", "{out}"], "holds no embeddings: it has no rows"),
        (["{g}", "{out}", "--data={data}", "--checkpoint=absent"], "is neither a run"),
        (["{many}", "{out}", "--data={data}"], "id 66 is none of the 66 samples"),
        (["{data}", "{out}"], "it has no column|has no column|differ"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(place, tmp_path, capsys, words, says) -> None:
    files = {
        "g": embeddings(tmp_path / "g.parquet"),
        "wide": embeddings(tmp_path / "wide.parquet", width=7),
        "many": embeddings(tmp_path / "many.parquet", count=67),
        "empty": embeddings(tmp_path / "empty.parquet", count=0, **NO_ROWS),
    }
    places = {name: place / name for name in ("run", "index", "data")}
    before = sorted(tmp_path.iterdir())
    given = [word.format(**files, **places, out=tmp_path / "out") for word in words]
    assert main(["search", "build", *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(says, error), error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{index}"], "there is nothing to search for"),
        (["{index}", "absent.png"], "absent.png cannot be read (No such file"),
        (["{index}", "{text}"], "cannot be searched for: it is not a JPEG, PNG or WebP"),
        (["{index}", "{image}", "--embeddings=x"], "give one of both"),
        (["{index}", "{image}", "--k=0"], "k=0 neighbours"),
        (["{index}", "{image}", "--checkpoint=absent"], "absent is not there"),
        (["{index}", "{image}", "--checkpoint={other}"], "is not the checkpoint that"),
        (["{index}", "--embeddings={wide}"], "queries are 7 wide and the index 6"),
        (["{run}", "{image}"], "is not an index"),
        (["{file}", "{image}"], "does not say what embeds queries"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(place, capsys, words, says) -> None:
    names = ("index", "run", "other", "file")
    given = [
        word.format(
            image=place / "a.png",
            text=place / "text.png",
            wide=place / "wide.parquet",
            **{name: place / name for name in names},
        )
        for word in words
    ]
    assert main(["search", "query", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0 lets other machines in"),
        (["--host=0.0.0.0", "--allowed-hosts=*"], "allows any name"),
        (["--allowed-hosts=*.example.org"], "is a pattern; list the names"),
        (["--port=99999999"], "cannot be used"),
        (["--data=absent"], "absent"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(place, capsys, words, says) -> None:
    assert main(["search", "serve", str(place / "index"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_checkpoint_that_moved_is_found_by_its_run(place: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(place / "run", tmp_path / "moved")
    shutil.copytree(place / "index", tmp_path / "index")
    words = ["search", "query", str(tmp_path / "index"), str(place / "a.png"), "--k=1", "--json"]
    assert main(words) == 2
    assert "name the run or checkpoint with --checkpoint" in capsys.readouterr().err
    assert main([*words, f"--checkpoint={tmp_path / 'moved'}"]) == 0
    assert json.loads(capsys.readouterr().out)["neighbours"][0]["id"] == FIRST + 30


def test_the_parquet_of_another_checkpoint_is_refused(place: Path, tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(embeddings(tmp_path / "g.parquet"))
    facts = {"checkpoint_digest": "0" * 64, "run": "x", "checkpoint": "step-000000002"}
    pyarrow.parquet.write_table(table.replace_schema_metadata(facts), tmp_path / "stamped.parquet")
    with pytest.raises(UsageError, match="is not the checkpoint that made the embeddings"):
        build(tmp_path / "stamped.parquet", tmp_path / "out", f"--checkpoint={place / 'run'}")
