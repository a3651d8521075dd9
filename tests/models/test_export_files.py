"""Exported weights give the network's embeddings, and files that do not are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import IMAGE, picture, trained, written
from safetensors.torch import load_file, save_file
from torch import nn

from dist_dml.data.augment import evaluation_view
from dist_dml.data_config import ImageConfig
from dist_dml.errors import RunError, UsageError
from dist_dml.models import embed_images
from dist_dml.models.dropout import KeyedDropout
from dist_dml.models.embedder import Embedder
from dist_dml.models.export_formats import check_packages, read_format
from dist_dml.models.export_module import ImageEmbedder, example_images, preprocessing_of
from dist_dml.models.export_parity import TOLERANCE, check_parity
from dist_dml.parallel.batch_norm import WholeBatchNorm


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return trained()


def test_weights_and_config_rebuild_the_network(embedder: Embedder, tmp_path: Path) -> None:
    folder = written(embedder, tmp_path, ("safetensors",), True)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 12, 12, 1), np.uint8))
    with torch.no_grad():
        expected = embedder(images.permute(0, 3, 1, 2))
    expected = expected / expected.norm(dim=1, keepdim=True)
    given = read_format(folder, "safetensors")(images.numpy())
    assert np.abs(given - expected.numpy()).max() < TOLERANCE
    assert check_parity(embedder, True, folder, ("safetensors",), example_images(IMAGE, 16)) == {
        "safetensors": pytest.approx(0, abs=TOLERANCE)
    }


def test_an_export_leaves_the_embedder_as_it_was(embedder: Embedder) -> None:
    module = ImageEmbedder(embedder, False)
    assert any(isinstance(part, WholeBatchNorm) for part in embedder.modules())
    assert any(isinstance(part, KeyedDropout) for part in embedder.modules())
    assert not any(isinstance(part, (WholeBatchNorm, KeyedDropout)) for part in module.modules())
    # And its weights are copies.
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert next(embedder.parameters()).abs().max() > 0


def test_a_batch_norm_keeps_what_timm_puts_behind_it() -> None:
    embedder = trained()
    norm = next(part for part in embedder.modules() if isinstance(part, WholeBatchNorm))
    norm.act = nn.Hardtanh(-0.1, 0.1)
    images = example_images(IMAGE, 4)
    with torch.no_grad():
        expected = embedder(images.permute(0, 3, 1, 2))
        given = ImageEmbedder(embedder, False)(images)
        norm.act = nn.Identity()
        without = embedder(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(given, expected)
    assert (given - without).abs().max() > 0.1


def test_a_file_that_differs_is_refused_by_how_much(embedder: Embedder, tmp_path: Path) -> None:
    folder = written(embedder, tmp_path / "bad", ("safetensors",), False)
    tensors = load_file(folder / "model.safetensors")
    tensors["neck.norm.running_mean"] += 2e-4
    save_file(tensors, folder / "model.safetensors")
    images = example_images(IMAGE, 16, seed=1)
    with pytest.raises(RunError, match=r"safetensors differs from the network by .* batch of 1,"):
        check_parity(embedder, False, folder, ("safetensors",), images)
    tensors["neck.norm.running_mean"] *= float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RunError, match="differs from the network by nan"):
        check_parity(embedder, False, folder, ("safetensors",), images)


def test_a_network_that_gives_all_images_one_embedding_is_refused(tmp_path: Path) -> None:
    collapsed = trained()
    with torch.no_grad():
        collapsed.neck.linear.weight.zero_()  # pyright: ignore
    folder = written(collapsed, tmp_path / "collapsed", ("safetensors",), False)
    with pytest.raises(RunError, match="the same embedding"):
        check_parity(collapsed, False, folder, ("safetensors",), example_images(IMAGE, 16))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_one_line_with_the_command(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"needs {missing}.*pip install 'dist_dml\[export\]'"):
        check_packages(("onnx",))
    check_packages(("safetensors", "pt2"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
def test_the_example_prepares_pixels_as_evaluation_does(channels: int, extension: str) -> None:
    unit = (0.5,) * channels
    for height, width in ((20, 30), (32, 32), (130, 200), (280, 311)):
        data = picture(height, width, extension)
        for resize in (0, 40, 32):
            config = ImageConfig(size=32, resize=resize, channels=channels, mean=unit, std=unit)
            given = embed_images.prepare(data, preprocessing_of(config, False))
            np.testing.assert_array_equal(given, evaluation_view(data, config))
