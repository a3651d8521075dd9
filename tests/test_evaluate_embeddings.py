"""`dist-dml evaluate --embeddings`: anybody's Parquet, scored and refused as a user sees it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dml.cli import main
from dist_dml.protocol_scores import concatenate
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embedding_files import read_pair, write_embeddings
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.protocol import measure

FAST = ("--no-nmi", "--no-verification", "--resamples", "0")


def clustered(path: Path, n: int, seed: int, **columns: Any) -> Path:
    """Samples around ten centres; ids are those of a row in a longer list."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, n)
    centres = np.random.default_rng(7).normal(size=(10, 6))
    vectors = (centres[labels] + draw.normal(size=(n, 6))).astype(np.float32)
    names = [f"class {label}" for label in labels]
    ids = [f"{seed}/{i}" for i in range(n)]
    write_embeddings(path, ids, names, vectors, columns)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("embeddings")
    camera = ["left", "right", None] * 20
    queries = clustered(folder / "q.parquet", 60, 1, camera=camera)
    return str(queries), str(clustered(folder / "g.parquet", 200, 2))


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *words]) == 2
    out, errors = capsys.readouterr()
    assert not out
    (line,) = errors.splitlines()
    return line


@pytest.mark.parametrize("with_gallery", [False, True])
def test_all_distances_score_as_the_protocol_does(
    with_gallery: bool, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--embeddings", files[0], *(["--gallery", files[1]] if with_gallery else [])]
    words += ["--distance", "l2", "--distance", "cosine", "--recall-at", "1", "5"]
    found = evaluated(capsys, *words, "--resamples", "100", "--seed", "3")
    queries, gallery = read_pair(files[0], files[1] if with_gallery else None)
    distances = [named_distance(name) for name in ("cosine", "l2")]
    searched = gallery.embeddings if gallery else None
    expected = measure(queries.embeddings, searched, distances, (1, 5), True, 3)
    assert list(found["distances"]) == ["l2", "cosine"]
    for name, value in expected.items():
        distance, score = name.split("/")
        assert found["distances"][distance]["scores"][score] == value
    for one in found["distances"].values():
        assert {"ami", "mean_reciprocal_rank", "best_threshold", "roc_auc"} <= set(one["scores"])
        low, high = one["intervals"]["map_at_r"]
        assert low < one["scores"]["map_at_r"] < high
    assert found["queries"] == {"samples": 60, "width": 6, "classes": 10, "made_by": {}}
    assert (found["gallery"] or {}).get("samples") == (200 if with_gallery else None)


def test_embeddings_of_several_models_are_put_side_by_side_by_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(4)
    labels = draw.integers(0, 10, 90)
    ids = draw.permutation(90) + 1000
    models = [draw.normal(size=(90, width)).astype(np.float32) for width in (5, 3)]
    write_embeddings(tmp_path / "a.parquet", ids, labels, models[0])
    order = draw.permutation(90)
    write_embeddings(tmp_path / "b.parquet", ids[order], labels[order], models[1][order])
    parts = [Embeddings(vectors, labels, ids) for vectors in models]
    both = concatenate(parts)
    words = ["--distance", "cosine", "--distance", "l2", *FAST]
    words += both_of(tmp_path / "a.parquet", tmp_path / "b.parquet")
    found = evaluated(capsys, *words)
    assert found["queries"]["width"] == 8
    distances = [named_distance(name) for name in ("cosine", "l2")]
    for name, value in measure(both, None, distances, (1, 2, 4, 8), False, 0).items():
        distance, score = name.split("/")
        assert found["distances"][distance]["scores"][score] == value

    write_embeddings(tmp_path / "c.parquet", ids[1:], labels[1:], models[1][1:])
    write_embeddings(tmp_path / "d.parquet", ids, (labels + 1) % 10, models[1])
    write_embeddings(tmp_path / "e.parquet", ids.astype(str), labels, models[1])
    for other, words in (
        ("c", f"id {ids[0]} of .*a.parquet is not in .*c.parquet"),
        ("d", f"id {ids[0]} has label {labels[0]} in .* and {(labels[0] + 1) % 10} in"),
        ("e", "ids of int and labels of int, .* ids of string and labels of int"),
    ):
        given = both_of(tmp_path / "a.parquet", tmp_path / f"{other}.parquet")
        assert re.search(words, refused(capsys, *given))
    swapped = both_of(tmp_path / "c.parquet", tmp_path / "a.parquet")
    assert f"id {ids[0]} of" in refused(capsys, *swapped)
    uneven = both_of(tmp_path / "a.parquet", tmp_path / "b.parquet")
    uneven += ["--gallery", str(tmp_path / "a.parquet")]
    assert "--embeddings is given 2 times and --gallery 1" in refused(capsys, *uneven)


def both_of(first: Path, second: Path) -> list[str]:
    return ["--embeddings", str(first), "--embeddings", str(second)]


def test_groups_are_those_of_the_column(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--embeddings", files[0], *FAST)
    found = evaluated(capsys, *words, "--group-by", "camera")["distances"]["cosine"]
    groups = {group["name"]: group for group in found["groups"]}
    assert list(groups) == ["left", "right", "(missing)"]
    assert [group["num_queries"] for group in groups.values()] == [20, 20, 20]
    means = [group["scores"]["map_at_r"] for group in groups.values()]
    answered = [g["num_queries"] - g["num_queries_without_match"] for g in groups.values()]
    assert np.average(means, weights=answered) == pytest.approx(found["scores"]["map_at_r"])
    by_label = evaluated(capsys, *words, "--group-by", "label")["distances"]["cosine"]["groups"]
    assert [group["name"] for group in by_label] == [f"class {i}" for i in range(10)]
    by_size = evaluated(capsys, *words, "--group-by", "class_size")["distances"]["cosine"]
    assert sum(group["num_classes"] for group in by_size["groups"]) == 10


def test_the_table_shows_the_scores_their_intervals_and_groups(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--embeddings", files[0], "--gallery", files[1], "--resamples", "100", "--no-nmi")
    found = evaluated(capsys, *words)["distances"]["cosine"]
    assert main(["evaluate", *words, "--group-by", "camera"]) == 0
    shown = capsys.readouterr().out
    assert "cosine: 60 queries of 10 classes, a gallery of 200" in shown
    low, high = found["intervals"]["map_at_r"]
    (line,) = [text for text in shown.splitlines() if text.startswith("map_at_r")]
    assert line.split() == [
        "map_at_r",
        f"{found['scores']['map_at_r']:.4f}",
        f"{low:.4f}",
        "..",
        f"{high:.4f}",
    ]
    assert [text.split()[:2] for text in shown.splitlines() if text.startswith("right")] == [
        ["right", "20"]
    ]


def test_a_name_in_a_file_does_not_reach_the_terminal_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clustered(tmp_path / "q.parquet", 40, 1, place=["\x1b[2J", "b"] * 20)
    assert main(["evaluate", "--embeddings", str(path), *FAST, "--group-by", "place"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "?[2J" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--distance", "metric(p=0.5)"), "compared by cosine or l2"),
        (("--group-by", "colour"), "has 'label', 'class_size', 'camera'"),
        (("--recall-at", "0"), "every K must be at least 1"),
        (("--label-column", "kind"), "has no column 'kind'; it has: 'id', 'label', 'camera'"),
        (("--id-column", "embedding"), "expected integers or strings"),
        (("runs/demo",), "not both"),
        (("evaluation.nmi=false",), "not both"),
        (("--baselines",), "are of a run"),
        (("--checkpoint", "last"), "are of a run"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    words: tuple[str, ...],
    expected: str,
    files: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in refused(capsys, "--embeddings", files[0], *words)


def test_options_of_files_are_refused_for_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--group-by goes with --embeddings" in refused(capsys, "runs/x", "--group-by", "a")
    assert "--no-nmi goes with --embeddings" in refused(capsys, "runs/x", "--no-nmi")
    assert "give a RUN folder" in refused(capsys)


def test_labels_without_a_match_are_counted_or_end_it(
    tmp_path: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.parquet"
    vectors = np.ones((3, 6), np.float32)
    write_embeddings(other, ["a", "b", "c"], ["class 1", "unknown", "unknown"], vectors)
    found = evaluated(capsys, "--embeddings", str(other), "--gallery", files[1], *FAST)
    scores = found["distances"]["cosine"]["scores"]
    assert (scores["num_queries"], scores["num_queries_without_match"]) == (3, 2)
    write_embeddings(other, ["a"], ["unknown"], vectors[:1])
    assert main(["evaluate", "--embeddings", str(other), "--gallery", files[1]]) == 1
    assert "none of 1 queries has another image" in capsys.readouterr().err


def test_checkpoints_that_differ_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    for name in ("q", "g"):
        vectors = draw.normal(size=(6, 3)).astype(np.float32)
        facts = {"checkpoint_digest": name}
        ids = [f"{name}{i}" for i in range(6)]
        write_embeddings(tmp_path / name, ids, [0, 1] * 3, vectors, facts=facts)
    words = ["evaluate", "--embeddings", str(tmp_path / "q"), *FAST]
    assert main([*words, "--gallery", str(tmp_path / "g")]) == 0
    assert "embedded by different checkpoints" in capsys.readouterr().err
    assert main(words) == 0
    assert "different checkpoints" not in capsys.readouterr().err
