"""Methods that are compared, the trials of each, and which trial is chosen.

A method is a variant of one configuration file. Each is tried with the same settings on the first
fold; the trial with the best validation MAP@R is run on all folds. A trial *is* the method's first
fold under these settings, so that nothing is trained twice.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dist_dml.checkpoint_manifest import newest_checkpoint
from dist_dml.config_loading import resolve, variant_names
from dist_dml.errors import UsageError
from dist_dml.protocol_folds import Fold, plan_folds
from dist_dml.tracking.run_files import last_status


@dataclass(frozen=True)
class Trial:
    """One method under one setting.

    Attributes:
        method: the variant's name.
        name: below `runs/NAME/`: `METHOD/trial-1`.
        words: the setting, as `section.key=value`.
        folds: of all repeats; the first is what the trial is judged by.
    """

    method: str
    name: str
    words: tuple[str, ...]
    folds: tuple[Fold, ...]

    @property
    def setting(self) -> str:
        """The words as the command line has them."""
        return " ".join(self.words)

    def validation_score(self) -> float | None:
        """The best validation MAP@R of the first fold, 0..1; None until it is trained."""
        return best_score(self.folds[0])


def best_score(fold: Fold) -> float | None:
    """The best validation MAP@R of a fold that is trained to its end; None of others."""
    if last_status(fold.folder).get("status") != "FINISHED":
        return None
    newest = newest_checkpoint(fold.folder / "checkpoints")
    return newest[1].progress.best_score if newest is not None else None


def chosen_trial(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best validation score, the earlier of equal ones; None if none has one."""
    if len(trials) == 1:
        return trials[0]
    scored = [(score, trial) for trial in trials if (score := trial.validation_score()) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def method_names(path: str, wanted: Sequence[str]) -> list[str]:
    """The variants of a file that are to be compared.

    Raises:
        UsageError: it has none, or not the wanted ones.
    """
    known = variant_names(path)
    if not known:
        raise UsageError(
            f"{path} has no variants: each method that is compared is one; see configs/glyphs.yaml"
        )
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--method {name}: {hint}{path} has {', '.join(known)}")
    return list(dict.fromkeys(wanted)) or known


def plan_trials(
    path: str,
    methods: Sequence[str],
    settings: Sequence[str],
    overrides: Sequence[str],
    folds: int,
    repeats: int,
    threads: int,
) -> dict[str, list[Trial]]:
    """Every trial of every method; every one is a valid configuration.

    Args:
        path: of the YAML file with the methods as variants.
        methods: names of variants.
        settings: of the trials, each `section.key=value ...`; none is one trial as configured.
        overrides: of the command line, for all; a trial's words stand behind them.
        folds: 2 or more.
        repeats: seeds of each fold.
        threads: CPU threads of each worker, unless `engine.threads` is set.

    Raises:
        UsageError: for what `resolve` refuses, with the method and the trial.
    """
    planned: dict[str, list[Trial]] = {}
    for method in methods:
        file = f"{path}:{method}"
        planned[method] = []
        for number, setting in enumerate(settings or [""]):
            words = tuple(shlex.split(setting))
            name = f"{method}/trial-{number}"
            try:
                root = resolve(file, [*overrides, *words]).config.run.name
                named = f"run.name={json.dumps(f'{root}/{name}')}"
                every = plan_folds(file, [*overrides, *words, named], folds, repeats, threads)
            except UsageError as error:
                tried = f", --trial {setting!r}" if setting else ""
                raise UsageError(f"{method}{tried}: {error}") from None
            planned[method].append(Trial(method, name, words, tuple(every)))
    return planned
