"""What an evaluation refuses before any work, and what a start with a small exponent is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from worker_group import run_workers

from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.index import Index, load_index
from dist_dml.data.pack.digits import pack_digits
from dist_dml.errors import UsageError
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.measurement import check_evaluation, measure_model
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import Ranks, World
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.full_scores import ScoreOptions, score_everything
from dist_dml.split_embedding import embed_pixels
from dist_dml.split_vectors import Model
from dist_dml.training_run import starting_loss_warning

PIXELS = 64
SETTINGS = [
    "data.image={size: 8, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
    "evaluation.protocols=[{name: seen, query: seen, gallery: train}]",
    "checkpoint.best_metric=''",
]
WORLD = World(Ranks(), torch.device("cpu"), None, None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("digits")
    pack_digits(out)
    return load_index(out)


def config_of(index: Index, *overrides: str) -> Config:
    return resolve(None, [*SETTINGS, *overrides]).config


def test_probabilities_that_memory_cannot_hold_are_refused_with_the_way_out(digits: Index) -> None:
    config = config_of(digits, 'evaluation.distances=["metric(p=0.1)"]')
    check_evaluation(digits, config, 10, 1)
    with pytest.raises(UsageError, match=r"100000000 class probabilities .* GiB .*top=64"):
        check_evaluation(digits, config, 10**8, 1)
    sparse = config_of(digits, 'evaluation.distances=["metric(p=0.1,top=64)"]')
    check_evaluation(digits, sparse, 10**8, 1)


def test_certificates_of_classes_that_were_not_trained_are_refused(digits: Index) -> None:
    config = config_of(digits, 'evaluation.certificates=["metric(p=0.5)"]')
    with pytest.raises(
        UsageError, match=r"certificate_split='seen' holds class 9, .* of 9 classes"
    ):
        check_evaluation(digits, config, 9, 1)


def test_a_distance_named_twice_is_refused(digits: Index) -> None:
    config = config_of(digits, 'evaluation.distances=["metric(p=0.5)", "metric( p = 0.5)"]')
    with pytest.raises(UsageError, match="names one twice"):
        check_evaluation(digits, config, 10, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('evaluation.distances=["metric(p=2)"]', r"0 < p <= 1"),
        ('evaluation.distances=["metric(k=1.5,p=0.5)"]', r"0 < k <= 1.*K\(p\)"),
        ('evaluation.distances=["metric(p=1)"]', r"K\(1\) = 0"),
        ('evaluation.distances=["euclid"]', r"cosine, l2, probability_l2, metric"),
        ('evaluation.certificates=["cosine"]', r"evaluation.certificates has 'cosine'"),
    ],
)
def test_wrong_metrics_are_refused_with_the_condition(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(None, [text])


def test_pixels_have_no_class_probabilities_and_a_classifier_does(digits: Index) -> None:
    # The classifier reads pixels, so that what is measured can be computed by hand.
    config = config_of(
        digits,
        'evaluation.distances=[l2, "metric(p=0.5)", "metric(p=0.5,top=3)"]',
        'evaluation.certificates=["metric(p=0.5)"]',
        "loss.init_std=1",
    )
    bare = measure_model(Model(embed_pixels), digits, config, WORLD, nmi=True)
    assert {name.split("/")[1] for name in bare.scores} == {"l2"}
    classifier = ClassParallelClassifier(
        PIXELS, ClassPartition.of_worker(0, 1, 10), config.loss, config.optimizer, 0, 64
    )
    measured = measure_model(Model(embed_pixels, classifier), digits, config, WORLD, nmi=True)
    kinds = {name.split("/")[1] for name in measured.scores}
    assert kinds == {"l2", "metric_p0.5", "metric_p0.5_top3", "certificate"}
    assert 0 < measured.scores["seen/metric_p0.5_top3/rank_overlap_at_10"] <= 1

    pixels = torch.from_numpy(measured.of("seen", named_distance("l2")).vectors)
    labels = torch.from_numpy(digits.class_id[digits.select("seen")].astype(np.int64))
    log_q = (pixels @ classifier.weight.detach().T).double().log_softmax(1)
    epsilon = MetricLoss.l2(0.8284271247461901, 0.5).to_label(log_q, labels)
    correct = log_q.argmax(1) == labels
    prefix = "seen/certificate/metric_p0.5"
    assert measured.scores[f"{prefix}/accuracy"] == pytest.approx(correct.double().mean().item())
    assert measured.scores[f"{prefix}/epsilon"] == pytest.approx(
        epsilon[correct].max().item(), rel=1e-4
    )


def test_the_last_evaluation_measures_what_costs_a_pass_and_the_others_do_not(
    digits: Index,
) -> None:
    config = config_of(digits, "evaluation.distances=[cosine]", "run.seed=3")
    often = measure_model(Model(embed_pixels), digits, config, WORLD, nmi=False)
    last = measure_model(Model(embed_pixels), digits, config, WORLD, nmi=True)
    cosine = named_distance("cosine")
    options = ScoreOptions(config.evaluation.recall_at, nmi=True, seed=3, resamples=0)
    parts = last.of("seen", cosine), last.of("train", cosine)
    expected = score_everything(*parts, cosine, options).scores
    assert last.scores == {f"seen/cosine/{name}": value for name, value in expected.items()}
    extra = {name.split("/")[2] for name in set(last.scores) - set(often.scores)}
    assert {"mean_reciprocal_rank", "nmi", "ami", "tar_at_far_0.001", "roc_auc"} < extra
    assert often.scores.items() < last.scores.items()


def test_a_partial_distance_may_be_named_before_the_full_one(digits: Index) -> None:
    config = config_of(
        digits,
        'evaluation.distances=["metric(p=0.5,top=3)", "metric(p=0.5)"]',
        "loss.init_std=1",
    )
    classifier = ClassParallelClassifier(
        PIXELS, ClassPartition.of_worker(0, 1, 10), config.loss, config.optimizer, 0, 64
    )
    measured = measure_model(Model(embed_pixels, classifier), digits, config, WORLD, nmi=True)
    assert 0 < measured.scores["seen/metric_p0.5_top3/rank_overlap_at_10"] <= 1


def measured_by(rank, num_workers, group, folder, settings, whole):
    index = load_index(folder)
    config = config_of(index, *settings)
    world = World(Ranks(rank, num_workers, rank, num_workers), torch.device("cpu"), group, None)
    partition = ClassPartition.of_worker(rank, num_workers, 10, group)
    classifier = ClassParallelClassifier(
        PIXELS, partition, config.loss, config.optimizer, config.run.seed, 64
    )
    model = Model(embed_pixels, classifier)
    found = measure_model(model, index, config, world, nmi=whole, whole=whole)
    ids = {key: of.ids for key, of in found.vectors.items()}
    return found.scores, ids, found.query_scores["seen", "cosine"]


@pytest.mark.parametrize("whole", [True, False])
def test_workers_measure_what_one_process_does_and_the_first_alone_holds_all(
    digits: Index, tmp_path: Path, whole: bool
) -> None:
    settings = (
        "evaluation.distances=[cosine, l2]",
        'evaluation.certificates=["metric(p=0.5)"]' if whole else "evaluation.certificates=[]",
        "loss.init_std=1",
        "data.loader_processes=0",
    )
    [(expected, _, queries)] = run_workers(measured_by, 1, tmp_path, digits.folder, settings, whole)
    names = {"seen/cosine/mean_reciprocal_rank", "seen/cosine/nmi", "seen/l2/roc_auc"}
    assert whole == (names <= set(expected))
    results = run_workers(measured_by, 3, tmp_path, digits.folder, settings, whole)
    for rank, (scores, ids, found) in enumerate(results):
        assert scores.keys() == expected.keys()
        for name, value in scores.items():
            # Classes are divided: sums over them, behind certificates, are of another order.
            exact = "certificate" not in name
            assert value == (expected[name] if exact else pytest.approx(expected[name])), name
        np.testing.assert_array_equal(found.map_at_r, queries.map_at_r)
        np.testing.assert_array_equal(found.first_hit_rank, queries.first_hit_rank)
        assert bool(ids) == (whole and rank == 0)
    if whole:
        kept = results[0][1]
        assert {split for split, _, _ in kept} == {"seen", "train"}
        np.testing.assert_array_equal(kept["seen", "embedding", 0], digits.select("seen"))


@pytest.mark.parametrize(
    ("settings", "num_classes", "words"),
    [
        ("loss={name: l2, p: 0.1}", 10**6, "2.9e+06"),
        ("loss={name: l2, p: 0.5}", 1000, "loss.p=0.5 with 1000 classes"),
        ("loss={name: l2, p: 0.5}", 10, ""),
        ("loss={name: l2, p: 0.99}", 10**6, ""),
        ("loss={name: l1}", 10**6, ""),
        ("loss={name: cross_entropy}", 10**6, ""),
    ],
)
def test_a_small_exponent_with_many_classes_is_told_where_it_starts(
    settings: str, num_classes: int, words: str
) -> None:
    warning = starting_loss_warning(resolve(None, [settings]).config, num_classes)
    assert words in warning
    assert bool(warning) == bool(words)
