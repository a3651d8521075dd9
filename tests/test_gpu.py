"""What only a GPU shows: CUDA kernels, bfloat16 autocast and NCCL. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dist_dml.config import LossConfig, OptimizerConfig
from dist_dml.config_loading import resolve
from dist_dml.engine import TorchEngine
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import Ranks, World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("similarity", ["linear", "cosine"])
def test_class_parallel_loss_on_cuda_equals_the_float64_twin(similarity: str) -> None:
    num_classes, width, rows = 5000, 64, 96
    config = LossConfig.model_validate(
        {"similarity": similarity, "init_std": 0.3, "tile_mebibytes": 2.0}
    )
    partition = ClassPartition.of_worker(0, 1, num_classes)
    classifier = ClassParallelClassifier(
        width, partition, config, OptimizerConfig(), 0, rows, device="cuda"
    )
    embeddings = torch.randn(rows, width, device="cuda", requires_grad=True)
    labels = torch.randint(0, num_classes, (rows,), device="cuda")
    loss = classifier(embeddings, labels, (rows,), rows).loss
    loss.backward()
    z = embeddings.detach().double().requires_grad_()
    w = classifier.weight.detach().double().requires_grad_()
    if similarity == "cosine":
        logits = config.scale * F.normalize(z, dim=1) @ F.normalize(w, dim=1).T
    else:
        logits = z @ w.T
    twin = F.cross_entropy(logits, labels)
    twin.backward()
    torch.testing.assert_close(loss.double(), twin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings.grad.double(), z.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(classifier.weight.grad.double(), w.grad, rtol=1e-3, atol=1e-5)


def test_bfloat16_autocast_trains_on_cuda_with_float32_weights() -> None:
    config = resolve(
        None,
        [
            "data.image={size: 32, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
            "engine.precision=bfloat16",
            "model={norm: batch, dropout: 0.1}",
        ],
    ).config
    device = torch.device("cuda")
    embedder = build_embedder(config.model, config.data.image, 0, None).to(device)
    engine = TorchEngine(config, embedder, World(Ranks(), device, None, None))
    partition = ClassPartition.of_worker(0, 1, 50)
    classifier = ClassParallelClassifier(
        embedder.embedding_dim, partition, config.loss, config.optimizer, 0, 64, device=device
    )
    images = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(64, device=device) % 50
    losses = []
    for _ in range(30):
        output = classifier(
            engine(images, torch.arange(64, device=device), True), labels, (64,), 64
        )
        engine.backward(output.loss)
        engine.step(1.0)
        classifier.step(1.0)
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in embedder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_run_over_nccl_trains_evaluates_and_saves(engine: str, tmp_path: Path) -> None:
    """One worker a GPU; with one GPU, a group of one that still goes through NCCL."""
    pack = [sys.executable, "-m", "dist_dml.cli", "pack", "glyphs", str(tmp_path / "glyphs")]
    subprocess.run(pack, check=True)
    workers = str(torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", workers]
    command += ["dist_dml/train.py", "--config", "configs/demo.yaml", f"engine.name={engine}"]
    command += [f"data.path={tmp_path}/glyphs", f"run.root={tmp_path}/runs", "run.name=gpu"]
    command += ["training.max_steps=200", "engine.precision=bfloat16", "tracking.mlflow=false"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on cuda" in done.stdout + done.stderr
    assert list((tmp_path / "runs" / "gpu" / "checkpoints").glob("step-*/manifest.json"))
