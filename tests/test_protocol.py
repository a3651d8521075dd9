"""The fair protocol without trainings: planning, refusals, running, scores, table."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import scipy.stats

from dist_dml import protocol_jobs
from dist_dml.config import Config
from dist_dml.config_loading import resolve, to_yaml
from dist_dml.data.index import Index
from dist_dml.errors import RunError, UsageError
from dist_dml.protocol import add_arguments, protocol
from dist_dml.protocol_folds import (
    Fold,
    check_data,
    check_unchanged,
    finished_test,
    held_out_protocol,
    plan_folds,
)
from dist_dml.protocol_jobs import Job, Stage, last_words, run_jobs
from dist_dml.protocol_measure import read_embeddings, write_embeddings
from dist_dml.protocol_scores import (
    SCORES,
    Spread,
    combination_scores,
    concatenate,
    concatenated_scores,
)
from dist_dml.protocol_table import build_report, table_text
from dist_dml.retrieval.embeddings import Embeddings


@pytest.fixture
def config_file(divisible: Index, tmp_path: Path) -> str:
    """A configuration of that data, whose second measurement is of unseen classes."""
    path = tmp_path / "fair.yaml"
    path.write_text(
        f"run: {{name: fair, root: {tmp_path / 'runs'}, seed: 5}}\n"
        f"data: {{path: {divisible.folder}, num_classes: 4}}\n"
        "evaluation: {distances: [l2, cosine, probability_l2], protocols: [{name: known, query: "
        "seen, gallery: train}, {name: unseen, query: test}]}\n"
    )
    return str(path)


def test_a_fold_measures_validation_alone_and_is_selected_by_it(config_file: str) -> None:
    folds = plan_folds(config_file, ["optimizer.learning_rate=0.5"], 2, 2, threads=3)
    assert [fold.name for fold in folds] == [
        *("fold-0", "fold-1", "repeat-1/fold-0", "repeat-1/fold-1")
    ]
    for fold, seed in zip(folds, (5, 5, 6, 6), strict=True):
        config = fold.config
        assert (config.run.name, config.run.seed) == (f"fair/{fold.name}", seed)
        assert (config.data.folds, config.data.fold, config.data.num_classes) == (2, fold.number, 0)
        assert [(p.query, p.gallery) for p in config.evaluation.protocols] == [("validation", "")]
        assert config.checkpoint.best_metric == "validation/cosine/map_at_r"
        assert config.evaluation.distances == ("cosine",)
        assert (config.run.resume, config.engine.threads) == ("auto", 3)
        assert config.optimizer.learning_rate == 0.5


def test_the_test_is_the_first_measurement_of_a_split_that_no_fold_trains_on(
    config_file: str, divisible: Index
) -> None:
    fold = plan_folds(config_file, [], 2, 1, 1)[0]
    known = "evaluation.protocols=[{name: known, query: seen, gallery: train}]"
    chosen = held_out_protocol(plan_config(config_file, "run.seed=1"))
    assert (chosen.query, chosen.gallery) == ("test", "")
    with pytest.raises(UsageError, match="add the test split"):
        held_out_protocol(plan_config(config_file, known))
    assert check_data(fold, chosen).fingerprint == divisible.fingerprint


def plan_config(path: str, override: str) -> Config:
    return resolve(path, [override]).config


def test_a_test_split_with_training_classes_is_refused(config_file: str) -> None:
    fold = plan_folds(config_file, [], 2, 1, 1)[0]
    override = "evaluation.protocols=[{name: leaky, query: seen}]"
    with pytest.raises(UsageError, match="1 images of split 'seen' are of training classes"):
        check_data(fold, held_out_protocol(plan_config(config_file, override)))


def begun(config_file: str) -> Fold:
    fold = plan_folds(config_file, [], 2, 1, 1)[0]
    fold.folder.mkdir(parents=True)
    (fold.folder / "config.yaml").write_text(to_yaml(fold.config))
    return fold


def test_a_fold_goes_on_with_other_threads_but_not_with_other_settings(config_file: str) -> None:
    begun(config_file)
    free = ["tracking.every_steps=3", "engine.timeout_seconds=9"]
    check_unchanged(plan_folds(config_file, free, 2, 1, threads=2)[0])
    changed = plan_folds(config_file, ["optimizer.learning_rate=0.5"], 2, 1, 1)[0]
    with pytest.raises(UsageError, match=r"fold-0 was begun .*learning_rate 0\.001 -> 0\.5"):
        check_unchanged(changed)
    with pytest.raises(UsageError, match=r"data\.folds 2 -> 3"):
        check_unchanged(plan_folds(config_file, [], 3, 1, 1)[0])


def test_a_fold_is_done_once_its_test_and_its_embeddings_are_there(config_file: str) -> None:
    fold = begun(config_file)
    asked = held_out_protocol(plan_config(config_file, "run.seed=5"))
    assert finished_test(fold, asked) is None
    content = {"protocol": {"query": "test", "gallery": ""}, "embeddings": {"test": "e.npz"}}
    (fold.folder / "test.json").write_text(json.dumps(content))
    assert finished_test(fold, asked) is None
    (fold.folder / "e.npz").touch()
    assert finished_test(fold, asked) == content
    with pytest.raises(UsageError, match="the test is made once"):
        finished_test(fold, asked.model_copy(update={"query": "seen"}))


def arguments_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_intermixed_args(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folds", "1"], "--folds 1"),
        (["--workers", "0"], "--workers 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--all-combinations"], "give --repeats 3"),
        (["--folds", "9"], "has 4 training classes"),
        (["data.path=nowhere"], "data.path=nowhere"),
        (["evaluation.protocols=[{name: a, query: nothing}]"], "no samples of split 'nothing'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    config_file: str, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        protocol(arguments_of(config_file, *words))
    assert not (tmp_path / "runs").exists()


def test_a_launcher_around_the_command_is_refused(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="--workers"):
        protocol(arguments_of(config_file))


# A process that writes its number, starts another in a session of its own, and waits.
FAMILY = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " start_new_session=True)\n"
    "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
    "time.sleep(60)\n"
)


def family_of(path: Path) -> list[int]:
    """The process numbers in a file, as soon as it has both."""
    deadline = time.monotonic() + 20
    while not path.exists() or len(path.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(text) for text in path.read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether it runs; the dead of a container may never be buried."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", ["asker goes", "guard is told", "leader is killed"])
def test_the_guard_leaves_no_process_behind(tmp_path: Path, how: str) -> None:
    numbers = tmp_path / "numbers"
    command = [sys.executable, "-c", FAMILY, str(numbers)]
    guarded = [sys.executable, "-m", "dist_dml.protocol_guard", *command]
    with subprocess.Popen(guarded, stdin=subprocess.PIPE) as guard:
        family = family_of(numbers)
        if how == "asker goes":
            assert guard.stdin is not None
            guard.stdin.close()
        elif how == "guard is told":
            guard.send_signal(signal.SIGTERM)
        else:
            time.sleep(1.5)  # The guard has looked around by then.
            os.kill(family[0], signal.SIGKILL)
        code = guard.wait(20)
    assert code == 128 + (signal.SIGKILL if how == "leader is killed" else signal.SIGTERM)
    assert not any(map(is_alive, family))


def job(name: str, code: str, folder: Path, *words: str) -> Job:
    command = (sys.executable, "-c", code, *words)
    return Job(name, (Stage("training", command, folder / f"{name}.log"),))


def test_a_fold_that_fails_ends_the_others_and_is_named_with_its_reason(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    fails = (
        "import os, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
        "print('dist_dml: error: out of luck'); print('a trace after it'); sys.exit(3)"
    )
    jobs = [
        job("fold-0", FAMILY, tmp_path, str(numbers)),
        job("fold-1", fails, tmp_path, str(numbers)),
        job("fold-2", "open('started', 'w')", tmp_path),
    ]
    screen = io.StringIO()
    with (tmp_path / "lock").open("w") as lock, pytest.raises(RunError) as caught:
        run_jobs(jobs, [{}, {}], 0, lock.fileno(), screen)
    said = str(caught.value)
    assert said.startswith("fold-1 failed while training (exit code 3): out of luck")
    assert str(tmp_path / "fold-1.log") in said
    assert not any(map(is_alive, family_of(numbers)))
    assert not (tmp_path / "fold-2.log").exists()


def test_stages_follow_each_other_and_slots_are_used_in_parallel(tmp_path: Path) -> None:
    # Each waits for the other's file: one after the other would never end.
    meet = (
        "import os, sys, time\n"
        "open(sys.argv[1], 'w').close()\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.02)\n"
        "print(os.environ['SLOT'])"
    )
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    jobs = []
    for name, own in (("fold-0", files), ("fold-1", files[::-1])):
        log = tmp_path / f"{name}.log"
        first = Stage("training", (sys.executable, "-c", meet, *own), log)
        second = Stage("testing", (sys.executable, "-c", "print('tested')"), log)
        jobs.append(Job(name, (first, second)))
    screen = io.StringIO()
    with (tmp_path / "lock").open("w") as lock:
        run_jobs(jobs, [{"SLOT": "left"}, {"SLOT": "right"}], 2, lock.fileno(), screen)
    logs = [(tmp_path / f"fold-{i}.log").read_text() for i in (0, 1)]
    assert logs == ["left\ntested\n", "right\ntested\n"]
    assert screen.getvalue().count(": done in ") == 2


def test_a_running_fold_shows_its_steps_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_jobs, "_FILE_SECONDS", 0.3)
    trains = (
        "import time\n"
        "print('runs/fair/fold-0: 40 steps, from step 10 of 30 images, 5 classes', flush=True)\n"
        "time.sleep(1)\n"
        "print('step 25: evaluated in 0.1 s', flush=True)\n"
        "time.sleep(1.5)"
    )
    screen = io.StringIO()
    with (tmp_path / "lock").open("w") as lock:
        run_jobs([job("fold-0", trains, tmp_path)], [{}], 3, lock.fileno(), screen)
    shown = screen.getvalue()
    assert "folds: 3 done, 1 running, 0 waiting" in shown
    # 15 of its 30 steps took about a second.
    assert re.search(r"fold-0  training  25/40, 0:0[0-4] left: step 25: evaluated", shown), shown
    assert re.search(r"about 0:0[0-4] left", shown)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("dist_dml: error: first\ndist_dml: error: out of luck\nTraceback\n====\n", "out of luck"),
        (
            "  traceback : Signal 15 (SIGTERM) received by PID 8\n"
            "  traceback : Signal 9 (SIGKILL) received by PID 7\n====\n",
            "Signal 9 (SIGKILL) received",
        ),
        ("step 3\nKilled  \n-----\n\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_of_a_failure_is_found_below_what_launchers_print(
    output: str, reason: str
) -> None:
    assert last_words(output).startswith(reason)


def embeddings(seed: int, width: int) -> Embeddings:
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 5)
    vectors = draw.normal(size=(30, width)) * draw.uniform(0.1, 9, (30, 1)) + labels[:, None]
    return Embeddings(vectors.astype(np.float32), labels, np.arange(30) + 100)


def brute_force(parts: list[Embeddings]) -> dict[str, float]:
    """P@1, R-precision and MAP@R of the concatenation, query by query in float64."""
    units = [p.vectors / np.linalg.norm(p.vectors.astype(float), axis=1)[:, None] for p in parts]
    vectors, labels = np.concatenate(units, axis=1), parts[0].labels
    found = []
    for i in range(len(labels)):
        order = [j for j in np.argsort(-(vectors @ vectors[i]), kind="stable") if j != i]
        hits = (labels[order] == labels[i]).astype(float)
        total = int(hits.sum())
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        own = (precision * hits)[:total].sum() / total
        found.append([hits[0], hits[:total].sum() / total, own])
    return dict(zip(SCORES, np.mean(found, axis=0).tolist(), strict=True))


def test_the_concatenated_score_equals_brute_force(tmp_path: Path) -> None:
    parts = [embeddings(seed, width) for seed, width in ((0, 4), (1, 4), (2, 6))]
    folders, tests = [], []
    for i, part in enumerate(parts):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        write_embeddings(folders[-1] / "e.npz", part)
        assert np.array_equal(read_embeddings(folders[-1] / "e.npz").vectors, part.vectors)
        protocol = {"query": "test", "gallery": ""}
        tests.append({"protocol": protocol, "embeddings": {"test": "e.npz"}})
    scores = concatenated_scores(folders, tests)
    expected = brute_force(parts)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert scores != pytest.approx(brute_force(parts[:1]), abs=1e-3)
    assert np.linalg.norm(concatenate(parts).vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_all_combinations_take_each_fold_from_any_repeat(tmp_path: Path) -> None:
    parts = [embeddings(seed, 4) for seed in range(6)]
    folders, tests = [], []
    for i, part in enumerate(parts):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        write_embeddings(folders[-1] / "e.npz", part)
        protocol = {"query": "test", "gallery": ""}
        tests.append({"protocol": protocol, "embeddings": {"test": "e.npz"}})
    # Three repeats of two folds: 0 1, 2 3, 4 5.
    found = combination_scores(folders, tests, 2)
    pairs = [(first, second) for first in (0, 2, 4) for second in (1, 3, 5)]
    for scores, (first, second) in zip(found, pairs, strict=True):
        assert scores == pytest.approx(brute_force([parts[first], parts[second]]), abs=1e-12)


def test_folds_that_embedded_different_images_are_not_concatenated() -> None:
    one = embeddings(0, 4)
    other = Embeddings(one.vectors, one.labels, one.ids + 1)
    with pytest.raises(RunError, match="different images"):
        concatenate([one, other])


def test_the_spread_of_values_is_students() -> None:
    assert Spread.of([0.5]) == Spread(0.5, None, None)
    two = Spread.of([0.0, 2.0])
    assert (two.mean, two.interval) == (1.0, None)
    assert two.deviation == pytest.approx(2**0.5)
    for count in range(3, 32):
        values = np.random.default_rng(count).normal(size=count)
        low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
        spread = Spread.of(values.tolist())
        assert spread.mean - (spread.interval or 0) == pytest.approx(low, rel=1e-4, abs=1e-5)
        assert spread.mean + (spread.interval or 0) == pytest.approx(high, rel=1e-4, abs=1e-5)


def result_of(fold: int, seed: int, score: float) -> dict:
    return {
        **{"fold": fold, "seed": seed, "checkpoint": "step-000000008", "distance": "cosine"},
        **{"validation_map_at_r": score / 2, "best_step": 8, "total_steps": 10},
        **{"best_seconds": 2.5, "best_images_seen": 1200, "peak_mebibytes": None},
        **{"protocol": {"query": "test", "gallery": ""}, "embedding_dim": 128},
        "scores": dict.fromkeys(SCORES, score),
    }


def test_the_table_has_mean_and_deviation_of_folds_and_the_interval_of_repeats(
    config_file: str, divisible: Index
) -> None:
    folds = plan_folds(config_file, [], 2, 3, 1)
    values = [0.2, 0.4, 0.3, 0.5, 0.4, 0.6]
    tests = [result_of(f.number, 5 + f.repeat, v) for f, v in zip(folds, values, strict=True)]
    together = [dict.fromkeys(SCORES, value) for value in (0.5, 0.6, 0.7)]
    combined = [dict.fromkeys(SCORES, value) for value in (0.1, 0.2, 0.3, 0.8)]
    report = build_report(divisible, folds, tests, together, ["paper C  some row"], combined)
    text = table_text(json.loads(json.dumps(report)))
    assert report["name"] == "fair"
    assert [r["separated"]["map_at_r"] for r in report["repeats"]] == pytest.approx([0.3, 0.4, 0.5])
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert rows["mean"].split("|")[2].strip() == "20.00"
    assert rows["mean"].split("|")[-2].strip() == "40.00"
    assert rows["deviation"].split("|")[-2].strip() == f"{100 * np.std(values, ddof=1):.2f}"
    half = 100 * scipy.stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert f"40.00 ± {half:.2f}" in rows["separated (128-D, mean of 2)"]
    assert f"60.00 ± {half:.2f}" in rows["concatenated (256-D)"]
    assert rows["concatenated, mean of 4 combinations of repeats"].count("35.00") == 3
    assert "0/1" in rows
    assert "2/0" in rows
    assert "paper C  some row" in text
