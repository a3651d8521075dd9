"""`dist-dml estimate`: its numbers agree with each other and with a real embedder; its refusals."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_dml import estimate, estimate_embedder, estimate_tables, estimate_validate
from dist_dml.command_line import run_command
from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.estimate_head import shape_of
from dist_dml.models.embedder import Embedder, build_embedder
from dist_dml.models.neck import Neck
from dist_dml.parallel.head_memory import total_bytes
from dist_dml.parallel.machine import DECLARED

SMALL = ["data.image.size=32", "data.image.resize=0", "data.batch_size=96"]


def estimated(folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "numbers.json"
    assert run_command("dist-dml estimate", estimate, [*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text("utf-8"))


def test_parts_add_up_and_the_report_says_that_nothing_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(tmp_path, *SMALL, "--classes", "100000", "--workers", "3")
    text = capsys.readouterr().out
    assert "calculated, not measured" in text.splitlines()[0]
    assert sum(found["memory"].values()) == found["memory_bytes"]
    step = found["head"]["total_seconds"] + found["embedder"]["seconds"]
    step += found["embedder"]["all_reduce_seconds"]
    assert found["step_seconds"] == pytest.approx(step)
    assert found["images_per_second"] == pytest.approx(96 / step)
    assert found["fits"]
    for shown in (f"{found['largest_num_classes']:,}", found["plan"]["reason"], "bound by"):
        assert shown in text


def test_more_classes_than_the_largest_number_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = estimated(tmp_path, *SMALL, "--classes", "10")["largest_num_classes"]
    verdicts = [
        estimated(tmp_path, *SMALL, "--classes", str(count))["fits"]
        for count in (most, int(most * 1.02))
    ]
    assert verdicts == [True, False]
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_share_and_the_nodes_are_taken(tmp_path: Path) -> None:
    words = (*SMALL, "--classes", "100000", "--workers", "16")
    usual = estimated(tmp_path, *words)
    half = estimated(tmp_path, *words, "--share", "0.4")
    near = estimated(tmp_path, *words, "--nodes-of", "16")
    ratio = half["head"]["seconds"]["products"] / usual["head"]["seconds"]["products"]
    assert ratio == pytest.approx(2)
    assert near["head"]["seconds"]["links"] < usual["head"]["seconds"]["links"]


class Squares(nn.Module):
    """Saves its input for the backward, and multiplies by a square matrix."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8 * 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


def test_operations_and_activations_of_an_image_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = resolve(None, ["data.image={size: 8, channels: 1, resize: 0, mean: [0], std: [1]}"])
    config = config.config

    def built(*_: Any) -> Embedder:
        from dist_dml.models.dropout import RowKeys

        keys = RowKeys()
        return Embedder(Squares(), Neck(config.model, 8, keys, None), (0.0,), (1.0,), keys)

    monkeypatch.setattr(estimate_embedder, "build_embedder", built)
    cost = estimate_embedder.embedder_cost(config, measure=False)
    # x W^T forward; of the backward only dW, as images need no gradient.
    assert cost.flops == 2 * (2 * 8 * 64)
    assert cost.activation_bytes == 64 * 4
    assert cost.parameters == 8 * 64


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_real_embedder_is_counted_without_its_data(precision: str) -> None:
    config = resolve(None, [*SMALL, f"engine.precision={precision}"]).config
    cost = estimate_embedder.embedder_cost(config, measure=precision == "float32")
    real = build_embedder(config.model, config.data.image, 0, None)
    assert cost.parameters == sum(p.numel() for p in real.parameters())
    assert cost.embedding_dim == real.embedding_dim
    assert cost.flops > 0
    assert cost.activation_bytes > 3 * 32 * 32
    assert (cost.measured_seconds is not None) == (precision == "float32")


def test_zero_parts_state_and_gradients_among_the_workers() -> None:
    cost = estimate_embedder.EmbedderCost(8, 1000, 1.0, 10.0, "")

    def size(*overrides: str) -> float:
        config = resolve(None, ["optimizer.name=adamw", *overrides]).config
        return total_bytes(estimate_embedder.embedder_memory(config, cost, 4, 2))

    assert size() == 4 * 1000 * 4 + 20
    # Weights, gradients, a quarter of two states and of the flat copy.
    assert size("engine.name=deepspeed", "engine.zero_stage=1") == 4 * (2000 + 750) + 20
    assert size("engine.name=deepspeed", "engine.zero_stage=2") == 4 * (1000 + 1000) + 20


