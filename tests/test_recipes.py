"""The recipes of papers B and C: every file and variant loads and has the papers' numbers."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_dml.config import Config
from dist_dml.config_loading import VARIANTS, resolve
from dist_dml.data.pack import cars, cub, inshop, online_products
from dist_dml.errors import UsageError
from dist_dml.loss_tables import PAIR_LOSSES
from dist_dml.schedule import learning_rate_factor

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
DATASETS = ("cub", "cars", "sop", "inshop")
PACKS = {"cub": cub, "cars": cars, "sop": online_products, "inshop": inshop}
FILES = sorted((*FOLDER.glob("paper_b/*.yaml"), *FOLDER.glob("paper_c/*.yaml")))


def variants_of(path: Path) -> list[str]:
    """Names of the variants that a file holds."""
    return list(yaml.safe_load(path.read_text(encoding="utf-8")).get(VARIANTS, {}))


RECIPES = [f"{p.parent.name}/{p.name}{v and ':' + v}" for p in FILES for v in ("", *variants_of(p))]
METHODS = (
    *("c1", "c2", "ms", "triplet", "c1_xbm", "c2_xbm"),
    *("proxy_anchor", "proxy_nca", "soft_triple"),
    *("c1_ccp", "c2_ccp", "ms_ccp", "triplet_ccp"),
    *("normalised_softmax", "cosface", "arcface", "fastap", "contrastive", "snca", "cross_entropy"),
)


@cache
def recipe(name: str) -> Config:
    return resolve(FOLDER / name, []).config


def has(config: Any, **wanted: Any) -> None:
    found = {key: getattr(config, key) for key in wanted}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads(name: str) -> None:
    config = recipe(name)
    assert config.data.path.startswith("datasets/")


def test_no_two_recipes_write_into_the_same_run() -> None:
    names = [recipe(name).run.name for name in RECIPES]
    assert len(set(names)) == len(names)


def test_all_data_sets_and_methods_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("paper_b/*.yaml")} == {*DATASETS, "digits"}
    assert {path.stem for path in FOLDER.glob("paper_c/*.yaml")} == set(DATASETS)
    for dataset in DATASETS:
        assert variants_of(FOLDER / f"paper_c/{dataset}.yaml") == list(METHODS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_says_how_it_is_run_and_on_what(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("\nrun:")[0]
    labels = ["Command", "Hardware", "Duration", "Score", "Data"]
    for label in [*labels, "Goal"] if path.stem in DATASETS else labels:
        assert re.search(rf"^# {label}: +\S", head, re.MULTILINE), label
    for named in re.findall(r"configs/\S+", head):
        resolve(ROOT / named, [])
    data = resolve(path, []).config.data.path
    assert re.search(rf"dist-dml pack .*{data}\b", head)


@pytest.mark.parametrize("key", ["lr", "warmup", "proxies_per_class"])
def test_a_key_that_is_none_is_refused_in_a_recipe(key: str) -> None:
    with pytest.raises(UsageError, match=f"unknown key 'optimizer.{key}'"):
        resolve(FOLDER / "paper_c/cub.yaml:c2", [f"optimizer.{key}=1"])


# Paper B, section 5.3, and the table of papers.md 3.12: epochs, rate, momentum, colours, ratio.
PAPER_B = {
    "cub": (30, 0.02, 0.0, (0.25, 0.25, 0.25, 0.0), (3 / 4, 4 / 3), "none"),
    "cars": (100, 0.05, 0.0, (0.3, 0.3, 0.3, 0.1), (1.0, 1.0), "batch"),
    "sop": (100, 0.003, 0.99, (0.0, 0.0, 0.0, 0.0), (3 / 4, 4 / 3), "batch"),
    "inshop": (100, 0.003, 0.99, (0.0, 0.0, 0.0, 0.0), (3 / 4, 4 / 3), "batch"),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_paper_b_has_its_rates_its_network_and_its_augmentation(dataset: str) -> None:
    config = recipe(f"paper_b/{dataset}.yaml")
    epochs, rate, momentum, colours, ratio, norm = PAPER_B[dataset]
    assert config.training.epochs == epochs
    has(config.optimizer, name="sgd", learning_rate=rate, momentum=momentum, class_multiplier=1)
    has(config.optimizer, weight_decay=5e-4, class_weight_decay=5e-4, nesterov=momentum > 0)
    has(config.loss, name="cross_entropy", label_smoothing=0.1, smoothing="others", init_std=0)
    assert config.loss.bias
    assert not config.loss.uses_cosine
    has(config.model, backbone="timm:resnet50.tv_in1k", pretrained=True, embedding_dim=0)
    has(config.model, pooling="average", norm=norm, dropout=0.5, frozen_batch_norm=True)
    has(config.data, batch_size=128, order="shuffled", drop_last=True, folds=0)
    augment = config.data.augment
    assert augment.crop_scale == (0.16, 1.0)
    assert augment.crop_ratio == pytest.approx(ratio)
    assert augment.horizontal_flip == 0.5
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == colours
    assert (config.data.image.size, config.data.image.resize) == (224, 256)


def test_paper_b_warms_up_as_its_code_does() -> None:
    config = recipe("paper_b/cub.yaml")
    total = config.training.epochs * (cub.PUBLISHED.counts["train"][0] // 128)
    for i in (0, 57, 99, 100, 700, total - 1):
        published = min((i + 1) / 100, (1 + math.cos(math.pi * i / total)) / 2)
        assert learning_rate_factor(i, total, config.schedule) == pytest.approx(published)


@pytest.mark.parametrize("dataset", DATASETS)
def test_paper_b_chooses_by_the_test_split_only_where_it_is_asked_to(dataset: str) -> None:
    chosen = {
        variant: recipe(f"paper_b/{dataset}.yaml{variant}").checkpoint.best_metric
        for variant in ("", ":test_selected", ":folds")
    }
    assert list(chosen.values()) == [
        "",
        "unseen/cosine/recall_at_1",
        "validation/cosine/map_at_r",
    ]
    assert recipe(f"paper_b/{dataset}.yaml:folds").data.folds == 4


def test_spce_is_trained_as_cross_entropy_is_with_paper_bs_appendix() -> None:
    cross_entropy = recipe("paper_b/digits.yaml")
    spce = resolve(FOLDER / "paper_b/digits.yaml", ["loss.name=spce"]).config
    assert cross_entropy.loss.name == "cross_entropy"
    assert spce.optimizer == cross_entropy.optimizer
    has(spce.optimizer, name="adam", weight_decay=1e-4)
    has(spce.schedule, name="cosine", warmup_steps=0)
    assert (spce.data.batch_size, spce.model.embedding_dim) == (128, 100)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_paper_c_treats_every_method_alike(dataset: str, method: str) -> None:
    config = recipe(f"paper_c/{dataset}.yaml:{method}")
    has(config.optimizer, name="adam", learning_rate=1e-5, clip_norm=10)
    has(config.optimizer, weight_decay=1e-4, class_weight_decay=1e-4)
    assert config.optimizer.betas == (0.9, 0.999)
    has(config.model, backbone="bn_inception", embedding_dim=128, pooling="average", norm="none")
    assert config.model.frozen_batch_norm
    assert config.schedule.name == "constant"
    has(config.data, batch_size=32, order="balanced", folds=4, fold=0)
    assert (config.data.image.size, config.data.image.resize) == (227, 256)
    assert config.data.augment.crop_scale == (0.16, 1.0)
    assert config.data.augment.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    assert config.data.augment.horizontal_flip == 0.5
    assert config.checkpoint.best_metric == "validation/cosine/map_at_r"
    assert config.evaluation.protocols[0].query == "validation"


@pytest.mark.parametrize("dataset", DATASETS)
def test_splits_that_recipes_measure_are_those_that_packers_write(dataset: str) -> None:
    packed = set(PACKS[dataset].PUBLISHED.counts)
    for name in RECIPES:
        if re.match(rf"paper_[bc]/{dataset}\.yaml", name):
            for protocol in recipe(name).evaluation.protocols:
                if protocol.query != "validation":
                    assert {protocol.query, protocol.gallery or protocol.query} == packed - {
                        "train"
                    }


# Section 2.1 of paper C's supplement; Proxy-Anchor and ProxyNCA++ are the same on all data.
PAPER_C: dict[str, dict[str, dict[str, float]]] = {
    "cub": {
        "c2": {"positive_margin": 0, "negative_margin": 0.3841},
        "triplet": {"triplet_margin": 0.0961},
        "ms": {"alpha": 2, "beta": 40, "base": 0.5},
        "soft_triple": {
            "scale": 20,
            "centre_temperature": 0.1,
            "centre_spread": 0.2,
            "cosine_margin": 0.01,
        },
        "c1_xbm": {"memory_size": 25 * 32},
    },
    "cars": {
        "c2": {"positive_margin": 0.2652, "negative_margin": 0.5409},
        "triplet": {"triplet_margin": 0.1190},
        "ms": {"alpha": 14.35, "beta": 75.83, "base": 0.66},
        "soft_triple": {
            "scale": 17.69,
            "centre_temperature": 19.18,
            "centre_spread": 0.0669,
            "cosine_margin": 0.3588,
        },
        "c1_xbm": {"memory_size": 25 * 32},
    },
    "inshop": {
        "c2": {"positive_margin": 0.2858, "negative_margin": 0.5130},
        "triplet": {"triplet_margin": 0.0451},
        "ms": {"alpha": 8.49, "beta": 57.38, "base": 0.41},
        "soft_triple": {
            "scale": 20,
            "centre_temperature": 0.1,
            "centre_spread": 0.2,
            "cosine_margin": 0.01,
        },
        "c1_xbm": {"memory_size": 400 * 32},
    },
    "sop": {
        "c2": {"positive_margin": 0.2858, "negative_margin": 0.5130},
        "triplet": {"triplet_margin": 0.0451},
        "ms": {"alpha": 2, "beta": 40, "base": 0.5},
        "soft_triple": {
            "scale": 100,
            "centre_temperature": 47.9,
            "centre_spread": 0.2,
            "cosine_margin": 0.3145,
        },
        "c1_xbm": {"memory_size": 1400 * 32},
    },
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_paper_c_has_its_hyper_parameters(dataset: str) -> None:
    def loss(method: str) -> Any:
        return recipe(f"paper_c/{dataset}.yaml:{method}").loss

    for method, wanted in PAPER_C[dataset].items():
        has(loss(method), **wanted)
    has(loss("c1"), name="c1", negative_margin=0.5, memory_size=0)
    has(loss("c1_xbm"), name="c1", negative_margin=0.5, memory_warmup_steps=1000)
    margins = PAPER_C[dataset]["c2"]
    size = PAPER_C[dataset]["c1_xbm"]["memory_size"]
    has(loss("c2_xbm"), name="c2", memory_size=size, memory_warmup_steps=1000, **margins)
    has(loss("triplet"), name="triplet", comparison="l2", mining="all", reduction="nonzero")
    assert loss("ms").mining_epsilon is None
    has(loss("proxy_anchor"), name="proxy_anchor", scale=32, cosine_margin=0.1)
    # 2 x scale x cosine = cosine / 0.1.
    has(loss("proxy_nca"), name="proxy_nca", scale=0.5 / 0.1)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_pairs_have_four_images_a_class_and_paper_cs_proxies_one(dataset: str, method: str) -> None:
    config = recipe(f"paper_c/{dataset}.yaml:{method}")
    proxies = method in ("proxy_anchor", "proxy_nca", "soft_triple")
    assert config.data.samples_per_class == (1 if proxies else 4)
    if proxies:
        assert config.optimizer.class_multiplier == 100
        assert config.schedule.warmup_steps == (25 if dataset in ("cub", "cars") else 250)
    else:
        assert config.schedule.warmup_steps == 0
    if config.loss.name in PAIR_LOSSES:
        assert config.optimizer.class_multiplier == 1


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", ["c1", "c2", "ms", "triplet"])
def test_chance_constrained_proxies_take_the_loss_as_it_is_and_paper_cs_pool(
    dataset: str, method: str
) -> None:
    plain = recipe(f"paper_c/{dataset}.yaml:{method}")
    with_proxies = recipe(f"paper_c/{dataset}.yaml:{method}_ccp")
    assert plain.proxies.per_class == 0
    per_class, pool, steps = (8, 12, 25) if dataset in ("cub", "cars") else (4, 7, 250)
    has(with_proxies.proxies, per_class=per_class, pool_size=pool, evaluate_steps=steps)
    has(with_proxies.proxies, projection=2e-4, run_patience=60, batch_weight=0.1)
    assert with_proxies.loss == plain.loss
    assert with_proxies.optimizer == plain.optimizer
    assert with_proxies.training.max_steps == 0


# Paper C, Table 3.
STEPS = {
    "sop": {"c2": 62, "c2_xbm": 81, "ms": 67, "triplet": 93, "proxy_anchor": 54, "proxy_nca": 88},
    "inshop": {"c2": 114, "c2_xbm": 93, "ms": 98, "triplet": 73, "proxy_anchor": 87},
}


@pytest.mark.parametrize("dataset", ["sop", "inshop"])
def test_trainings_are_as_long_as_table_3_says(dataset: str) -> None:
    for method, thousands in STEPS[dataset].items():
        config = recipe(f"paper_c/{dataset}.yaml:{method}")
        assert config.training.max_steps == 1000 * thousands, method


# MLRC's best values: temperature; CosFace's margin; ArcFace's in degrees; bins; rates of weights.
MLRC = {
    "cub": (0.1087, 0.6182, 23.22, 17, (4.46e-3, 2.53e-3, 5.13e-3)),
    "cars": (0.0886, 0.4324, 20.52, 27, (1.10e-2, 7.41e-3, 7.39e-6)),
    "sop": (0.0630, 0.3364, 18.63, 16, (5.46e-4, 2.16e-3, 2.01e-3)),
}
MLRC["inshop"] = MLRC["sop"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_losses_that_paper_c_has_not_take_the_values_of_mlrc(dataset: str) -> None:
    temperature, margin, degrees, bins, rates = MLRC[dataset]
    methods = ("normalised_softmax", "cosface", "arcface")
    softmax, cosface, arcface = (recipe(f"paper_c/{dataset}.yaml:{m}") for m in methods)
    has(softmax.loss, temperature=temperature)
    has(cosface.loss, cosine_margin=margin)
    assert arcface.loss.angle_margin == pytest.approx(math.radians(degrees), abs=1e-4)
    assert recipe(f"paper_c/{dataset}.yaml:fastap").loss.bins == bins
    for config, rate in zip((softmax, cosface, arcface), rates, strict=True):
        optimizer = config.optimizer
        assert optimizer.learning_rate * optimizer.class_multiplier == pytest.approx(rate)
