"""The embedder computes the same function for every number of workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from worker_group import run_workers

from dist_dml.config import ModelConfig, OptimizerConfig
from dist_dml.data_config import ImageConfig
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.models.embedder import Embedder, build_embedder, parameter_groups

GREY = ImageConfig(size=32, resize=0, channels=1, mean=(0.4,), std=(0.3,))
NECK = ModelConfig(embedding_dim=24, norm="batch", dropout=0.5)
ROWS = 9


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, row keys and an upstream gradient of a whole batch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (ROWS, 1, 32, 32), generator=generator, dtype=torch.uint8)
    keys = row_keys(key_of(5, "dropout", 17), torch.arange(ROWS))
    return images, keys, torch.randn(ROWS, 24, generator=generator, dtype=torch.float64)


def _run(embedder: Embedder, rows: slice) -> dict[str, Tensor]:
    images, keys, gradient = (part[rows] for part in _batch())
    embeddings = embedder.double().train()(images, keys)
    embeddings.backward(gradient)
    result = {f"{name}.grad": p.grad for name, p in embedder.named_parameters()}
    result |= dict(embedder.named_buffers())
    return result | {"embeddings": embeddings.detach()}


def _worker(
    rank: int, num_workers: int, group: Any, counts: list[int], config: ModelConfig
) -> dict[str, Tensor]:
    start = sum(counts[:rank])
    return _run(build_embedder(config, GREY, 3, group), slice(start, start + counts[rank]))


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[5, 4], [6, 1, 2], [5, 0, 4]])
@pytest.mark.parametrize("frozen", [False, True])
def test_workers_with_uneven_rows_equal_one_process(tmp_path, counts, frozen):
    config = NECK.model_copy(update={"frozen_batch_norm": frozen})
    parts = run_workers(_worker, len(counts), tmp_path, counts, config)
    expected = _run(build_embedder(config, GREY, 3, None), slice(None))
    assert all(part.keys() == expected.keys() for part in parts)
    for name, value in expected.items():
        pieces = [part[name] for part in parts]
        if name == "embeddings":
            actual = torch.cat(pieces)
        else:
            actual = sum(pieces) if name.endswith(".grad") else pieces[-1]
        torch.testing.assert_close(
            actual, value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    first = build_embedder(NECK, GREY, 3, None).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    again = build_embedder(NECK, GREY, 3, None).state_dict()
    other = build_embedder(NECK, GREY, 4, None).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["neck.linear.weight"], other["neck.linear.weight"])
    assert not torch.equal(first["backbone.layers.0.weight"], other["backbone.layers.0.weight"])


def test_bytes_and_floats_of_an_image_give_one_embedding():
    embedder = build_embedder(NECK, GREY, 3, None).eval()
    images = _batch()[0]
    torch.testing.assert_close(embedder(images), embedder(images.float() / 255))


def test_retrieval_features_have_no_dropout_and_need_no_keys():
    dropped = build_embedder(NECK, GREY, 3, None).eval()
    plain = build_embedder(NECK.model_copy(update={"dropout": 0.0}), GREY, 3, None).eval()
    images = _batch()[0]
    assert torch.equal(dropped(images), plain(images))


def test_training_with_dropout_asks_for_row_keys():
    with pytest.raises(ValueError, match="needs row_keys"):
        build_embedder(NECK, GREY, 3, None)(_batch()[0])


def test_embeddings_are_float32_under_autocast():
    embedder = build_embedder(NECK, GREY, 3, None).eval()
    images = _batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = embedder(images)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, embedder(images), rtol=0.1, atol=0.05)


def test_weights_stay_contiguous_after_a_channels_last_step():
    embedder = build_embedder(NECK, GREY, 3, None)
    images, keys, _ = _batch()
    embedder(images, keys).sum().backward()
    for name, parameter in embedder.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad.is_contiguous(), name


def test_weight_decay_spares_biases_norms_and_exponents():
    config = ModelConfig(pooling="gem", embedding_dim=24)
    embedder = build_embedder(config, GREY, 3, None)
    decayed, spared = parameter_groups(embedder, OptimizerConfig(weight_decay=0.01))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert decayed["names"] == [
        *(f"backbone.layers.{i}.weight" for i in (0, 4, 8, 12)),
        "backbone.project.weight",
        "neck.linear.weight",
    ]
    norms = [f"backbone.layers.{i}.{part}" for i in (1, 5, 9, 13) for part in ("weight", "bias")]
    assert spared["names"] == [*norms, "neck.pool.exponent", "neck.linear.bias"]
    parameters = dict(embedder.named_parameters())
    for group in (decayed, spared):
        assert all(parameters[n] is p for n, p in zip(group["names"], group["params"], strict=True))
