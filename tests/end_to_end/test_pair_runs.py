"""Losses of pairs in real runs: any layout, a memory that is resumed, batches without partners."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Launcher

from dist_dml.data.opening import open_index
from dist_dml.data_config import DataConfig

pytestmark = pytest.mark.slow

PAIRS = ["loss.name=c2", "loss.memory_size=300", "loss.memory_warmup_steps=2"]
PAIRS += ["data.order=balanced", "data.samples_per_class=16", "training.max_steps=8"]


def test_every_layout_trains_alike_with_a_memory_and_resumes_on_another(
    launcher: Launcher,
) -> None:
    every = [*PAIRS, "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
    alone = launcher.run("python", 1, *every, "run.name=alone")
    assert alone.exit_code == 0, alone.output
    expected = launcher.losses("alone")
    assert list(expected) == list(range(1, 9))
    for kind, workers in (("by hand", 3), ("deepspeed by hand", 2)):
        name = f"workers{workers}"
        finished = launcher.run(kind, workers, *every, f"run.name={name}")
        assert finished.exit_code == 0, finished.output
        assert list(launcher.losses(name).values()) == pytest.approx(
            list(expected.values()), rel=2e-5
        )
    resumed = launcher.run(
        "by hand",
        2,
        *every,
        "run.name=resumed",
        f"run.resume={launcher.root / 'workers3' / 'checkpoints' / 'step-000000004'}",
    )
    assert resumed.exit_code == 0, resumed.output
    after = launcher.losses("resumed")
    assert list(after) == [5, 6, 7, 8]
    # The memory is full by then: without it the losses would be others.
    assert list(after.values()) == pytest.approx([expected[step] for step in after], rel=2e-5)


def test_what_a_loss_of_pairs_cannot_do_is_refused_before_the_first_step(
    launcher: Launcher,
) -> None:
    alone = launcher.run("python", 1, "loss.name=c2", "data.batch_size=4", "run.name=few")
    assert alone.exit_code == 2
    assert "data.order=balanced" in alone.error_lines[0]
    asked = launcher.run(
        "python", 1, *PAIRS, "evaluation.distances=[cosine, 'metric(p=0.5)']", "run.name=asked"
    )
    assert asked.exit_code == 2
    assert "evaluation.distances" in asked.error_lines[0]
    assert "c2" in asked.error_lines[0]


def test_relative_labels_train_on_any_number_of_workers_and_their_file_is_checked_first(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    names = open_index(DataConfig(path=str(data))).class_names
    sets = tmp_path / "sets.csv"
    rows = [
        f"{name},{i % 3},{'few' if i < 2 else 'many' * (i < 9)}" for i, name in enumerate(names)
    ]
    sets.write_text("\n".join(["class,third,part", *rows]))
    every = ["loss.name=spce", f"loss.label_sets={sets}", "data.order=shuffled"]
    every += ["training.max_steps=4"]
    alone = launcher.run("python", 1, *every, "run.name=alone")
    assert alone.exit_code == 0, alone.output
    three = launcher.run("by hand", 3, *every, "run.name=three")
    assert three.exit_code == 0, three.output
    losses = launcher.losses("alone")
    assert list(losses) == [1, 2, 3, 4]
    assert launcher.losses("three") == pytest.approx(losses, rel=2e-5)
    # By class it is another loss.
    plain = launcher.run("python", 1, "loss.name=spce", "training.max_steps=1", "run.name=plain")
    assert plain.exit_code == 0, plain.output
    assert launcher.losses("plain")[1] != pytest.approx(losses[1], rel=1e-3)

    sets.write_text("\n".join(["class,third,part", *rows[1:]]))
    missing = launcher.run("by hand", 2, *every, "run.name=missing")
    assert missing.exit_code != 0
    assert f"no row for class '{names[0]}'" in missing.error_lines[0]
    asked = launcher.run("python", 1, f"loss.label_sets={sets}", "run.name=asked")
    assert asked.exit_code == 2
    assert "label_sets" in asked.error_lines[0]
