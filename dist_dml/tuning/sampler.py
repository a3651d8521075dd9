"""Optuna proposes settings, from what the ledger says of earlier trials.

A proposal follows from the search's seed, the trial's number and the trials that have ended: a
search that was interrupted goes on as one that was not, where trials run one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_dml.keyed_random import key_of
from dist_dml.tuning.ledger import TrialRecord
from dist_dml.tuning.space import Distribution, SearchConfig, Value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_STARTUP_TRIALS = 8
"""Independent draws before TPE or the Gaussian process has something to learn from."""


class Sampler:
    """Proposes, and is told. Costs milliseconds a trial; the Gaussian process some seconds."""

    def __init__(self, search: SearchConfig, ended: Sequence[TrialRecord]) -> None:
        """Args:
        search: the space and the sampler's name.
        ended: trials that the study knows already, in their order.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = search
        self._study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self._running: dict[str, optuna.Trial] = {}
        for record in ended:
            self._study.add_trial(self._frozen(record))

    def propose(self, name: str, number: int) -> dict[str, Value]:
        """The setting of a new trial.

        Args:
            name: of the trial, for `tell`.
            number: of the trial, from 0: the first ones are the search's `start`.
        """
        if number < len(self._search.start):
            self._study.enqueue_trial(self._encoded(dict(self._search.start[number])))
        return self._ask(name, number)

    def resume(self, name: str, number: int, chosen: dict[str, Value]) -> None:
        """A trial that was proposed before this process began."""
        self._study.enqueue_trial(self._encoded(chosen))
        self._ask(name, number)

    def tell(self, record: TrialRecord) -> None:
        """A trial has ended."""
        import optuna

        trial = self._running.pop(record.name)
        frozen = self._frozen(record)
        for share, value in frozen.intermediate_values.items():
            trial.report(value, share)
        value = frozen.value if frozen.state == optuna.trial.TrialState.COMPLETE else None
        self._study.tell(trial, value, state=frozen.state)

    def importances(self) -> dict[str, float]:
        """How much of the spread of values each key explains, largest first; of ended trials.

        fANOVA (Hutter et al., ICML 2014), over the keys that all trials have. Empty where there are
        fewer than 4 trials, or no spread.
        """
        import optuna

        done = [t for t in self._study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        if len(done) < 4 or len({t.value for t in done}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._search.seed)
        try:
            return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))
        except (ValueError, RuntimeError, ZeroDivisionError):
            return {}

    def _ask(self, name: str, number: int) -> dict[str, Value]:
        # Each proposal draws from a generator of its own, so that it does not matter how many
        # were drawn since this process began.
        self._study.sampler = self._sampler(number)
        trial = self._study.ask()
        self._running[name] = trial
        chosen: dict[str, Value] = {}
        for key, distribution in self._search.space.items():
            if self._search.active(key, chosen):
                chosen[key] = self._decoded(key, _suggest(trial, key, distribution))
        return chosen

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        seed = key_of(self._search.seed, "tuning", number) % 2**32
        if self._search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            # Options that Optuna calls experimental; they are what many workers and conditional
            # keys need.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._search.sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=_STARTUP_TRIALS,
                multivariate=True,
                group=True,
                # A trial that runs is taken for a bad one, so that others do not propose it again.
                constant_liar=True,
            )

    def _frozen(self, record: TrialRecord) -> FrozenTrial:
        """The record as Optuna knows a trial that has ended."""
        import optuna

        states = optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}
        params, distributions = self._encoded(record.chosen), {}
        for key in params:
            distributions[key] = _distribution(self._search.space[key])
        best, curve = -np.inf, {}
        for report in record.reports:  # What a trial is worth so far is its best so far.
            best = max(best, report["value"])
            curve[round(100 * report["share"])] = best
        kind = state[record.state]
        if kind == states.COMPLETE and record.best is None:
            kind = states.FAIL
        return optuna.trial.create_trial(
            state=kind,
            value=record.best if kind == states.COMPLETE else None,
            params=params,
            distributions=distributions,
            intermediate_values=curve,
        )

    def _encoded(self, chosen: dict[str, Value]) -> dict[str, Any]:
        """Choices by their number: Optuna takes no lists or mappings."""
        coded: dict[str, Any] = {}
        for key, value in chosen.items():
            choices = self._search.space[key].choice
            coded[key] = value if choices is None else choices.index(value)
        return coded

    def _decoded(self, key: str, value: Any) -> Value:
        choices = self._search.space[key].choice
        return value if choices is None else choices[value]


def _suggest(trial: optuna.Trial, key: str, distribution: Distribution) -> Any:
    return trial._suggest(key, _distribution(distribution))


def _distribution(distribution: Distribution) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if distribution.choice is not None:
        return CategoricalDistribution(tuple(range(len(distribution.choice))))
    if distribution.integer is not None:
        return IntDistribution(*distribution.integer, step=int(distribution.step or 1))
    if distribution.log_integer is not None:
        return IntDistribution(*distribution.log_integer, log=True)
    if distribution.log_uniform is not None:
        return FloatDistribution(*distribution.log_uniform, log=True)
    assert distribution.uniform is not None
    return FloatDistribution(*distribution.uniform, step=distribution.step)
