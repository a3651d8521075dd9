"""The model card says what the run recorded, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_dml.checkpoint_manifest import Manifest, Progress
from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.export_card import Exported, model_card, recorded_scores

CONFIG = {
    "run": {"name": "study/shoes", "root": "/home/ann/runs"},
    "data": {"path": "/home/ann/data/shoes", "image": {"size": 32, "resize": 40}},
    "model": {"weights": "/home/ann/weights/start.pth", "embedding_dim": 16},
    "loss": {"name": "l2", "p": 0.5},
    "evaluation": {"protocols": [{"name": "unseen", "query": "test"}]},
    "tracking": {"mlflow_uri": "http://internal.example:5000"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in which step 9 was measured."""
    lines = [
        {"step": 5, "images_seen": 0, "seconds": 0, "name": "unseen/cosine/map_at_r", "value": 0.1},
        {"step": 9, "images_seen": 0, "seconds": 0, "name": "unseen/cosine/map_at_r", "value": 0.4},
        {"step": 9, "images_seen": 0, "seconds": 0, "name": "train/loss", "value": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(json.dumps({"git_commit": "c0ffee"}))
    return tmp_path


@pytest.fixture
def exported(divisible: Index) -> Exported:
    manifest = Manifest(
        progress=Progress(step=9, images_seen=576, seconds=3725.0),
        plan={"fingerprint": divisible.fingerprint},
        num_classes=4,
        config_hash="",
        class_files=[(0, 4, "classes-00000-of-00001.safetensors")],
        files={},
    )
    return Exported(
        config=Config.model_validate(CONFIG),
        manifest=manifest,
        checkpoint="step-000000009",
        index=divisible,
        embedding_dim=16,
        normalise=True,
        differences={"onnx": 3.1e-7, "pt2": 0.0},
        real_images=True,
        license="apache-2.0",
        packages={"torch": "2.13.0"},
    )


def test_the_card_states_what_the_run_recorded(run: Path, exported: Exported) -> None:
    card = model_card(run, exported)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0"
    assert header["tags"] == ["metric-learning", "image-retrieval", "onnx", "pt2"]
    for text in (
        "# study/shoes",
        "Embeddings of 16 numbers and length 1 for RGB images of 32 x 32 pixels",
        "| `model.onnx` | ONNX, any runtime | 3.1e-07 |",
        "Of step-000000009, as training measured them at step 9.",
        "| map_at_r | 0.4000 |",
        f"fingerprint `{exported.manifest.plan['fingerprint']}`",
        "| train | 8 | 4 |",
        "| test | 4 | 2 |",
        "9 steps, 576 images seen, 1:02:05 hours of training.",
        "commit `c0ffee`",
        "| `loss.name` | `l2` |",
        "| `loss.p` | `0.5` |",
        "(32 / 40 of the short side)",
    ):
        assert text in card, text
    assert "More Information Needed" not in card
    assert "None" not in card


def test_the_card_names_no_folder_and_no_server_of_its_writer(
    run: Path, exported: Exported
) -> None:
    card = model_card(run, exported)
    assert "/home/ann" not in card
    assert "internal.example" not in card
    assert "| `data.path` | `shoes` |" in card
    assert "| `model.weights` | `start.pth` |" in card


def test_the_reports_scores_are_taken_if_they_are_of_this_checkpoint(
    run: Path, exported: Exported
) -> None:
    (run / "report").mkdir()
    rows = {
        "pixels": {"unseen/cosine/map_at_r": 0.01},
        "trained": {"unseen/cosine/map_at_r": 0.5, "unseen/cosine/num_queries": 1234.0},
    }
    report = {"checkpoint": "step-000000009", "scores": rows}
    (run / "report" / "scores.json").write_text(json.dumps(report))
    assert recorded_scores(run, exported)[0] == rows["trained"]
    card = model_card(run, exported)
    assert "as `dist-dml evaluate` measured them" in card
    assert "| num_queries | 1,234 |" in card
    other = replace(exported, checkpoint="step-000000005")
    assert recorded_scores(run, other)[0] == {"unseen/cosine/map_at_r": 0.4}


def test_what_was_not_recorded_is_said_and_not_made_up(run: Path, exported: Exported) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "run.json").unlink()
    card = model_card(run, replace(exported, index=None, license="", real_images=False))
    assert "None are recorded for this checkpoint; `dist-dml evaluate` measures them." in card
    assert "It was not at hand when this was written." in card
    assert "No licence was stated" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "commit" not in card
    assert "over batches of several sizes of random pictures" in card


def test_a_name_of_a_data_set_cannot_break_the_tables_or_bring_html(
    run: Path, exported: Exported
) -> None:
    data = exported.config.data.model_copy(update={"path": "/x/a|b`<script>"})
    config = exported.config.model_copy(update={"data": data})
    card = model_card(run, replace(exported, config=config))
    assert "<script>" not in card
    assert "| `data.path` | `a\\|b'&lt;script>` |" in card
