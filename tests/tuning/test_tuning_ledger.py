"""The ledger and the sampler: what is known outlives the driver, and nothing is proposed twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_dml.errors import UsageError
from dist_dml.tuning.ledger import FILE, Ledger, TrialRecord
from dist_dml.tuning.results import confirmed, study_facts, study_text, write_pictures
from dist_dml.tuning.sampler import Sampler
from dist_dml.tuning.source import TrialSource, confirmation
from dist_dml.tuning.space import SearchConfig

SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "loss.name": {"choice": ["cross_entropy", "arcface"]},
    "loss.angle_margin": {"uniform": [0.1, 0.6], "when": {"loss.name": ["arcface"]}},
    "optimizer.betas": {"choice": [[0.9, 0.99], [0.8, 0.9]]},
    "data.batch_size": {"integer": [32, 64], "step": 16},
}


def search_of(sampler: str = "tpe", trials: int = 12, **more) -> SearchConfig:
    content = {"space": SPACE, "sampler": sampler, "budget": {"trials": trials}, "seed": 7}
    return SearchConfig.model_validate(content | more)


def value_of(chosen) -> float:
    """A trial that takes no time: best at a rate of 1e-2 with ArcFace."""
    import math

    gap = abs(math.log10(chosen["optimizer.learning_rate"]) + 2)
    return 0.9 - 0.2 * gap + 0.05 * (chosen["loss.name"] == "arcface")


def run_one(source: TrialSource, ledger: Ledger, sampler: Sampler | None, share: float = 1.0):
    """What Ray Tune does with one trial, without Ray."""
    asked = source.suggest("any")
    if not isinstance(asked, dict):
        return None
    record = ledger.trials[asked["trial"]]
    value = value_of(record.chosen)
    report = {"value": value, "share": share, "step": 10, "images_seen": 640, "seconds": 1.0}
    ledger.report(record.name, report)
    ledger.end(record.name, "complete" if share == 1 else "stopped")
    if sampler is not None:
        sampler.tell(record)
    return record


def open_all(folder: Path, search: SearchConfig):
    ledger = Ledger(folder, "digest")
    ended = [one for one in ledger.of_kind("search") if one.state != "running"]
    waiting = [one for one in ledger.of_kind("search") if one.state == "running"]
    sampler = Sampler(search, ended)
    return ledger, sampler, TrialSource(ledger, sampler, waiting, search.budget)


@pytest.mark.parametrize("kind", ["tpe", "random", "gp"])
def test_a_search_that_was_killed_goes_on_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    search = search_of(kind)
    ledger, sampler, source = open_all(tmp_path / "whole", search)
    while run_one(source, ledger, sampler):
        pass
    whole = [record.chosen for record in ledger.trials.values()]
    assert len(whole) == 12
    assert len({json.dumps(chosen, sort_keys=True) for chosen in whole}) == 12

    for part in (3, 5, 20):  # Each start ends after so many trials, and one more that had begun.
        ledger, sampler, source = open_all(tmp_path / "parts", search)
        for _ in range(part):
            if run_one(source, ledger, sampler) is None:
                break
        source.suggest("interrupted")
    ledger, sampler, source = open_all(tmp_path / "parts", search)
    assert source.remaining == 0
    assert [record.chosen for record in ledger.trials.values()] == whole
    lines = (tmp_path / "parts" / FILE).read_text().splitlines()
    begun = [json.loads(line)["trial"] for line in lines if '"begin"' in line]
    assert begun == [f"trial-{i:03d}" for i in range(12)]


def test_conditional_keys_are_proposed_only_where_they_are_active(tmp_path: Path) -> None:
    ledger, sampler, source = open_all(tmp_path, search_of(trials=20))
    while record := run_one(source, ledger, sampler):
        has_margin = "loss.angle_margin" in record.chosen
        assert has_margin == (record.chosen["loss.name"] == "arcface")
        assert record.chosen["data.batch_size"] in (32, 48, 64)
        assert record.chosen["optimizer.betas"] in ([0.9, 0.99], [0.8, 0.9])


def test_tpe_finds_more_than_its_first_draws(tmp_path: Path) -> None:
    ledger, sampler, source = open_all(tmp_path, search_of(trials=40))
    while run_one(source, ledger, sampler):
        pass
    values = [record.best or 0.0 for record in ledger.trials.values()]
    assert sum(values[-8:]) > sum(values[:8])
    assert set(sampler.importances()) <= set(SPACE)
    assert max(sampler.importances(), key=sampler.importances().__getitem__) == (
        "optimizer.learning_rate"
    )


def test_given_settings_come_first_and_are_completed(tmp_path: Path) -> None:
    start = [{"optimizer.learning_rate": 0.02}, {"loss.name": "arcface", "loss.angle_margin": 0.5}]
    ledger, sampler, source = open_all(tmp_path, search_of(start=start))
    first, second = (run_one(source, ledger, sampler) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.chosen["optimizer.learning_rate"] == 0.02
    assert set(first.chosen) >= {"loss.name", "optimizer.betas", "data.batch_size"}
    assert (second.chosen["loss.name"], second.chosen["loss.angle_margin"]) == ("arcface", 0.5)


def test_another_search_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path, "one")
    with pytest.raises(UsageError, match="is of another search"):
        Ledger(tmp_path, "two")


def test_a_torn_last_line_and_a_repeated_step_do_no_harm(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "one")
    ledger.begin(TrialRecord("trial-000", "search", {"loss.name": "arcface"}))
    report = {"value": 0.5, "share": 0.5, "step": 10, "images_seen": 640, "seconds": 1.0}
    ledger.report("trial-000", report)
    ledger.report("trial-000", report | {"value": 0.4})
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"event": "end", "trial": "trial-0')
    ledger = Ledger(tmp_path, "one")
    assert ledger.trials["trial-000"].state == "running"
    assert [one["value"] for one in ledger.trials["trial-000"].reports] == [0.5]
    ledger.end("trial-000", "complete")
    assert Ledger(tmp_path, "one").trials["trial-000"].state == "complete"


def test_failed_and_stopped_trials_are_told_apart_and_pictures_are_drawn(tmp_path: Path) -> None:
    search = search_of(trials=5, confirm={"seeds": 2, "metric": "unseen/cosine/map_at_r"})
    ledger, sampler, source = open_all(tmp_path, search)
    for share in (1.0, 0.25, 1.0, 1.0):
        run_one(source, ledger, sampler, share)
    asked = source.suggest("fails")
    assert isinstance(asked, dict)
    ledger.end(asked["trial"], "failed", "not enough memory")
    sampler.tell(ledger.trials[asked["trial"]])
    best = ledger.best()
    assert best is not None
    for number, record in enumerate(confirmation(("default", "best"), ledger, (1001, 1002))):
        ledger.begin(record)
        better = 0.1 * (record.kind == "best")
        ledger.end(record.name, "complete", test=0.3 + 0.01 * number + better)
    assert not confirmation(("default", "best"), ledger, (1001, 1002))
    sure = confirmed(ledger)
    assert sure is not None
    # Pairs of one seed: 0.11 each, as the best comes second.
    assert sure.difference == pytest.approx(0.11)
    assert sure.interval == pytest.approx((0.11, 0.11))
    text = study_text(search, "validation/cosine/map_at_r", ledger, sampler.importances())
    assert f"{asked['trial']} failed: not enough memory" in text
    assert "difference +0.1100 (95% interval" in text
    facts = study_facts(search, "m", ledger, sampler.importances())
    assert [one["state"] for one in facts["trials"]][:5] == [
        *("complete", "stopped", "complete", "complete", "failed")
    ]
    assert facts["best"] == best.name
    for path in write_pictures(tmp_path, search, "m", ledger, sampler.importances()):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_interval_is_students_t_over_the_pairs() -> None:
    from scipy import stats

    from dist_dml.tuning.results import Confirmed

    sure = Confirmed((0.5, 0.53, 0.49), (0.45, 0.47, 0.46))
    expected = stats.ttest_rel(sure.best, sure.default).confidence_interval(0.95)
    assert sure.interval == pytest.approx((expected.low, expected.high))
