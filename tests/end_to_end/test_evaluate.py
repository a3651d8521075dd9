"""The evaluation command: the same scores however many workers share it, and clear refusals."""

from __future__ import annotations

import json
import subprocess

import pytest
from launching import BIN, ROOT, Launcher, free_port

pytestmark = pytest.mark.slow


def evaluated(*command: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in the repository."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def scores_of(output: str) -> dict[str, dict[str, float]]:
    """The rows of scores in the command's JSON line."""
    (line,) = [line for line in output.splitlines() if line.startswith('{"checkpoint"')]
    return json.loads(line)["scores"]


def test_two_workers_give_the_scores_of_one_and_of_the_training_run(launcher: Launcher) -> None:
    finished = launcher.run("python", 1, "run.name=one", "training.max_steps=3")
    assert finished.exit_code == 0, finished.output
    run = str(launcher.root / "one")
    arguments = [run, "--baselines", "--json"]
    code, alone, errors = evaluated(str(BIN / "dist-dml"), "evaluate", *arguments)
    assert code == 0, errors
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    code, together, errors = evaluated(*torchrun, "-m", "dist_dml.evaluate", *arguments)
    assert code == 0, errors
    one, two = scores_of(alone), scores_of(together)
    assert set(one) == {"pixels", "untrained", "trained"}
    assert one["pixels"] == two["pixels"]
    recorded = (launcher.root / "one" / "metrics.jsonl").read_text().splitlines()
    trained = {r["name"]: r["value"] for r in map(json.loads, recorded)}
    for row in ("untrained", "trained"):
        for name, value in one[row].items():
            # An embedding's last bits depend on the batch that it is computed in.
            assert two[row][name] == pytest.approx(value, abs=0.02), (row, name)
    assert {n: trained[n] for n in one["trained"]} == pytest.approx(one["trained"], abs=0.02)
    written = ("scores.json", "queries.parquet", "gallery.png", "recall.png", "report.html")
    for name in written:
        assert (launcher.root / "one" / "report" / name).stat().st_size > 100


def test_a_folder_that_is_no_run_is_refused_in_one_line(launcher: Launcher) -> None:
    code, _, errors = evaluated(str(BIN / "dist-dml"), "evaluate", str(launcher.root / "none"))
    assert code == 2
    (line,) = errors.splitlines()
    assert "is not the folder of a run" in line
