"""From a run to files that others use: scores of `dist-dml evaluate` without torch, MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import BIN, ROOT, Launcher, plain_environment

from dist_dml.cli import main
from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.loader import evaluation_batches
from dist_dml.data.opening import open_index
from dist_dml.models import export_parity

pytestmark = pytest.mark.slow

RECALL = """
import json, sys
import numpy as np, onnxruntime
folder, images, labels = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3])
session = onnxruntime.InferenceSession(folder + "/model.onnx")
parts = [session.run(None, {"images": images[i : i + 50]})[0] for i in range(0, len(images), 50)]
vectors = np.concatenate(parts).astype(np.float64)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
cosines = vectors @ vectors.T
np.fill_diagonal(cosines, -np.inf)
loaded = sorted({"torch", "dist_dml"} & set(sys.modules))
print(json.dumps([loaded, float((labels[cosines.argmax(axis=1)] == labels).mean())]))
"""
PREDICT = """
import json, sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/shoes/1")
images = np.load(sys.argv[2])
shapes = [str(model.metadata.signature.inputs), str(model.metadata.signature.outputs)]
found = model.predict(images)["embeddings"]
example = np.asarray(model.input_example["images"])
version = mlflow.MlflowClient().get_model_version("shoes", 1)
np.save(sys.argv[3], found)
print(json.dumps([shapes, list(example.shape), version.run_id]))
"""


def command(*words: str) -> tuple[int, str, str]:
    """`dist-dml WORDS`: exit code, standard output and standard error."""
    done = subprocess.run(
        [str(BIN / "dist-dml"), *words],
        cwd=ROOT,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def python(code: str, *words: str) -> list:
    """The last line that a fresh interpreter prints, of JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=plain_environment() | {"PYTHONWARNINGS": "ignore"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, for all tests."""
    launcher = Launcher(data, tmp_path_factory.mktemp("runs"))
    finished = launcher.run("python", 1, "run.name=one", "training.max_steps=6")
    assert finished.exit_code == 0, finished.output
    return launcher.root / "one"


def test_an_exported_run_gives_its_scores_without_torch_and_stands_in_mlflow(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    code, printed, errors = command("evaluate", str(run), "--json", "--no-report")
    assert code == 0, errors
    (scores,) = json.loads(printed.splitlines()[-1])["scores"].values()
    code, printed, errors = command(
        "export", str(run), "--out", str(out), "--license", "mit", "--mlflow-register", "shoes"
    )
    assert code == 0, errors
    assert {file.name for file in out.iterdir()} == {
        *("model.safetensors", "model.pt2", "model.onnx", "config.json"),
        *("preprocessing.json", "embed_images.py", "README.md"),
    }
    assert printed.count("of the network") == 3
    assert "models:/shoes/1" in printed
    # The first protocol and distance of the default configuration.
    config = resolve(str(run / "config.yaml"), []).config
    name = f"{config.evaluation.protocols[0].name}/cosine/recall_at_1"
    images, labels = save_split(config, tmp_path)
    loaded, recall = python(RECALL, str(out), str(images), str(labels))
    assert loaded == []
    assert recall == pytest.approx(scores[name], abs=1e-9)
    assert 0.1 < recall < 1
    assert f"| recall_at_1 | {scores[name]:.4f} |" in (out / "README.md").read_text()
    # What the registry gives back is the exported model.
    store = f"sqlite:///{run.parent / 'mlflow.db'}"
    few = tmp_path / "few.npy"
    np.save(few, np.load(images)[:3])
    (shapes, example, run_id) = python(PREDICT, store, str(few), str(tmp_path / "found.npy"))
    assert "(-1, 12, 12, 1)" in shapes[0]
    assert "(-1, 16)" in shapes[1]
    assert example == [2, 12, 12, 1]
    assert f"run {run_id}" in printed
    expected = torch.export.load(out / "model.pt2").module()(torch.from_numpy(np.load(few)))
    assert np.abs(np.load(tmp_path / "found.npy") - expected.numpy()).max() < 1e-4


def save_split(config: Config, folder: Path) -> tuple[Path, Path]:
    """Pixels and labels of the split that evaluation queries, as evaluation decodes them."""
    index = open_index(config.data)
    split = config.evaluation.protocols[0].query
    batches = list(evaluation_batches(index, split, config.data, 64, 0, 1))
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    np.save(folder / "images.npy", images.contiguous().numpy())
    np.save(folder / "labels.npy", torch.cat([batch.labels for batch in batches]).numpy())
    return folder / "images.npy", folder / "labels.npy"


def test_a_file_that_differs_or_data_that_are_gone_leave_no_half_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), "--formats", "safetensors", "--out"]
    with monkeypatch.context() as patch:
        # No file is as near as that.
        patch.setattr(export_parity, "TOLERANCE", -1.0)
        assert main([*words, str(tmp_path / "refused")]) == 1
    assert "nothing was exported" in capfd.readouterr().err
    assert list(tmp_path.glob("refused*")) == []
    # Without its data set a run is exported all the same, and the card says so.
    assert main([*words, str(tmp_path / "out"), "--no-data", "--checkpoint", "last"]) == 0
    assert "random pictures" in (tmp_path / "out" / "README.md").read_text()
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "is there already" in capfd.readouterr().err
