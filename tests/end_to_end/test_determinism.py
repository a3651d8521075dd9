"""`engine.deterministic` and `engine.precision=float64`, through the documented commands."""

from __future__ import annotations

import time

import pytest
import torch
from launching import Launcher

pytestmark = pytest.mark.slow

TRAINING = ["data.batch_size=32", "training.epochs=2"]


def test_two_deterministic_runs_of_one_layout_are_equal_bit_by_bit(launcher: Launcher) -> None:
    for name in ("first", "second"):
        words = [f"run.name={name}", "engine.deterministic=true", *TRAINING]
        done = launcher.run("by hand", 2, *words)
        assert done.exit_code == 0, done.output
    assert launcher.losses("first") == launcher.losses("second")
    first, second = launcher.tensors("first"), launcher.tensors("second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_a_clock_decides_is_refused_when_runs_are_to_be_deterministic(
    launcher: Launcher,
) -> None:
    words = ["run.name=timed", "engine.deterministic=true", "training.max_seconds=5"]
    done = launcher.run("python", 1, *words)
    assert done.exit_code == 2
    (line,) = done.error_lines
    assert "training.max_seconds=5 ends a run by the clock; set training.max_steps" in line


def test_in_float64_layouts_differ_by_rounding_alone_and_the_run_can_be_evaluated(
    launcher: Launcher,
) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        words = [f"run.name={name}", "engine.precision=float64", *TRAINING]
        done = launcher.run("by hand", workers, *words)
        assert done.exit_code == 0, done.output
    one, three = launcher.tensors("one"), launcher.tensors("three")
    kinds = {value.dtype for value in one.values() if value.is_floating_point() and value.ndim}
    assert kinds == {torch.float64}
    for key, value in one.items():
        assert torch.allclose(three[key], value, rtol=1e-11, atol=1e-12), key
    evaluated = launcher.command("python", 1, [])[:1]
    words = [*evaluated, "-m", "dist_dml.cli", "evaluate", str(launcher.root / "one")]
    done = launcher.wait(launcher.start_words(words), time.monotonic() + 120)
    assert done.exit_code == 0, done.output
    assert "unseen, cosine" in done.output