def test_the_shape_follows_the_configuration() -> None:
    config: Config = resolve(
        None,
        [
            *SMALL,
            "loss.name=sub_centre_arcface",
            "loss.tile_dtype=bfloat16",
            "classes.weight_dtype=bfloat16",
            "classes.rounding=kahan",
            "classes.optimizer=adagrad",
            "training.accumulate=2",
        ],
    ).config
    shape, kernels = shape_of(config, 1000, 2, 64)
    assert (shape.rows, shape.micro_batches, shape.workers) == (96, 2, 2)
    assert (shape.centres, shape.optimizer, shape.kahan) == (3, "adagrad", True)
    assert (shape.operand_dtype, shape.weight_dtype) == ("bfloat16", "bfloat16")
    assert not kernels  # Centres are pooled between the logits and the softmax.
    sampled = resolve(None, [*SMALL, "classes.sample=random", "classes.sample_rate=0.25"]).config
    shape, kernels = shape_of(sampled, 1000, 1, 64)
    assert (shape.active_share, kernels, shape.bias) == (0.25, True, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "give --classes C, data.num_classes=C or data.path"),
        (("data.path=nowhere",), "data.path=nowhere: no such folder; .* or say how many"),
        (("--classes", "9", "--machine", "h300"), "--machine=h300 is unknown; did you mean h"),
        (("--classes", "9", "--workers", "10"), "--workers=10 does not fit 9 classes"),
        (("--classes", "9", "--workers", "0"), "--workers=0: give 1 or more"),
        (("--classes", "900", "--workers", "97"), "data.batch_size=96 is too small for 97"),
        (("--classes", "9", "--share", "2"), "--share=2 is no share"),
        (("--classes", "9", "classes.backend=native"), "classes.backend=native does not run with"),
        (("--classes", "9", "--json", "nowhere/x"), "its folder does not exist"),
        (
            (
                "--classes",
                "-1",
            ),
            "--classes=-1 is no number of classes",
        ),
        (("--machine", "measured", "--classes", "9", "--share", "0.5"), "leave it out"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("dist-dml estimate", estimate, [*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error), error
    assert error.count("\n") == 1


def test_the_number_of_classes_comes_from_the_data_set(
    tmp_path: Path,
) -> None:
    from dist_dml.data.index_command import build_index

    tar = tmp_path / "train-000000.tar"
    _write_tar(tar, labels=["3", "1", "1"])
    build_index(tar)
    found = estimated(tmp_path, *SMALL, f"data.path={tmp_path}")
    assert found["shape"]["num_classes"] == 2


def _write_tar(path: Path, labels: list[str]) -> None:
    import io
    import tarfile

    import cv2
    import numpy as np

    image = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for extension, content in (("png", image), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_the_table_has_a_row_a_cell_and_says_what_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command("dist-dml estimate", estimate, ["--table"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Calculated, not measured.")
    rows = [line for line in text.splitlines() if line.startswith("| 1")]
    assert len(rows) == 18
    assert sum("does not fit" in line for line in rows) == 1  # 1,000M x 512 on 8.
    # 100M x 128 with momentum: 2 x 2 bytes, all on one GPU; 4 + 4 bytes with the ResNet: also.
    row = estimate_tables.paper_row(100_000_000, 128, 8, DECLARED["h200"], 0.4)
    assert row.workers_needed == row.workers_needed_float32 == 1
    of_head = row.gibibytes * 2**30 - estimate_tables.EMBEDDER_BYTES
    assert of_head == pytest.approx(100e6 * 128 * 4 / 8, rel=0.05)


def test_the_fewest_workers_hold_the_classes_and_one_less_does_not() -> None:
    machine = DECLARED["a100"]
    needed = estimate_tables.workers_needed(1_000_000_000, 128, "bfloat16", machine)
    sizes = [
        estimate_tables.memory_on_paper(
            estimate_tables.shape_on_paper(1_000_000_000, 128, workers), machine
        )
        for workers in (needed, needed - 1)
    ]
    assert sizes[0] <= 0.93 * machine.memory_bytes < sizes[1]


def test_the_figure_is_written(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    assert run_command("dist-dml estimate", estimate, ["--figure", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_validation_runs_real_steps_and_states_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate_validate, "SIZES", ((500, 16, 8),))
    monkeypatch.setattr(estimate_validate, "_REPEATS", 2)
    found: Any = estimated(tmp_path, "--validate", "--threads", "1")
    assert {row["variant"].split(",")[0] for row in found} >= {"torch"}
    for row in found:
        assert row["error"] == pytest.approx(row["predicted"] / row["seconds_median"] - 1)
    assert "torch float32:" in capsys.readouterr().out


def test_the_command_declares_what_it_reads() -> None:
    parser = argparse.ArgumentParser()
    estimate.add_arguments(parser)
    arguments = parser.parse_args(["--workers", "8", "a.b=1"])
    assert (arguments.workers, arguments.overrides, arguments.machine) == (8, ["a.b=1"], "h200")
