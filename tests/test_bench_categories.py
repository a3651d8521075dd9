"""The benchmark over categories: its ledger, its arithmetic, its verdicts, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))  # The modules of a tool lie beside it and are no package.

import bench_categories as tool  # noqa: E402
import bench_categories_child as child  # noqa: E402
import bench_categories_figures as figures  # noqa: E402
import bench_categories_ledger as ledgers  # noqa: E402
import bench_categories_objectives as objectives  # noqa: E402
import bench_categories_report as report  # noqa: E402
import bench_categories_scores as scores  # noqa: E402
import bench_categories_steps as steps  # noqa: E402
import bench_categories_tracking as tracking  # noqa: E402

from dist_dml.config_loading import resolve  # noqa: E402
from dist_dml.tracking.recorder import read_metrics  # noqa: E402

GIBIBYTE = 2**30


def request_of(name="cross_entropy", num_classes=64, rows=16, dim=8):
    return child.Request(name, num_classes, rows, dim, 1)


def step_row(name, num_classes, seconds, error=None):
    row = steps.point_of(request_of(name, num_classes), 10)
    if error:
        return row | {"error": error, "machine": "m"}
    return row | {
        "seconds_median": seconds,
        "seconds_spread": seconds / 10,
        "head_seconds_median": seconds / 2,
        "head_seconds_spread": 0.0,
        "epoch_seconds": 10 * seconds,
        "extra_bytes": 3 * 2**20,
        "step_extra_bytes": 2**20,
        "seconds": [seconds, seconds],
        "head_seconds": [seconds / 2] * 2,
        "machine": "m",
    }


def asked(data="synthetic-100", images=2000, targets=(0.5,)):
    return scores.Asked(data, images, 16, 8, 1, "recall_at_1", targets, 100, 20.0)


def score_row(name, data, seconds, best=0.9):
    row = ledgers.point("categories", "score", name, asked(data).settings())
    curve = [[16.0, 256.0, seconds or 20.0, best]]
    return row | {"seconds_median": seconds, "best": best, "curve": curve, "machine": "m"}


def test_the_ledger_goes_on_where_it_was_and_a_torn_line_is_no_row(tmp_path):
    ledger = ledgers.Ledger(tmp_path)
    first, failed = step_row("l1", 100, 1.0), step_row("l1", 1000, 0.0, "does not fit: too large")
    ledger.add(first)
    ledger.add(failed)
    with ledger.path.open("ab") as stream:
        stream.write(b'{"key": "torn')
    again = ledgers.Ledger(tmp_path)
    assert set(again.rows) == {first["key"], failed["key"]}
    assert again.has(first["key"], retry=True)
    assert again.has(failed["key"])
    assert not again.has(failed["key"], retry=True)
    again.add(step_row("l1", 1000, 2.0))
    found = ledgers.Ledger(tmp_path).rows[failed["key"]]
    assert (found["seconds_median"], found["error"]) == (2.0, None)
    assert "date" in found


def test_a_point_is_known_by_what_was_asked_for():
    keys = {steps.point_of(request_of(n, c), 10)["key"] for n in ("l1", "l2") for c in (10, 100)}
    assert len(keys) == 4
    assert steps.point_of(request_of(), 10)["key"] == steps.point_of(request_of(), 10)["key"]
    # Targets below the last one are read off the same curve.
    settings = [asked(targets=t).settings() for t in ((0.5,), (0.2, 0.5), (0.6,))]
    assert settings[0] == settings[1] != settings[2]


@pytest.mark.parametrize("name", list(objectives.OBJECTIVES))
def test_every_objective_is_a_configuration_that_is_accepted(name, tmp_path):
    config = objectives.step_config(name, 1000, 16, 8, 1)
    assert (config.data.num_classes, config.data.batch_size) == (1000, 16)
    for data in ("synthetic-1000", "glyphs"):
        overrides = scores.training_overrides(name, asked(data), tmp_path, tmp_path / "runs/x")
        trained = resolve(None, overrides).config
        # The time to a score must not depend on the limit.
        assert trained.schedule.name == "constant"
        assert trained.loss.name == config.loss.name
        assert trained.classes == config.classes
        of_pairs = objectives.OBJECTIVES[name].of_pairs
        assert (trained.data.order == "balanced") == of_pairs
        if of_pairs:  # 2,000 images in 1,000 classes have no four of a class.
            assert trained.data.samples_per_class == (2 if data == "synthetic-1000" else 4)


def test_synthetic_data_have_as_many_images_and_the_same_unseen_classes_for_any_number_of_classes():
    commands = [
        scores.pack_command(asked(f"synthetic-{c}", 20_000), Path("x")) for c in (100, 2000)
    ]
    options = [dict(zip(c[6::2], c[7::2], strict=True)) for c in commands]
    images = [int(o["--classes"]) * int(o["--train-per-class"]) for o in options]
    assert images == [20_000, 20_000]
    assert options[0]["--test-classes"] == options[1]["--test-classes"]
    assert scores.pack_command(asked("glyphs"), Path("x"))[3:] == ["pack", "glyphs", "x"]


def test_the_time_to_a_score_is_that_of_the_first_evaluation_that_reaches_it():
    curve = [[10, 160, 1.0, 0.2], [20, 320, 2.0, 0.5], [30, 480, 3.0, 0.4], [40, 640, 4.0, 0.9]]
    assert scores.time_to(curve, 0.5) == 2.0
    assert scores.time_to(curve, 0.51) == 4.0
    assert scores.time_to(curve, 0.91) is None


def test_an_epoch_ends_with_a_short_batch():
    assert objectives.epoch_seconds(0.5, 100, 10, 128) == pytest.approx(0.5 * 8)


def test_heads_that_do_not_fit_together_come_later_and_those_that_never_fit_are_named():
    million = [request_of(n, 10**6, dim=128) for n in ("cross_entropy", "l1", "triplet", "ccp")]
    one = objectives.needed_bytes("l1", 10**6, 128)
    assert one > 8 * 10**6 * 128  # Weights and momentum.
    now, later, never = steps.fitting(million, 1.5 * one + steps.RESERVE_BYTES)
    assert [r.objective for r in now] == ["cross_entropy", "triplet"]
    assert [r.objective for r in later] == ["l1"]
    assert [r.objective for r in never] == ["ccp"]
    assert steps.fitting(million, 64 * GIBIBYTE)[0] == million
    assert not steps.fitting(million[:1], one)[0]  # The reserve is kept.


def test_slow_points_have_fewer_turns_but_enough_for_quartiles():
    assert steps.turns_due(0.01, 9) == 9
    assert steps.turns_due(3.0, 9) == 4
    assert steps.turns_due(1000.0, 9) == 3
    assert child.steps_of_a_turn(1e-6) == 20
    assert child.steps_of_a_turn(5.0) == 1


@pytest.mark.parametrize("name", ["cross_entropy", "partial_fc", "xbm", "ccp"])
def test_a_step_of_each_kind_of_head_is_measured(name):
    threads = torch.get_num_threads()
    found, facts = child.prepare(request_of(name, num_classes=40))
    torch.set_num_threads(threads)
    found.whole()
    found.head_alone()
    assert facts["setup_seconds"] > 0
    assert facts["first_seconds"] > 0
    if facts["extra_bytes"] is not None:
        assert facts["extra_bytes"] >= 0


def test_pairs_have_partners_in_the_batch_and_class_losses_need_none():
    pairs = child.draw_batch(objectives.step_config("triplet", 1000, 16, 8, 1), 1000)
    assert sorted(pairs.labels.unique(return_counts=True)[1].tolist()) == [4] * 4
    few = child.draw_batch(objectives.step_config("triplet", 3, 16, 8, 1), 3)
    assert int(few.labels.max()) < 3
    assert len(few.labels) == 16


def test_the_verdict_says_by_how_much_cross_entropy_is_faster_or_slower():
    rows = [
        *(step_row("cross_entropy", c, s) for c, s in ((100, 0.010), (10**6, 1.0))),
        *(step_row("triplet", c, 0.020) for c in (100, 10**6)),
        *(step_row("spce", c, 0.030) for c in (100, 10**6)),
        step_row("ccp", 10**6, 0.0, "does not fit: needs about 20 GiB"),
        score_row("cross_entropy", "synthetic-100", 2.0),
        score_row("triplet", "synthetic-100", 6.0),
        score_row("cross_entropy", "glyphs", 4.0),
        score_row("triplet", "glyphs", None, best=0.3),
    ]
    assert report.step_ratios(rows) == {
        100: (pytest.approx(2.0), "triplet"),
        10**6: (pytest.approx(0.02), "triplet"),
    }
    assert report.score_ratios(rows) == {
        "synthetic-100": (pytest.approx(3.0), "triplet", False),
        "glyphs": (pytest.approx(5.0), "triplet", True),
    }
    lines = "\n".join(report.verdicts(rows))
    assert "2.00x faster | a step of cross-entropy at C = 100" in lines
    assert "50.00x slower | a step of cross-entropy at C = 1,000,000" in lines
    assert "NO  a step of cross-entropy gains" in lines
    assert "NO  500 times as fast" in lines
    assert "at least 5x, on glyphs" in lines


def test_the_table_hides_no_point():
    rows = [
        step_row("cross_entropy", 100, 0.012),
        step_row("ccp", 100, 0.0, "does not fit: needs about 20 GiB, 10 GiB are free"),
        score_row("triplet", "glyphs", None, best=0.31),
    ]
    text = report.document(rows, "a machine")
    assert "| cross-entropy | 12 ms (10%) |" in text
    assert "| multi-similarity, CCP (paper C) | does not fit |" in text
    assert "- multi-similarity, CCP (paper C), C = 100: does not fit: needs about 20 GiB" in text
    assert "| triplet, semi-hard | > 20.0 s (0.310) |" in text
    assert report.verdicts(rows)[0].startswith("-   nothing to judge")


def test_times_and_sizes_have_units_that_one_reads():
    assert [report.seconds_text(s) for s in (2e-5, 0.0123, 4.1, 200, 5400, 2e5)] == [
        "20 us",
        "12.3 ms",
        "4.1 s",
        "3.33 min",
        "1.5 h",
        "2.31 days",
    ]
    assert (report.bytes_text(3 * 2**20), report.bytes_text(2**31)) == ("3 MiB", "2 GiB")


def test_figures_are_drawn_from_what_there_is(tmp_path):
    rows = [
        *(step_row(n, c, 0.01) for n in ("cross_entropy", "triplet") for c in (100, 1000)),
        score_row("cross_entropy", "synthetic-100", 2.0),
        score_row("triplet", "synthetic-100", None),
        score_row("triplet", "glyphs", 3.0),
    ]
    paths = figures.write_figures(rows, tmp_path)
    assert [path.name for path in paths] == ["categories_time.png", "categories_scores.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert figures.write_figures([], tmp_path) == []


def test_a_point_becomes_a_run_folder_once(tmp_path):
    one = tracking.Point(
        "l1-100",
        {"objective": "l1"},
        objectives.step_config("l1", 100, 16, 8, 1),
        [tracking.Record(1, 16, 0.5, {"step_seconds": 0.5})],
    )
    whole = tracking.Benchmark("categories", tmp_path, {"benchmark": "categories"}, [one])
    folder = tracking.write_point(whole, one, tmp_path / "points/l1-100")
    assert tracking.write_point(whole, one, folder) == folder
    curve = read_metrics(folder)["step_seconds"]
    assert curve.value.tolist() == [0.5]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["objective"], facts["benchmark"]) == ("l1", "categories")
    assert resolve(folder / "config.yaml", []).config.loss.name == "l1"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--out"),
        (["--out", "x", "--rows", "18"], "multiple of 4"),
        (["--out", "x", "--score-data", "cifar"], "synthetic-C"),
        (["--out", "x", "--categories", "1"], "2 or more"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(arguments, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


def run_tool(*arguments):
    command = [sys.executable, str(TOOLS / "bench_categories.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's client asks its database in deprecated ways.
def test_points_are_measured_once_and_stand_in_mlflow(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    given = ["--out", tmp_path, "--objectives", "triplet"]
    given += ["--categories", 64, 256, "--rows", 16, "--dim", 8, "--repeats", 2]
    given += ["--score-data", "synthetic-40", "--score-images", 400, "--targets", 0.02]
    first = run_tool(*given)
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "categories.json").read_text())
    assert [row["error"] for row in rows] == [None] * 3
    assert all(row["seconds_median"] > 0 for row in rows)
    assert all(row["extra_bytes"] > 0 for row in rows if row["kind"] == "step")
    lines = (tmp_path / "ledger.jsonl").read_text()

    again = run_tool(*given, "--mlflow")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "ledger.jsonl").read_text() == lines
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["categories"]
    children = [run for run in runs if run not in parents]
    assert len(children) == 3
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    curve = client.get_metric_history(parents[0].info.run_id, "step_seconds/triplet")
    assert [one.step for one in curve] == [64, 256]
    of_score = [run for run in children if run.data.tags["kind"] == "score"]
    assert all("seconds_to_target" in run.data.metrics for run in of_score)
    artifacts = [one.path for one in client.list_artifacts(parents[0].info.run_id, "report")]
    assert "report/categories_time.png" in artifacts


@pytest.mark.slow
def test_a_point_that_takes_too_long_is_a_row_that_says_so(tmp_path):
    rows = []
    steps.measure_classes([request_of("cross_entropy", 64)], 10, 2, 0.01, rows.append)
    said = "time limit: building the head and its first steps took more than 0.01 s"
    assert [row["error"] for row in rows] == [said]
