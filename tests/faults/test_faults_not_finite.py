"""A gradient that is not finite: the run ends with a report, or goes back and passes over it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launching import Finished, Launcher

from dist_dml.batch_ledger import ledger_of_plan
from dist_dml.checkpoint_manifest import Manifest, newest_checkpoint
from dist_dml.config_loading import resolve
from dist_dml.data.opening import open_index, open_plan
from dist_dml.data.plan import Plan

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).parent / "train_with_fault.py")
LAYER = "backbone.layers.8.weight"
# 5 steps an epoch, 20 in all; checkpoints after 4, 8, ... steps.
TRAINING = [
    "data.batch_size=32",
    "training.epochs=4",
    "checkpoint.every_steps=4",
    "checkpoint.every_epochs=0",
    "checkpoint.keep_last=3",
    # Later than the fault: what is noticed late must not be saved or scored.
    "tracking.every_steps=5",
]
BAD_STEP = 10


def run_with_fault(
    launcher: Launcher, kind: str, workers: int, steps: str, *arguments: str
) -> Finished:
    """A training in whose given steps the gradient is not finite."""
    words = [*TRAINING, *arguments]
    return launcher.run(kind, workers, *words, program=[PROGRAM, steps])


def manifest_of(launcher: Launcher, name: str) -> Manifest:
    found = newest_checkpoint(launcher.root / name / "checkpoints")
    assert found is not None
    return found[1]


def plan_of(launcher: Launcher) -> Plan:
    config = resolve(None, [*launcher.settings, *TRAINING]).config
    return open_plan(open_index(config.data), config.data, 1, config.run.seed)


def report_of(launcher: Launcher, name: str) -> dict:
    (path,) = (launcher.root / name / "report").glob("not-finite-*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("workers", [1, 2])
def test_the_run_ends_with_the_batchs_keys_and_the_layer(launcher: Launcher, workers: int) -> None:
    kind = "python" if workers == 1 else "by hand"
    ended = run_with_fault(launcher, kind, workers, str(BAD_STEP), "run.name=bad")
    assert ended.exit_code == 1, ended.output
    (line,) = set(ended.error_lines)
    assert f"gradient of step {BAD_STEP} has the norm nan" in line
    assert f"gradients not finite in 1 of 14, {LAYER} first" in line
    assert "training.rollback_checkpoints=1" in line
    assert "Traceback" not in ended.output
    # Nothing of the bad step was saved.
    assert manifest_of(launcher, "bad").progress.step == 8

    report = report_of(launcher, "bad")
    assert report["step"] == BAD_STEP
    norms = report["gradient_norms"]
    # Steps 6 to 8 were written down when the checkpoint of step 8 was due.
    assert sorted(map(int, norms)) == [9, BAD_STEP]
    assert all(norm > 0 for norm in norms["9"].values())
    assert [name for name, norm in norms[str(BAD_STEP)].items() if norm == "nan"] == [LAYER]
    config = resolve(None, [*launcher.settings, *TRAINING]).config
    index = open_index(config.data)
    ids = [int(i) for i in plan_of(launcher).global_batch(BAD_STEP - 1)]
    assert [entry["key"] for entry in report["batch"]] == [index.key(i) for i in ids]
    assert report["weights"][LAYER]["not_finite"] > 0
    # Layers before the broken one still give numbers.
    broken = [name for name, numbers in report["outputs"].items() if numbers["not_finite"]]
    whole = [name for name, numbers in report["outputs"].items() if not numbers["not_finite"]]
    assert broken[0] == LAYER.removesuffix(".weight")
    assert whole
    assert all(numbers["count"] % 32 == 0 for numbers in report["outputs"].values())


@pytest.mark.parametrize(
    ("kind", "workers", "back", "extra"),
    [
        ("python", 1, 1, []),
        ("by hand", 2, 2, []),
        ("deepspeed", 2, 1, ["engine.zero_stage=2"]),
    ],
)
def test_going_back_equals_a_run_that_passes_the_batch_over_from_the_start(
    launcher: Launcher, kind: str, workers: int, back: int, extra: list[str]
) -> None:
    mended = run_with_fault(
        launcher,
        kind,
        workers,
        str(BAD_STEP),
        "run.name=mended",
        f"training.rollback_checkpoints={back}",
        *extra,
    )
    assert mended.exit_code == 0, mended.output
    assert f"going back to the checkpoint of step {[8, 4][back - 1]}" in mended.output
    assert f"step {BAD_STEP}: its batch is passed over" in mended.output

    known = launcher.root / "known"
    known.mkdir(parents=True)
    (known / "skipped.json").write_text(json.dumps({"steps": [BAD_STEP - 1]}))
    words = ["run.name=known", *TRAINING, *extra, "--resume", "auto"]
    without_launcher = "deepspeed by hand" if kind == "deepspeed" else kind
    expected = launcher.run(without_launcher, workers, *words)
    assert expected.exit_code == 0, expected.output
    actual, wanted = launcher.tensors("mended"), launcher.tensors("known")
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(actual[key], value), key

    plan, manifest = plan_of(launcher), manifest_of(launcher, "mended")
    steps = [step for step in range(4 * plan.steps_per_epoch) if step != BAD_STEP - 1]
    assert manifest.progress.ledger == ledger_of_plan(plan, steps)
    assert manifest.progress.skipped == (BAD_STEP - 1,)
    assert manifest.progress.images_seen == sum(plan.num_rows(step) for step in steps)
    assert launcher.losses("mended") == launcher.losses("known")


def test_it_goes_back_no_more_often_than_told_and_to_the_start_without_a_checkpoint(
    launcher: Launcher,
) -> None:
    ended = run_with_fault(
        launcher,
        "python",
        1,
        "2,7,15",
        "run.name=often",
        "training.rollback_checkpoints=1",
        "training.max_skipped=2",
    )
    assert ended.exit_code == 1, ended.output
    assert "going back to the start" in ended.output
    assert "going back to the checkpoint of step 4" in ended.output
    (line,) = ended.error_lines
    assert "gradient of step 15" in line
    assert "training.max_skipped=2 batches have been passed over already" in line
    assert manifest_of(launcher, "often").progress.skipped == (1, 6)
    # A launch that goes on from there knows them.
    resumed = run_with_fault(
        launcher,
        "python",
        1,
        "2,7,15",
        "run.name=often",
        "training.rollback_checkpoints=1",
        "training.max_skipped=3",
        "--resume",
        "auto",
    )
    assert resumed.exit_code == 0, resumed.output
    assert manifest_of(launcher, "often").progress.skipped == (1, 6, 14)


def test_deepspeed_ends_alike_when_the_rate_is_far_too_high(launcher: Launcher) -> None:
    ended = launcher.run(
        "deepspeed by hand",
        2,
        "run.name=wild",
        *TRAINING,
        "engine.zero_stage=2",
        "optimizer={name: sgd, learning_rate: 1e30}",
    )
    assert ended.exit_code == 1, ended.output
    (line,) = set(ended.error_lines)
    assert "not finite" in line or "is nan" in line or "is inf" in line
    assert subprocess.list2cmdline(["--resume", "auto"]) in line
