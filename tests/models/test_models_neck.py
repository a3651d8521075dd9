"""Pooling, linear layer, norm and dropout of the neck against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_dml.config import ModelConfig
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.models.dropout import KeyedDropout, RowKeys, convert_dropout
from dist_dml.models.neck import Neck


def _features() -> Tensor:
    return torch.rand(6, 8, 3, 5, generator=torch.Generator().manual_seed(0))


def _neck(config: ModelConfig, row_keys: RowKeys | None = None) -> Neck:
    return Neck(config, 8, row_keys or RowKeys(), None)


def _keys(positions: Tensor, step: int = 0) -> RowKeys:
    holder = RowKeys()
    holder.keys = row_keys(key_of(0, "dropout", step), positions)
    return holder


def test_poolings_equal_their_formulas():
    x = _features()
    flat = x.flatten(2)
    expected = {
        "average": flat.mean(2),
        "max": flat.max(2).values,
        "average_max": flat.mean(2) + flat.max(2).values,
        "gem": (flat**3).mean(2) ** (1 / 3),
    }
    for pooling, value in expected.items():
        torch.testing.assert_close(_neck(ModelConfig(pooling=pooling))(x), value)


def test_gem_learns_its_exponent():
    neck = _neck(ModelConfig(pooling="gem"))
    neck(_features()).sum().backward()
    assert neck.pool.exponent.grad.abs().item() > 0


def test_pooled_features_pass_and_refuse_another_pooling():
    x = torch.randn(4, 8)
    assert torch.equal(_neck(ModelConfig())(x), x)
    with pytest.raises(UsageError, match=r"model\.pooling=max needs a feature map"):
        _neck(ModelConfig(pooling="max"))(x)


def test_linear_layer_has_a_bias_only_without_a_norm():
    assert _neck(ModelConfig(embedding_dim=4)).linear.bias is not None
    for norm in ("batch", "layer"):
        assert _neck(ModelConfig(embedding_dim=4, norm=norm)).linear.bias is None


def test_norms_have_no_parameters_and_equal_torch():
    x = _features()
    pooled = x.mean((2, 3))
    layer, batch = _neck(ModelConfig(norm="layer")), _neck(ModelConfig(norm="batch"))
    assert not [*layer.parameters(), *batch.parameters()]
    torch.testing.assert_close(layer(x), F.layer_norm(pooled, (8,)))
    torch.testing.assert_close(batch(x), F.batch_norm(pooled, None, None, training=True))


def test_dropout_follows_the_norm_and_scales_what_it_keeps():
    holder = _keys(torch.arange(6))
    trained = _neck(ModelConfig(norm="layer", dropout=0.5), holder)(_features())
    clean = F.layer_norm(_features().mean((2, 3)), (8,))
    kept = trained != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(trained[kept], 2 * clean[kept])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_keyed_dropout_drops_its_share_and_keeps_the_mean(p):
    ones = torch.ones(200, 500)
    dropped = KeyedDropout(p, 1, _keys(torch.arange(200)))(ones)
    assert abs((dropped == 0).float().mean().item() - p) < 0.006
    assert abs(dropped.mean().item() - 1) < 0.03


def test_masks_follow_rows_and_not_their_cut():
    ones = torch.ones(10, 64)
    whole = KeyedDropout(0.5, 1, _keys(torch.arange(10)))(ones)
    parts = [KeyedDropout(0.5, 1, _keys(p))(ones[p]) for p in torch.arange(10).split([3, 6, 1])]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(10)
    assert torch.equal(KeyedDropout(0.5, 1, _keys(order))(ones), whole[order])


def test_masks_differ_between_layers_steps_and_rows():
    ones = torch.ones(10, 64)
    whole = KeyedDropout(0.5, 1, _keys(torch.arange(10)))(ones)
    assert not torch.equal(KeyedDropout(0.5, 2, _keys(torch.arange(10)))(ones), whole)
    assert not torch.equal(KeyedDropout(0.5, 1, _keys(torch.arange(10), 1))(ones), whole)
    assert len(whole.unique(dim=0)) == 10


def test_windows_of_a_row_are_cut_with_it():
    ones = torch.ones(12, 16)  # Four rows of three windows each.
    whole = KeyedDropout(0.5, 1, _keys(torch.arange(4)))(ones)
    last = KeyedDropout(0.5, 1, _keys(torch.tensor([3])))(ones[:3])
    assert torch.equal(whole[9:], last)
    with pytest.raises(ValueError, match="12 rows for 5 row keys"):
        KeyedDropout(0.5, 1, _keys(torch.arange(5)))(ones)


def test_converted_layers_drop_elements_channels_and_paths():
    from dist_dml.models.torchvision_shim import ensure_torchvision_imports

    ensure_torchvision_imports()
    from timm.layers import DropPath

    model = nn.ModuleList([nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5), nn.Dropout(0.0)])
    convert_dropout(model, _keys(torch.arange(40)))
    assert [layer.salt for layer in model[:3]] == [1, 2, 3]
    assert type(model[3]) is nn.Dropout
    ones = torch.ones(40, 8, 4, 4)
    elements, channels, paths = (layer(ones) for layer in model[:3])
    assert len(elements[0].flatten().unique()) == 2
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(ones))
    assert len(channels[:, :, 0, 0].unique(dim=0)) > 20
    assert torch.equal(paths, paths[:, :1, :1, :1].expand_as(ones))
    assert set(paths[:, 0, 0, 0].tolist()) == {0.0, 2.0}


def test_random_layers_without_a_keyed_form_are_refused():
    with pytest.raises(UsageError, match="type AlphaDropout"):
        convert_dropout(nn.Sequential(nn.AlphaDropout(0.1)), RowKeys())


def test_fused_attention_gives_way_to_keyed_attention_dropout():
    from dist_dml.models.torchvision_shim import ensure_torchvision_imports

    ensure_torchvision_imports()
    from timm.layers import Attention

    torch.manual_seed(0)
    model = nn.Sequential(Attention(16, num_heads=2, attn_drop=0.5))
    holder = _keys(torch.arange(6))
    convert_dropout(model, holder)
    tokens = torch.randn(6, 5, 16)
    whole = model(tokens)
    holder.keys = _keys(torch.arange(4, 6)).keys
    torch.testing.assert_close(model(tokens[4:]), whole[4:])
