"""Finished runs side by side: which words mean runs, what is shown, when a test is made."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dist_dml.comparison import add_arguments, run, run_folders
from dist_dml.config import Config
from dist_dml.config_loading import to_yaml
from dist_dml.errors import UsageError
from dist_dml.report.compared_runs import best_places, config_differences, read_runs
from dist_dml.report.query_scores import write_query_scores
from dist_dml.report.run_comparison import curves_figure
from dist_dml.report.run_significance import paired_tests, pairs_to_test
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.metrics import QueryScores, summarise
from dist_dml.retrieval.protocol import score_slice
from dist_dml.tracking.recorder import Recorder
from dist_dml.tracking.run_files import identify_run

LABELS = np.repeat(np.arange(9), 6)


def measured(noise: float, seed: int) -> tuple[np.ndarray, QueryScores]:
    """Scores of 54 queries of 9 classes: the same images for every run, embedded with noise."""
    draw = np.random.default_rng(seed)
    centres = np.eye(9, dtype=np.float32)[LABELS]
    vectors = (centres + draw.normal(0, noise, centres.shape)).astype(np.float32)
    samples = Embeddings(vectors, LABELS, np.arange(54) + 11)
    return samples.ids, score_slice(samples, None, slice(0, 54), DISTANCES["cosine"], (1, 2))


def make_run(
    root: Path, name: str, noise: float, fingerprint: str = "data", rate: float = 0.1
) -> Path:
    """A run's folder as training and evaluation leave it."""
    folder = root / name.replace("/", "-").replace("<", "lt")
    (folder / "report").mkdir(parents=True)
    tree = {"run": {"name": name, "root": str(root)}, "optimizer": {"learning_rate": rate}}
    (folder / "config.yaml").write_text(to_yaml(Config.model_validate(tree)), encoding="utf-8")
    identify_run(folder, {"dataset_fingerprint": fingerprint})
    recorder = Recorder(folder)
    for step in range(1, 5):
        values = {"train/loss": noise / step, "unseen/cosine/map_at_r": step / 10}
        recorder.record(step, step * 32, step * 0.5, values)
    recorder.close()
    ids, scores = measured(noise, seed=5)
    summary = {f"unseen/cosine/{key}": value for key, value in summarise(scores).items()}
    rows = {"checkpoint": "step-4", "scores": {"pixels": {}, "trained": summary}}
    (folder / "report" / "scores.json").write_text(json.dumps(rows))
    path = folder / "report" / "queries.parquet"
    found = {("unseen", "cosine"): (ids, scores)}
    write_query_scores(path, found, {"unseen": ("test", "")}, fingerprint, "step-4")
    return folder


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_intermixed_args(list(words))


def test_runs_are_told_from_a_file_and_a_mixture_is_refused(tmp_path: Path) -> None:
    one, two = (str(make_run(tmp_path, name, 0.2)) for name in ("one", "two"))
    assert run_folders(parsed(one, two)) == [Path(one), Path(two)]
    file = tmp_path / "methods.yaml"
    file.write_text("variants: {}\n")
    assert run_folders(parsed(str(file), "data.batch_size=7")) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, message in (
        ((one, str(file)), r"got the run .* and .*methods\.yaml.*either run folders alone"),
        ((str(file), one), r"got the run .* and .*methods\.yaml"),
        ((one, two, "data.batch_size=7"), r"data\.batch_size=7.*which is none"),
        ((one, two, "--trial", "a=1"), "--method and --trial are for a file's methods"),
        ((str(empty), one), r"got the run .* and .*empty"),
        ((str(empty),), r"is no run \(it has no config\.yaml\)"),
        ((str(file), "--out", "x"), "--out is for runs"),
    ):
        with pytest.raises(UsageError, match=message):
            run_folders(parsed(*words))


