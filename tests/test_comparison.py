"""Comparisons without trainings: plan, choice, refusals, table, picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_dml.comparison import add_arguments, compare
from dist_dml.comparison_picture import comparison_picture
from dist_dml.comparison_plan import Trial, chosen_trial, method_names, plan_trials
from dist_dml.comparison_table import build_comparison, comparison_text
from dist_dml.data.index import Index
from dist_dml.errors import UsageError
from dist_dml.protocol_scores import SCORES, Spread
from dist_dml.tracking.recorder import Recorder
from dist_dml.tracking.run_files import identify_run

METRIC = "validation/cosine/map_at_r"


@pytest.fixture
def config_file(divisible: Index, tmp_path: Path) -> str:
    path = tmp_path / "methods.yaml"
    path.write_text(
        f"run: {{name: many, root: {tmp_path / 'runs'}}}\n"
        f"data: {{path: {divisible.folder}}}\n"
        "evaluation: {protocols: [{name: unseen, query: test}]}\n"
        "variants:\n"
        "  plain: {loss: {name: cross_entropy}}\n"
        "  arcface: {loss: {name: arcface}}\n"
        "  longer: {training: {max_seconds: 5}}\n"
        "  further: {training: {epochs: 99}}\n"
        "  elsewhere: {evaluation: {protocols: [{name: unseen, query: test, gallery: test}]}}\n"
    )
    return str(path)


RATES = ("optimizer.learning_rate=0.5", "optimizer.learning_rate=0.25 loss.ignore_index=-7")


def test_a_trial_is_the_first_fold_of_its_method_under_its_setting(config_file: str) -> None:
    planned = plan_trials(config_file, ["plain", "arcface"], RATES, ["data.batch_size=7"], 2, 1, 3)
    assert list(planned) == ["plain", "arcface"]
    assert [trial.name for trial in planned["arcface"]] == ["arcface/trial-0", "arcface/trial-1"]
    for method, trials in planned.items():
        for trial, rate in zip(trials, (0.5, 0.25), strict=True):
            for number, fold in enumerate(trial.folds):
                config = fold.config
                assert config.run.name == f"many/{trial.name}/fold-{number}"
                assert config.loss.name == {"plain": "cross_entropy"}.get(method, method)
                assert (config.optimizer.learning_rate, config.data.batch_size) == (rate, 7)
                assert (config.data.folds, config.data.fold) == (2, number)
                assert config.checkpoint.best_metric == METRIC
    # Without trials there is one, as configured.
    alone = plan_trials(config_file, ["plain"], [], [], 2, 1, 3)["plain"]
    assert [(trial.name, trial.words) for trial in alone] == [("plain/trial-0", ())]


def test_methods_are_the_variants_and_unknown_ones_are_named(config_file: str) -> None:
    assert method_names(config_file, []) == ["plain", "arcface", "longer", "further", "elsewhere"]
    assert method_names(config_file, ["arcface", "plain", "arcface"]) == ["arcface", "plain"]
    with pytest.raises(UsageError, match="did you mean arcface"):
        method_names(config_file, ["arcfase"])


def arguments_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_intermixed_args(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--method", "plain", "--method", "longer"],
            "longer/trial-0 has training.max_seconds 5.0",
        ),
        (["--method", "plain", "--method", "further"], "further/trial-0 has training.epochs 99"),
        (["--method", "plain", "--method", "elsewhere"], "elsewhere/trial-0 has the tested splits"),
        (
            ["--method", "plain", "--trial", "loss.scael=3"],
            "plain, --trial 'loss.scael=3': .*scale",
        ),
        (
            ["--method", "plain", "--trial", "run.name=b", "--trial", "loss.ignore_index=-3"],
            "has run.name",
        ),
        (["--method", "plain", "--folds", "9"], "has 4 training classes"),
        (["--method", "plain", "--workers", "0"], "--workers 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    config_file: str, tmp_path: Path, words: list[str], said: str
) -> None:
    words = ["--folds", "2", *words] if "--folds" not in words else words
    with pytest.raises(UsageError, match=said):
        compare(arguments_of(config_file, *words))
    assert not (tmp_path / "runs").exists()


def test_a_file_without_variants_has_nothing_to_compare(tmp_path: Path) -> None:
    path = tmp_path / "alone.yaml"
    path.write_text("run: {name: alone}\n")
    with pytest.raises(UsageError, match="has no variants"):
        compare(arguments_of(str(path)))


def trials_of(config_file: str, methods: list[str]) -> dict[str, list[Trial]]:
    return plan_trials(config_file, methods, RATES, [], 2, 1, 1)


def test_the_best_trained_trial_is_chosen_and_the_earlier_of_equal_ones(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = trials_of(config_file, ["plain"])["plain"]
    for scores, expected in (
        ((0.2, 0.3), 1),
        ((0.3, 0.3), 0),
        ((None, 0.1), 1),
        ((0.1, None), 0),
    ):
        found = dict(zip([trial.name for trial in trials], scores, strict=True))
        monkeypatch.setattr(Trial, "validation_score", lambda trial, found=found: found[trial.name])
        assert chosen_trial(trials) is trials[expected]
    monkeypatch.setattr(Trial, "validation_score", lambda _: None)
    assert chosen_trial(trials) is None
    # One trial needs no score: it is trained with the folds.
    assert chosen_trial(trials[:1]) is trials[0]


def report_of(trial: Trial, scores: list[float]) -> dict[str, Any]:
    """As `protocol.json`, and the run folders that it speaks of."""
    runs = []
    for fold, score in zip(trial.folds, scores, strict=True):
        fold.folder.mkdir(parents=True)
        identify_run(fold.folder, {"git_commit": "0123456789abcdef"})
        recorder = Recorder(fold.folder)
        recorder.record(8, 800, 4.0, {METRIC: score / 2})
        recorder.close()
        runs.append(
            {
                **{"run": str(fold.folder), "fold": fold.number, "seed": 0, "workers": 1},
                **{"config_hash": "abcdef1234567890", "best_step": 8, "total_steps": 10},
                **{"best_seconds": 4.0, "best_images_seen": 800, "total_images_seen": 1000},
                **{"peak_mebibytes": 100.0 + fold.number, "validation_map_at_r": score / 2},
                "scores": dict.fromkeys(SCORES, score),
            }
        )
    spread = vars(Spread.of(scores))
    return {
        **{"loss": trial.folds[0].config.loss.name, "embedding_dim": 128, "distance": "cosine"},
        **{"protocol": {"query": "test", "gallery": ""}, "runs": runs},
        "over_runs": {
            **dict.fromkeys((*SCORES, "validation_map_at_r"), spread),
            "best_seconds": vars(Spread.of([4.0, 4.0])),
            "best_images_seen": vars(Spread.of([800.0, 800.0])),
        },
        "over_repeats": {"concatenated": dict.fromkeys(SCORES, vars(Spread.of([0.9])))},
    }


@pytest.fixture
def comparison(config_file: str) -> dict[str, Any]:
    """`arcface` is better than `plain`; a trial of `plain` has failed."""
    planned = trials_of(config_file, ["plain", "arcface"])
    chosen: dict[str, Trial | None] = {
        "plain": planned["plain"][1],
        "arcface": planned["arcface"][0],
    }
    reports = {
        "plain": report_of(planned["plain"][1], [0.2, 0.4]),
        "arcface": report_of(planned["arcface"][0], [0.5, 0.6]),
    }
    failures = {"plain/trial-0/fold-0": "plain/trial-0/fold-0 failed while training: nan"}
    return json.loads(json.dumps(build_comparison(planned, chosen, reports, failures)))


def test_the_table_ranks_methods_and_leads_every_number_back_to_a_run(
    comparison: dict[str, Any],
) -> None:
    text = comparison_text(comparison)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert [name for name in rows if name in ("plain", "arcface")] == ["arcface", "plain"]
    main = next(line for line in lines if line[:1] == ["plain"])
    assert main[1:4] == [f"30.00 ± {100 * np.std([0.2, 0.4], ddof=1):.2f}"] * 3
    assert main[4:] == ["4.0 s ± 0", "800 ± 0", "101", "90.00", "90.00"]
    # The trials with their settings; which was chosen, and which failed.
    assert [f"`{rate}`" for rate in RATES] == rows["method"][1:3]
    assert rows["plain"][1] == "failed"
    assert rows["plain"][-1] == "trial-1"
    assert "Failed:\n\n- plain/trial-0/fold-0 failed while training: nan" in text
    # A line a run, with its folder, configuration and commit.
    for trial, scores in (("plain/trial-1", (20, 40)), ("arcface/trial-0", (50, 60))):
        for fold, score in enumerate(scores):
            row = rows[f"{trial}/fold-{fold}"]
            assert row[1:4] == ["0", "abcdef12", "8 of 10"]
            assert row[-1] == f"{score}.00"
    assert "commit 0123456789ab" in text
    assert "2 class-disjoint folds" in text


def test_a_method_that_failed_is_left_out_of_the_table(config_file: str) -> None:
    planned = trials_of(config_file, ["plain", "arcface"])
    reports = {"arcface": report_of(planned["arcface"][0], [0.5, 0.6])}
    failures = {"plain/trial-0/fold-0": "out of luck"}
    found = build_comparison(
        planned, {"plain": None, "arcface": planned["arcface"][0]}, reports, failures
    )
    assert [one["method"] for one in found["methods"]] == ["arcface"]
    assert "- out of luck" in comparison_text(found)


def test_the_picture_has_every_method_and_its_validation_curve(comparison: dict[str, Any]) -> None:
    scores, precisions, curves = comparison_picture(comparison).axes
    assert [tick.get_text() for tick in scores.get_yticklabels()] == ["arcface", "plain"]
    points = [line for line in scores.get_lines() if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in points] == pytest.approx([55, 30])
    assert len(precisions.get_lines()) == len(scores.get_lines())
    drawn = {line.get_label(): line for line in curves.get_lines()}
    assert drawn["arcface"].get_xdata().tolist() == [4.0]
    assert drawn["arcface"].get_ydata().tolist() == [25.0]
