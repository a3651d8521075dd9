"""Backbones have the published shapes and names, and take weights from files that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_dml.config import ModelConfig
from dist_dml.data_config import ImageConfig
from dist_dml.errors import RunError, UsageError
from dist_dml.models.backbones import build_backbone
from dist_dml.models.bn_inception import BNInception
from dist_dml.models.embedder import build_embedder
from dist_dml.models.small_conv import SmallConv
from dist_dml.models.weights import load_weights


def _image(size: int, channels: int = 3) -> ImageConfig:
    half = (0.5,) * channels
    return ImageConfig(size=size, resize=0, channels=channels, mean=half, std=half)


@pytest.fixture(scope="module")
def inception() -> BNInception:
    return BNInception().eval()


def test_bn_inception_has_the_published_names_and_shapes(inception):
    shapes = {name: tuple(tensor.shape) for name, tensor in inception.state_dict().items()}
    published = {
        "conv1_7x7_s2.weight": (64, 3, 7, 7),
        "conv1_7x7_s2.bias": (64,),
        "conv1_7x7_s2_bn.running_var": (64,),
        "conv2_3x3_reduce.weight": (64, 64, 1, 1),
        "conv2_3x3.weight": (192, 64, 3, 3),
        "inception_3a_1x1.weight": (64, 192, 1, 1),
        "inception_3a_double_3x3_1.weight": (96, 64, 3, 3),
        "inception_3b_pool_proj_bn.weight": (64,),
        "inception_3c_3x3.weight": (160, 128, 3, 3),
        "inception_4a_1x1.weight": (224, 576, 1, 1),
        "inception_4c_double_3x3_2.weight": (160, 160, 3, 3),
        "inception_4d_pool_proj.weight": (128, 608, 1, 1),
        "inception_4e_double_3x3_2.weight": (256, 256, 3, 3),
        "inception_5a_double_3x3_reduce.weight": (160, 1056, 1, 1),
        "inception_5b_double_3x3_reduce.weight": (192, 1024, 1, 1),
    }
    assert published.items() <= shapes.items()
    # 69 convolutions, each with its norm; blocks that halve lack 1x1 and projection.
    assert len([name for name in shapes if name.endswith("_bn.running_mean")]) == 69
    assert not [
        name for name in shapes if name.startswith(("inception_3c_1x1", "inception_4e_pool"))
    ]


def test_bn_inception_has_the_published_number_of_parameters(inception):
    count = sum(parameter.numel() for parameter in inception.parameters())
    assert count + 1024 * 1000 + 1000 == 11_295_240


def test_bn_inception_maps_227_pixels_to_7_by_7(inception):
    with torch.no_grad():
        assert inception(torch.zeros(1, 3, 227, 227)).shape == (1, 1024, 7, 7)
        assert inception(torch.zeros(2, 3, 32, 32)).shape == (2, 1024, 1, 1)


def test_bn_inception_reads_rgb_in_the_order_of_its_weights(inception):
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1
    first = inception.conv1_7x7_s2
    seen = []
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        inception(red)
    handle.remove()
    assert torch.equal(seen[0][0, :, 0, 0], torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (1, 64), (1, 8)])
def test_small_conv_takes_any_size_from_8_pixels(channels, size):
    backbone = build_backbone(ModelConfig(), _image(size, channels))
    output = backbone(torch.zeros(2, channels, size, size))
    assert output.shape == (2, backbone.num_features, 1, 1) == (2, 128, 1, 1)


def test_small_conv_features_know_where_a_stroke_is():
    backbone = SmallConv(1).eval()
    left = torch.zeros(1, 1, 32, 32)
    left[..., 4:28, 8] = 1
    with torch.no_grad():
        difference = backbone(left) - backbone(left.roll(8, dims=3))
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "size", "channels", "shape"),
    [
        ("timm:resnet18", 64, 1, (2, 512, 2, 2)),
        ("timm:vit_tiny_patch16_224", 32, 3, (2, 192)),
        ("timm:mobilenetv3_small_050", 64, 3, (2, 1024, 2, 2)),
    ],
)
def test_timm_models_give_maps_or_vectors(name, size, channels, shape):
    config = ModelConfig(backbone=name, embedding_dim=16)
    embedder = build_embedder(config, _image(size, channels), 0, None)
    images = torch.zeros(2, channels, size, size)
    features = embedder.backbone(images)
    assert features.shape == shape
    assert embedder.backbone.num_features == shape[1]
    assert embedder(images).shape == (2, 16)
    assert not [name for name, _ in embedder.named_parameters() if "fc." in name]


def test_batch_norm_with_activation_is_converted_with_it():
    config = ModelConfig(backbone="timm:mobilenetv3_small_050", frozen_batch_norm=True)
    embedder = build_embedder(config, _image(64), 0, None)
    assert not [m for m in embedder.modules() if isinstance(m, nn.BatchNorm2d)]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        plain = build_backbone(config, _image(64)).eval()
    plain.load_state_dict(embedder.backbone.state_dict())
    normalised = (images - 0.5) / 0.5
    torch.testing.assert_close(embedder.train().backbone(normalised), plain(normalised))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "smal_conv"},
            "model.backbone=smal_conv is unknown; use small_conv, bn_incep",
        ),
        ({"backbone": "timm:resnet19"}, "resnet19 is no model of timm .*; did you mean .*resnet"),
        ({"backbone": "timm:inception_v3"}, "does not take images of data.image.size=16"),
        ({"backbone": "bn_inception"}, "bn_inception does not take images of data.image.size=16"),
        ({"pretrained": True}, "nobody publishes weights of small_conv"),
        ({"pretrained": True, "weights": "w.pth"}, "are two starts; keep one"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(UsageError, match=message) as refusal:
        build_backbone(ModelConfig(**changes), _image(16))
    assert "\n" not in str(refusal.value)


def test_pretrained_weights_out_of_reach_name_the_local_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(RunError, match=r"cannot be fetched .*set model\.weights") as refusal:
        build_backbone(ModelConfig(backbone="timm:resnet18.a1_in1k", pretrained=True), _image(64))
    assert "\n" not in str(refusal.value)


def _published_file(path: Path, inception: BNInception) -> dict[str, torch.Tensor]:
    """What the known file looks like: norms of shape (1, C), no counters, and a classifier."""
    content = {}
    for name, tensor in inception.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            content[name] = (tensor[None] if "_bn." in name else tensor).clone()
    content["last_linear.weight"] = torch.zeros(1000, 1024)
    content["last_linear.bias"] = torch.zeros(1000)
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        save_file(content, path)
    return content


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_the_known_layout_load(tmp_path, inception, suffix):
    path = tmp_path / f"weights{suffix}"
    _published_file(path, inception)
    config = ModelConfig(backbone="bn_inception", weights=str(path))
    loaded = build_embedder(config, _image(227), 1, None).backbone.state_dict()
    for name, tensor in inception.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_nested_and_prefixed_weights_load(tmp_path):
    source, target = SmallConv(1), SmallConv(1)
    content = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "w.pth")
    load_weights(target, str(tmp_path / "w.pth"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


class _Malicious:
    def __reduce__(self):
        return print, ("executed",)


def _bad_files(folder: Path) -> dict[str, str]:
    torch.save({"x": _Malicious()}, folder / "objects.pth")
    (folder / "noise.safetensors").write_bytes(b"noise" * 100)
    torch.save({"a": 3}, folder / "numbers.pth")
    (folder / "empty.pth").write_bytes(b"")
    renamed = {f"x.{name}": tensor for name, tensor in SmallConv(1).state_dict().items()}
    torch.save(renamed, folder / "renamed.pth")
    torch.save(SmallConv(3).state_dict(), folder / "colour.pth")
    return {
        "absent.pth": "is no file",
        "objects.pth": "holds Python objects",
        "noise.safetensors": "cannot be read",
        "numbers.pth": "is no table of names and tensors",
        "empty.pth": "cannot be read",
        "renamed.pth": r"missing layers\.0\.weight, .* more; unexpected x\.layers\.0\.weight, ",
        "colour.pth": r"layers\.0\.weight of shape \(16, 3, .* the backbone of \(16, 1, 3, 3\)",
    }


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys):
    for name, message in _bad_files(tmp_path).items():
        with pytest.raises(UsageError, match=message) as refusal:
            load_weights(SmallConv(1), str(tmp_path / name))
        assert "\n" not in str(refusal.value)
    assert "executed" not in capsys.readouterr().out