def test_what_cannot_be_compared_is_refused_in_words(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", 0.2)
    with pytest.raises(UsageError, match="got one run"):
        read_runs([one])
    with pytest.raises(UsageError, match="twice"):
        read_runs([one, tmp_path / "." / "one"])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(to_yaml(Config()))
    with pytest.raises(UsageError, match=r"has no scores.*dist-dml evaluate"):
        read_runs([one, bare])


def test_the_terminal_and_the_page_have_scores_difference_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_run(tmp_path, "good", 0.2), make_run(tmp_path, "<i>bad", 0.9, rate=0.3)
    assert run(parsed(str(good), str(bad), "--out", str(tmp_path / "out"))) == 0
    text = capsys.readouterr().out
    scores = {run.name: run.scores for run in read_runs([good, bad])}
    best = scores["good"]["unseen/cosine/map_at_r"]
    assert best > scores["<i>bad"]["unseen/cosine/map_at_r"]
    assert re.search(rf"good .* {best:.4f}\*", text)
    assert "*" not in next(line for line in text.splitlines() if line.startswith("<i>bad  "))
    page = (tmp_path / "out" / "compare.html").read_text()
    assert f'<b class="best">{best:.4f}</b>' in page
    assert "<i>" not in page
    assert "optimizer.learning_rate" in page
    assert "run.name" not in page
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    tests, reasons = paired_tests(read_runs([good, bad]), 0)
    assert reasons == []
    (one,) = [one for one in tests if one.score == "map_at_r"]
    difference = scores["<i>bad"]["unseen/cosine/map_at_r"] - best
    assert one.test.difference == pytest.approx(difference, abs=1e-6)
    assert f"{one.test.difference:+.4f}" in text
    # Worse in all of 9 classes: only that swap and its opposite are as far.
    assert one.test.p == 2 / 2**9
    assert one.p_of_all <= 3 * one.test.p


def test_there_is_no_test_between_runs_that_answered_other_queries(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, "one", 0.2), make_run(tmp_path, "other", 0.2, "else")
    old = make_run(tmp_path, "old", 0.2)
    (old / "report" / "queries.parquet").unlink()
    cut = make_run(tmp_path, "cut", 0.2)
    ids, scores = measured(0.2, seed=5)
    found = {("unseen", "cosine"): (ids + 1, scores)}
    path = cut / "report" / "queries.parquet"
    write_query_scores(path, found, {"unseen": ("test", "")}, "data", "step-4")
    tests, reasons = paired_tests(read_runs([one, other, old, cut]), 0)
    assert tests == []
    assert len(reasons) == 6
    of = dict(reason.split(": ", 1) for reason in reasons)
    assert "fingerprints differ" in of["one and other"]
    assert "dist-dml evaluate" in of["one and old"]
    assert "no protocol and distance in common" in of["one and cut"]


def test_scores_of_a_run_that_was_never_evaluated_are_its_last_recorded_ones(
    tmp_path: Path,
) -> None:
    one, two = make_run(tmp_path, "one", 0.2), make_run(tmp_path, "two", 0.3)
    (two / "report" / "scores.json").unlink()
    runs = read_runs([one, two])
    assert runs[1].scores == {"unseen/cosine/map_at_r": 0.4}
    assert runs[1].source == "last evaluation of the training, step 4"
    assert runs[0].source == "dist-dml evaluate, step-4"
    (axes, *_) = curves_figure(runs, ["train/loss"]).axes
    assert [line.get_label() for line in axes.get_lines()] == ["one", "two"]
    np.testing.assert_allclose(np.asarray(axes.get_lines()[1].get_ydata())[-1], 0.3 / 4)


def test_the_best_value_of_a_column_is_marked_unless_all_are_equal() -> None:
    rows = [[0.5, 1.0, None, 0.1], [0.7, 1.0, 0.2, 0.2], [0.7, 1.0, 0.1, 0.1]]
    names = ["recall_at_1", "recall_at_2", "nmi", "equal_error_rate"]
    assert best_places(names, rows).T.tolist() == [
        [False, True, True],
        [False, False, False],
        [False, True, False],
        [True, False, True],
    ]


def test_only_settings_that_differ_are_listed_and_places_are_not(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path, "a", 0.2), make_run(tmp_path, "b", 0.2, rate=0.4)])
    assert config_differences(runs) == [("optimizer.learning_rate", ["0.1", "0.4"])]
    assert len(pairs_to_test([runs[0]] * 4)) == 6
    assert len(pairs_to_test([runs[0]] * 5)) == 4
