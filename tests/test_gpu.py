"""What only a GPU shows: CUDA kernels, bfloat16 autocast and NCCL. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_losses import Dense, NormState, dense, random_batch
from torch import Tensor

from dist_dml.config import LossConfig, OptimizerConfig
from dist_dml.config_loading import resolve
from dist_dml.engine import TorchEngine
from dist_dml.loss_tables import READS
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import Ranks, World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in READS},
    "cross_entropy on cosines": {"name": "cross_entropy", "similarity": "cosine"},
    "l1, second sweep": {"name": "l1", "sums": "sweep"},
    "l2, p = 0.5": {"name": "l2", "p": 0.5},
}


def losses_on(device: str, keys: dict[str, Any]) -> tuple[Dense, dict[str, Tensor]]:
    """The dense float64 twin on the CPU, and what the classifier gives on a device."""
    num_rows, num_classes, width = 96, 5000, 64
    config = LossConfig(tile_mebibytes=6.0, **keys)
    # Moderate logits: the twins of L1 and L2 lose their digits where a probability rounds to 1.
    batch = random_batch(num_rows, num_classes, width, config.num_centres, 1.0)
    classifier = ClassParallelClassifier(
        width,
        ClassPartition.of_worker(0, 1, num_classes),
        config,
        OptimizerConfig(),
        0,
        num_rows,
        device,
        class_counts=batch.counts,
    )
    with torch.no_grad():
        classifier.weight.copy_(batch.weight)
        if classifier.bias is not None:
            classifier.bias.copy_(batch.bias)
    embeddings = batch.embeddings.float().to(device).requires_grad_()
    output = classifier(embeddings, batch.labels.to(device), (num_rows,), num_rows)
    output.loss.backward()
    assert embeddings.grad is not None
    assert classifier.weight.grad is not None
    found = {"loss": output.loss.detach(), "embeddings": embeddings.grad}
    found["weight"] = classifier.weight.grad
    found = {key: value.cpu().double() for key, value in found.items()}
    return dense(config, batch, NormState()), found


@pytest.mark.parametrize("tile_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_on_cuda_equals_its_float64_twin(name: str, tile_dtype: str) -> None:
    twin, found = losses_on("cuda", LOSSES[name] | {"tile_dtype": tile_dtype})
    # TF32 is off by default; bfloat16 has 8 bits, and scale 64 magnifies them.
    tolerance = 1e-4 if tile_dtype == "float32" else 0.05
    assert abs(found["loss"] / twin.loss - 1) < tolerance
    for key in ("embeddings", "weight"):
        wanted = twin.gradients[key].reshape(found[key].shape)
        assert (found[key] - wanted).norm() < tolerance * wanted.norm(), key


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
