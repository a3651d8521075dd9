"""The grid of paper A reads what runs have written, repeats nothing, and mixes nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_dml.config_loading import resolve, to_yaml
from dist_dml.data.pack.digits import pack_digits
from dist_dml.errors import RunError, UsageError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs" / "paper_a").glob("*.yaml"))
CONFIG = """
evaluation: {protocols: [{name: seen, query: seen, gallery: train}]}
checkpoint: {best_metric: seen/cosine/map_at_r}
tracking: {mlflow: false}
"""


def load_tool():
    """The module of tools/, which is no package."""
    path = ROOT / "tools" / "paper_a_grid.py"
    specification = importlib.util.spec_from_file_location("paper_a_grid", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["paper_a_grid"] = module
    specification.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "closed.yaml"
    path.write_text(CONFIG)
    return str(path)


def grid_of(config, tmp_path, rows=("p1",), seeds=(0,), distances=("l2", "metric(p=0.5)")):
    return tool.Grid(config, tmp_path / "out", tuple(rows), tuple(distances), tuple(seeds), ())


def write_run(grid, row, seed, scores, status="FINISHED", fingerprint="f", time=1.0):
    """A run folder as training leaves it, by hand."""
    folder = grid.folder(row, seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(grid.wanted(row, seed)))
    head = {"images_seen": 1, "seconds": 2.5}
    lines = [{"step": 1, **head, "name": name, "value": 0.125} for name in scores]
    lines += [{"step": 9, **head, "name": name, "value": value} for name, value in scores.items()]
    lines += [{"step": 9, **head, "seconds": 7.5, "name": "train/loss", "value": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"status": "RUNNING", "attempt": "a", "time": 0.0}, {"status": status, "time": time}]
    (folder / "artifacts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "run.json").write_text(json.dumps({"dataset_fingerprint": fingerprint}))
    return folder


def scores_of(l2: float, metric: float, share: float | None = None) -> dict[str, float]:
    """Every score of two distances, and a certificate."""
    found = {}
    for number, score in enumerate(tool.SCORES):
        found[f"seen/l2/{score}"] = l2 + number / 100
        found[f"seen/metric_p0.5/{score}"] = metric + number / 100
    if share is not None:
        found["seen/certificate/metric_p0.5/certified_share"] = share
        found["seen/certificate/metric_p0.5/accuracy"] = share + 0.1
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_rows_are_those_of_the_papers_table_3_with_their_tiers():
    k = {name: row.parameters.k for name, row in tool.ROWS.items() if row.parameters}
    p = {name: row.parameters.p for name, row in tool.ROWS.items() if row.parameters}
    assert p == {"p1": 1, "p0.99": 0.99, "p0.9": 0.9, "p0.9_a3": 0.9, "p0.5_metric": 0.5}
    assert k["p1"] == k["p0.99"] == k["p0.9"] == pytest.approx(1 / (1 + 1e-6), rel=1e-12)
    assert k["p0.9_a3"] == 0.25
    assert k["p0.5_metric"] == pytest.approx(0.8284271247)
    # a = 3 misses the condition by a hair: K(0.9) = 0.24993.
    tiers = [row.tier for row in tool.ROWS.values()]
    assert tiers == ["weak", "weak", "weak", "weak", "metric", "-"]


def test_a_rows_settings_resolve_to_its_very_parameters(config, tmp_path):
    for row, expected in tool.ROWS.items():
        loss = grid_of(config, tmp_path).wanted(row, 3).loss
        assert loss.name == expected.loss
        if expected.parameters is not None:
            assert loss.metric_parameters == expected.parameters


def test_distances_have_the_tier_that_the_inequality_gives():
    texts = (*tool.DISTANCES, "metric(p=0.1,top=64)", "metric(a=1e-6,p=0.1)")
    assert [tool.distance_tier(text) for text in texts] == [
        *("metric", "metric", "semi", "weak", "metric", "metric", "metric", "metric"),
        *("metric of the top 64", "weak"),
    ]


def test_the_last_score_of_every_distance_is_read(config, tmp_path):
    folder = write_run(grid_of(config, tmp_path), "p1", 0, scores_of(0.5, 0.75, 0.625), time=3.0)
    run = tool.read_run(folder, "seen")
    assert run.scores["l2"] == {s: 0.5 + i / 100 for i, s in enumerate(tool.SCORES)}
    assert run.scores["metric_p0.5"]["map_at_r"] == 0.75 + 0.04
    assert run.certified == {"metric_p0.5": 0.625}
    assert run.accuracy == 0.725
    assert (run.seconds, run.finished, run.fingerprint) == (7.5, 3.0, "f")
    with pytest.raises(UsageError, match="no score of protocol 'unseen'"):
        tool.read_run(folder, "unseen")


def test_the_table_holds_every_pair_and_marks_the_best_of_a_column(config, tmp_path):
    grid = grid_of(config, tmp_path, rows=("p1", "cross_entropy"))
    write_run(grid, "p1", 0, scores_of(0.5, 0.75, 0.625))
    write_run(grid, "cross_entropy", 0, scores_of(0.75, 0.25))
    rows = tool.as_rows(grid, tool.collect(grid, {}))
    lines = tool.tables(rows, grid.distances).splitlines()
    assert cells(lines[0])[3:] == ["certified (p0.5)", "seconds", "runs"]
    assert cells(lines[2]) == ["p = 1, a = 1e-6", "weak", "72.50", "62.50", "8", "1"]
    assert cells(lines[3]) == ["cross-entropy", "-", "-", "-", "8", "1"]
    assert cells(lines[5])[3:] == ["NMI", "R@1", "F@1", "RP", "MAP@R"]
    plain = ["75.00", "76.00", "77.00", "78.00", "79.00"]
    bold = [f"**{text}**" for text in plain]
    assert cells(lines[7])[1:] == ["`l2`", "metric", *(f"{x}.00" for x in range(50, 55))]
    # Both reach the best mean.
    assert cells(lines[8]) == ["", "`metric(p=0.5)`", "metric", *bold]
    assert cells(lines[9]) == ["cross-entropy", "`l2`", "metric", *bold]
    assert cells(lines[10])[3:] == [f"{x}.00" for x in range(25, 30)]
    assert len(lines) == 11


def test_several_seeds_give_mean_and_standard_deviation(config, tmp_path):
    grid = grid_of(config, tmp_path, seeds=(0, 4))
    write_run(grid, "p1", 0, scores_of(0.5, 0.7))
    write_run(grid, "p1", 4, scores_of(0.6, 0.7))
    (row,) = tool.as_rows(grid, tool.collect(grid, {}))
    value = row["scores"]["l2"]["nmi"]
    assert value["mean"] == pytest.approx(0.55)
    assert value["spread"] == pytest.approx(0.1 / 2**0.5)
    assert value["values"] == [0.5, 0.6]
    assert tool.percent(value) == "55.00 ± 7.07"
    assert row["config"]["seeds"] == [0, 4]
    assert {"name", "variant", "seconds_median", "seconds_spread", "machine", "date"} <= set(row)
    json.dumps(row)


def test_a_distance_without_a_score_is_a_dash(config, tmp_path):
    grid = grid_of(config, tmp_path, distances=("l2", "cosine"))
    write_run(grid, "p1", 0, scores_of(0.5, 0.7))
    lines = tool.tables(tool.as_rows(grid, tool.collect(grid, {})), grid.distances).splitlines()
    assert cells(lines[-1]) == ["", "`cosine`", "semi", *("-" * 5)]


def test_a_finished_run_is_recognised_and_another_setting_refused(config, tmp_path):
    grid = grid_of(config, tmp_path, rows=("p1", "p0.99"))
    assert not tool.is_finished(grid.folder("p1", 0), grid.wanted("p1", 0))
    folder = write_run(grid, "p1", 0, scores_of(0.5, 0.7))
    assert tool.is_finished(folder, grid.wanted("p1", 0))
    killed = write_run(grid, "p0.99", 0, {}, status="KILLED")
    assert not tool.is_finished(killed, grid.wanted("p0.99", 0))
    with pytest.raises(UsageError, match=r"other settings \(loss\.p 1\.0 -> 0\.99"):
        tool.is_finished(folder, grid.wanted("p0.99", 0))
    (folder / "config.yaml").write_text(to_yaml(resolve(None, ["training.epochs=3"]).config))
    with pytest.raises(UsageError, match=r"other settings.*--out"):
        tool.train_missing(grid)


def test_rows_on_different_data_are_not_put_into_one_table(config, tmp_path):
    grid = grid_of(config, tmp_path, rows=("p1", "p0.9"))
    write_run(grid, "p1", 0, scores_of(0.5, 0.7))
    write_run(grid, "p0.9", 0, scores_of(0.5, 0.7), fingerprint="other")
    with pytest.raises(UsageError, match="runs on different data"):
        tool.collect(grid, {})


def test_failed_runs_are_left_out_and_named(config, tmp_path):
    grid = grid_of(config, tmp_path, rows=("p1", "p0.9"))
    write_run(grid, "p1", 0, scores_of(0.5, 0.7))
    found = tool.collect(grid, {"p0.9-seed0": 1})
    assert list(found) == ["p1"]
    text = tool.report(grid, tool.as_rows(grid, found), ["p0.9-seed0"])
    assert text.endswith("Failed, and left out: p0.9-seed0.\n")
    with pytest.raises(RunError, match="no training has finished"):
        tool.collect(grid, {"p1-seed0": 1, "p0.9-seed0": 1})


def test_finished_runs_become_a_table_without_training(config, tmp_path, capsys):
    grid = grid_of(config, tmp_path, rows=("p1", "p0.9"))
    for row in grid.rows:
        write_run(grid, row, 0, scores_of(0.5, 0.7))
    arguments = ["--config", config, "--out", str(grid.out), "--rows", "p1", "p0.9"]
    assert tool.main([*arguments, "--distances", *grid.distances]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 2
    assert (grid.out / "grid.md").read_text() in printed
    rows = json.loads((grid.out / "grid.json").read_text())
    assert [row["variant"] for row in rows] == ["p1", "p0.9"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "p2"], "--rows p2: no such row; choose of p1, p0.99"),
        (["--distances", "metric(p=2)"], "p=2 breaks 0 < p <= 1"),
        (["loss.p=0.3"], "the grid sets loss.p itself"),
        (["data.bach_size=3"], "did you mean data.batch_size"),
        (["--seeds", "x"], "invalid int value"),
    ],
)
def test_a_mistake_is_one_line_before_any_training(config, capfd, arguments, message, tmp_path):
    assert tool.main(["--config", config, "--out", str(tmp_path / "out"), *arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_overrides_behind_a_list_of_rows_are_overrides(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tool, "run", lambda arguments: seen.append(tool._grid(arguments)) or 0)
    given = ["--config", config, "--rows", "p1", "p0.9", "training.epochs=3", "--seeds", "1", "2"]
    assert tool.main([*given, "data.batch_size=7"]) == 0
    (grid,) = seen
    assert (grid.rows, grid.seeds) == (("p1", "p0.9"), (1, 2))
    assert grid.overrides == ("training.epochs=3", "data.batch_size=7")
    assert grid.out == Path("runs/grid_closed")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_paper_a_fits_the_grid(path, tmp_path):
    assert path.read_text().startswith("# Command:")
    config = resolve(path, []).config
    assert config.loss.name == "l1"
    assert [(p.query, p.gallery) for p in config.evaluation.protocols] == [("seen", "train")]
    augment = config.data.augment.model_dump()
    assert augment == type(config.data.augment)().model_dump()
    grid = tool.Grid(str(path), tmp_path, tuple(tool.ROWS), tool.DISTANCES, (0,), ())
    for row in tool.ROWS:
        grid.wanted(row, 0)


@pytest.mark.slow
def test_the_grid_trains_for_real_and_repeats_nothing(config, tmp_path):
    pack_digits(tmp_path / "digits")
    command = [sys.executable, str(ROOT / "tools" / "paper_a_grid.py"), "--config", config]
    command += ["--out", str(tmp_path / "out"), "--rows", "p1", "cross_entropy"]
    command += [f"data.path={tmp_path / 'digits'}", "training.max_steps=8"]
    command += ["data.image={size: 8, channels: 1, resize: 0, mean: [0.3], std: [0.4]}"]
    command += ["data.loader_processes=0", "evaluation.certificates=[metric(p=0.5)]"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start():
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    first = start()
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert [row["variant"] for row in rows] == ["p1", "cross_entropy"]
    for row in rows:
        assert set(row["scores"]) == set(tool.DISTANCES)
        for scores in row["scores"].values():
            assert 0 < scores["map_at_r"]["mean"] <= 1
        assert 0 < row["accuracy"]["mean"] <= 1
        assert list(row["certified_share"]) == ["metric_p0.5"]
    again = start()
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 2
    assert json.loads((tmp_path / "out" / "grid.json").read_text()) == rows
