"""Folds of the training classes: the division of the Reality Check, and the index of a fold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_dml.config import Config
from dist_dml.data.folds import VALIDATION, fold_of, validation_classes
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index, open_plan
from dist_dml.data_config import DataConfig, MixturePart
from dist_dml.errors import UsageError


def reality_check(num_classes: int, folds: int, fold: int) -> tuple[set[int], set[int]]:
    """Training and validation classes as its `get_kfold_generator` walks them, class by class."""
    num_validation = num_classes // folds
    place = int((fold / folds) * num_classes + 1e-9)
    walked = [(place + step) % num_classes for step in range(num_classes)]
    cut = num_classes - num_validation
    return set(walked[:cut]), set(walked[cut:])


@pytest.mark.parametrize(("fold", "first"), [(0, 75), (1, 0), (2, 25), (3, 50)])
def test_cubs_hundred_classes_are_divided_as_the_reference_says(fold: int, first: int) -> None:
    assert validation_classes(100, 4, fold).tolist() == list(range(first, first + 25))


@given(st.integers(2, 60), st.integers(2, 7), st.integers(0, 6))
def test_the_division_is_that_of_the_reality_check(classes: int, folds: int, fold: int) -> None:
    if fold >= folds or classes < folds:
        return
    training, validation = reality_check(classes, folds, fold)
    ours = set(validation_classes(classes, folds, fold).tolist())
    assert ours == validation
    assert training == set(range(classes)) - ours


@pytest.mark.parametrize("folds", [2, 3, 4, 5])
def test_no_class_validates_two_folds_and_each_fold_has_as_many(folds: int) -> None:
    every = [validation_classes(11, folds, fold) for fold in range(folds)]
    assert {len(part) for part in every} == {11 // folds}
    joined = np.concatenate(every)
    assert len(np.unique(joined)) == len(joined)


@pytest.mark.parametrize("fold", [0, 1])
def test_a_fold_trains_on_some_classes_and_validates_on_the_others(index: Index, fold: int) -> None:
    divided = fold_of(index, "train", 2, fold)
    training, validation = divided.select("train"), divided.select(VALIDATION)
    both = np.sort(np.concatenate([training, validation]))
    assert np.array_equal(both, index.select("train"))
    assert set(divided.class_id[training]) == set(range(divided.num_classes))
    assert divided.class_id[validation].min() == divided.num_classes
    held_out = validation_classes(index.num_classes, 2, fold)
    assert set(index.class_id[validation]) == set(held_out.tolist())
    assert divided.metadata["samples_per_split"]["train"] == len(training)
    assert divided.metadata["num_classes"] == divided.num_classes == 5 - len(held_out)


def test_every_sample_keeps_its_name_its_key_and_its_other_split(index: Index) -> None:
    divided = fold_of(index, "train", 2, 1)
    assert sorted(divided.class_names) == sorted(index.class_names)
    for sample in range(len(index)):
        name = divided.class_names[divided.class_id[sample]]
        assert name == index.class_names[index.class_id[sample]]
        assert divided.key(sample) == index.key(sample)
    for split in ("seen", "test"):
        assert np.array_equal(divided.select(split), index.select(split))
    # Classes that no fold trains on keep their ids: the folds' test labels agree.
    test = index.select("test")
    assert np.array_equal(divided.class_id[test], index.class_id[test])


def test_the_fingerprint_tells_folds_and_their_number_apart(index: Index) -> None:
    folds = [(2, 0), (2, 1), (3, 0), (3, 1)]
    prints = {fold_of(index, "train", number, fold).fingerprint for number, fold in folds}
    assert len(prints | {index.fingerprint}) == 5
    again = fold_of(index, "train", 2, 0).fingerprint
    assert again == fold_of(index, "train", 2, 0).fingerprint


def test_a_quarantined_sample_is_in_neither_part(index: Index) -> None:
    hidden = index.select("train")[[0, 1]].astype(np.int64)
    divided = fold_of(replace(index, quarantined=hidden), "train", 2, 0)
    both = np.concatenate([divided.select("train"), divided.select(VALIDATION)])
    assert not np.isin(both, hidden).any()
    assert len(both) == len(index.select("train")) - 2


@pytest.mark.parametrize(
    ("folds", "fold", "said"),
    [
        (1, 0, "data.folds=1"),
        (2, 2, "data.fold=2 is outside 0..1"),
        (2, -1, "data.fold=-1 is outside 0..1"),
        (6, 0, "has 5 training classes"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    index: Index, folds: int, fold: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        fold_of(index, "train", folds, fold)


def test_a_data_set_with_a_validation_split_or_a_mixture_is_refused(index: Index) -> None:
    named = replace(index, split_names=("seen", "test", VALIDATION))
    with pytest.raises(UsageError, match="has already"):
        fold_of(named, "train", 2, 0)
    mixed = replace(index, part=np.zeros(len(index), np.int8))
    with pytest.raises(UsageError, match="one data set"):
        fold_of(mixed, "train", 2, 0)


def test_the_configuration_opens_the_fold_and_plans_its_training_images(index: Index) -> None:
    data = DataConfig(path=str(index.folder), folds=2, fold=1, batch_size=4)
    opened = open_index(data)
    assert opened.fingerprint == fold_of(index, "train", 2, 1).fingerprint
    plan = open_plan(opened, data, 1, seed=0)
    drawn = np.concatenate([plan.global_batch(step) for step in range(plan.steps_per_epoch)])
    assert set(drawn.tolist()) == set(opened.select("train").tolist())
    opened.check_labels("train", opened.num_classes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"folds": 1}, "data.folds=1"),
        ({"fold": 1}, "data.fold=1"),
        ({"folds": 4, "fold": 4}, "give 0..3"),
        ({"folds": 2, "mixture": (MixturePart(path="other"),)}, "data.mixture"),
    ],
)
def test_the_configuration_refuses_folds_that_cannot_be(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(data=DataConfig(**values))


def test_the_divided_index_itself_is_not_changed(index: Index) -> None:
    before = (index.split.copy(), index.class_id.copy(), index.class_names)
    fold_of(index, "train", 2, 0)
    assert np.array_equal(before[0], index.split)
    assert np.array_equal(before[1], index.class_id)
    assert before[2] == index.class_names
