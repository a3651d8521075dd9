"""The folds of a fair protocol as runs: where each lies, its configuration, what it has done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.config import Config
from dist_dml.config_loading import differences, resolve
from dist_dml.data.folds import VALIDATION, fold_of
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index
from dist_dml.errors import UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.measurement import check_evaluation
from dist_dml.retrieval.distances import named_distance
from dist_dml.tracking.run_files import CONFIG, read_json

TEST_FILE = "test.json"
"""Of a fold's folder: its one look at the test split. It is there once the fold is done."""
# What a fold may be continued with: where it runs and what is written down, not what is computed.
_FREE = ("run.name", "run.root", "run.resume", "engine.threads", "engine.timeout_seconds")
_FREE_SECTIONS = ("tracking.", "data.storage.")
_SHOWN = 4


@dataclass(frozen=True)
class Fold:
    """One training of the protocol.

    Attributes:
        repeat: 0 for `run.seed`, 1 for the seed after it, ...
        number: the fold, 0..folds-1.
        name: below `runs/NAME/`: `fold-1`, of later repeats `repeat-2/fold-1`.
        overrides: the command line's and then the fold's own, as `section.key=value`.
        config: what comes of them.
    """

    repeat: int
    number: int
    name: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.root) / self.config.run.name


def plan_folds(
    path: str, overrides: Sequence[str], folds: int, repeats: int, threads: int
) -> list[Fold]:
    """Every fold of every repeat, one repeat after the other.

    A fold is the run of `dist-dml train --config PATH OVERRIDES` with these keys of its own: name,
    seed (plus the repeat's number) and fold; `run.resume=auto`; validation as its only measurement,
    whose MAP@R selects the best checkpoint. No fold measures the test split.

    Args:
        path: of the YAML file.
        overrides: of the command line.
        folds: 2 or more.
        repeats: trainings of each fold, each with a seed of its own.
        threads: CPU threads of each worker, unless `engine.threads` is set.

    Raises:
        UsageError: for what `resolve` refuses.
    """
    config = resolve(path, overrides).config
    distance = measured_distance(config)
    own = [
        "run.resume=auto",
        f"data.folds={folds}",
        "data.num_classes=0",
        f"evaluation.protocols={json.dumps([{'name': VALIDATION, 'query': VALIDATION}])}",
        f"evaluation.distances={json.dumps([distance])}",
        "evaluation.certificates=[]",
        "evaluation.nmi=false",
        f"checkpoint.best_metric={VALIDATION}/{distance}/map_at_r",
        f"engine.threads={config.engine.threads or threads}",
    ]
    planned = []
    for repeat in range(repeats):
        for number in range(folds):
            name = f"repeat-{repeat}/fold-{number}" if repeat else f"fold-{number}"
            every = (
                *overrides,
                *own,
                f"run.name={json.dumps(f'{config.run.name}/{name}')}",
                f"run.seed={config.run.seed + repeat}",
                f"data.fold={number}",
            )
            planned.append(Fold(repeat, number, name, every, resolve(path, every).config))
    return planned


def measured_distance(config: Config) -> str:
    """By what the folds rank: cosine if it is configured, else the first distance of embeddings.

    Distances of class probabilities are for closed sets: no fold knows the test classes.
    """
    texts = config.evaluation.distances
    named = [text for text in texts if named_distance(text).space == "embedding"]
    return "cosine" if "cosine" in named or not named else named[0]


def held_out_protocol(config: Config) -> ProtocolConfig:
    """The configured measurement that is made once, of each fold's best checkpoint.

    It is the first whose splits are neither trained on nor validated on.

    Raises:
        UsageError: there is none.
    """
    known = {config.data.split, VALIDATION}
    for protocol in config.evaluation.protocols:
        if not known & {protocol.query, protocol.gallery}:
            return protocol
    names = [protocol.name for protocol in config.evaluation.protocols]
    raise UsageError(
        f"evaluation.protocols={names} measures no split apart from {sorted(known)}; add the test "
        "split, for example [{name: unseen, query: test}]"
    )


def check_data(fold: Fold, protocol: ProtocolConfig) -> Index:
    """The index of the whole data set, after a look whether its folds and its test make sense.

    Raises:
        UsageError: the data cannot be divided, a split is missing, or the test split has classes
            that are trained on.
    """
    data = fold.config.data
    index = open_index(data.model_copy(update={"folds": 0, "fold": 0}))
    divided = fold_of(index, data.split, data.folds, 0)
    check_evaluation(divided, fold.config, divided.num_classes, 1)
    for split in filter(None, (protocol.query, protocol.gallery)):
        shared = index.class_id[index.select(split)] < index.num_classes
        if shared.any():
            first = int(index.class_id[index.select(split)][np.argmax(shared)])
            raise UsageError(
                f"evaluation.protocols: {int(shared.sum())} images of split {split!r} are of "
                f"training classes (the first: {index.class_names[first]}); the protocol tests on "
                "classes that no fold has seen: put a measurement of such a split first"
            )
    return index


def check_unchanged(fold: Fold) -> None:
    """Refuse to go on with a fold under another configuration than it was begun with.

    Raises:
        UsageError: with the keys that differ.
    """
    path = fold.folder / CONFIG
    if not path.exists():
        return
    changed = [
        f"{key} {before!r} -> {now!r}"
        for key, before, now in differences(resolve(path, []).config, fold.config)
        if key not in _FREE and not key.startswith(_FREE_SECTIONS)
    ]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UsageError(
            f"{fold.folder} was begun with other settings ({'; '.join(changed[:_SHOWN])}{more}); "
            "go on with its own, or choose another run.name"
        )


def finished_test(fold: Fold, protocol: ProtocolConfig) -> dict[str, Any] | None:
    """What `test.json` says of a fold that is done; None if it is not.

    Raises:
        UsageError: the fold was tested on other splits.
    """
    found = read_json(fold.folder / TEST_FILE)
    if not found:
        return None
    asked = {"query": protocol.query, "gallery": protocol.gallery}
    if found["protocol"] != asked:
        raise UsageError(
            f"{fold.folder} was tested on {found['protocol']} and evaluation.protocols asks for "
            f"{asked}; the test is made once: go on with its own, or choose another run.name"
        )
    stored = (fold.folder / name for name in found["embeddings"].values())
    return found if all(path.exists() for path in stored) else None
