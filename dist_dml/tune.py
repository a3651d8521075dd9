"""ENTRY: search configurations; each trial is the same `train()` with overrides.

    dist-dml tune --search configs/search/glyphs.yaml --config configs/glyphs.yaml
    python -m dist_dml.tune --search S.yaml --config C.yaml[:VARIANT] section.key=value ...
    ray job submit --working-dir . -- python -m dist_dml.tune --search S.yaml --config C.yaml
    ray submit cluster/ray/NAME.yaml dist_dml/tune.py -- --search S.yaml --config C.yaml

A Ray cluster is used where RAY_ADDRESS or --address names one; else one is started on this machine
for as long as the search takes. Start the same command again to go on. See docs/tuning.md.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Run by path: this folder must not hide installed packages.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_dml.command_line import add_config_option, run_command
from dist_dml.config import Config
from dist_dml.config_loading import resolve, to_yaml
from dist_dml.errors import RunError, UsageError
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.protocol_launch import check_launcher, only_command
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.metrics import score_names
from dist_dml.tracking.parent_run import ParentRun, parent_run
from dist_dml.tracking.run_files import check_kind
from dist_dml.tuning.environment import check_shared, cluster_address, prepare_environment
from dist_dml.tuning.ledger import Ledger, TrialRecord
from dist_dml.tuning.results import study_facts, study_text, write_pictures
from dist_dml.tuning.sampler import Sampler
from dist_dml.tuning.space import SearchConfig, check_space, load_search, overrides_of
from dist_dml.whole_files import write_json, write_text

if TYPE_CHECKING:
    from dist_dml.tuning.cluster import Cluster
    from dist_dml.tuning.placement import Placement
    from dist_dml.tuning.trial import TrialPlan

_FIRST_CONFIRMING_SEED = 1001
"""Of seeds that no trial of the search has."""


@dataclass(frozen=True)
class Study:
    """A search and where it stands."""

    arguments: argparse.Namespace
    search: SearchConfig
    config: Config
    """Without the space's keys."""
    metric: str
    folder: Path
    ledger: Ledger
    sampler: Sampler
    parent: ParentRun


def tune(arguments: argparse.Namespace) -> None:
    """Search, confirm, write what was found; from where an earlier start has ended.

    Raises:
        UsageError: before any trial: a wrong space, a metric that is not measured, trials that fit
            nowhere, a folder of another search.
        RunError: no trial could be evaluated, or Ray does not answer.
    """
    address = cluster_address(arguments.address)
    prepare_environment(address)
    try:
        from dist_dml.tuning.cluster import connected
    except ImportError as error:
        raise UsageError(
            f"dist-dml tune needs {error.name}; pip install 'dist_dml[tune]'"
        ) from None

    check_launcher("tune")
    search = load_search(arguments.search)
    config = check_space(search, arguments.config, arguments.overrides)
    metric = search.metric or config.checkpoint.best_metric
    check_metrics(search, metric, config)
    check_shared(config.run.root, address)
    folder = Path(config.run.root) / config.run.name
    with (
        only_command(folder / "tune", "tune"),
        opened(arguments, search, metric, folder) as study,
        connected(address, search.trial.workers) as cluster,
    ):
        search_trials(study, cluster)
        confirm_best(study, cluster)


@contextmanager
def opened(
    arguments: argparse.Namespace, search: SearchConfig, metric: str, folder: Path
) -> Iterator[Study]:
    """The study in its folder; whatever happens inside, what is known is written at the end."""
    config = resolve(arguments.config, arguments.overrides).config
    check_kind(folder, "study")
    ledger = Ledger(folder, _digest(search, metric, config))
    ended = [one for one in ledger.of_kind("search") if one.state != "running"]
    sampler = Sampler(search, ended)
    with parent_run(folder, config, "study", metric=metric) as parent:
        study = Study(arguments, search, config, metric, folder, ledger, sampler, parent)
        try:
            yield study
        finally:
            print(write_results(study))


def search_trials(study: Study, cluster: Cluster) -> None:
    """The trials that the budget leaves.

    Raises:
        RunError: none of all trials has a value.
    """
    from dist_dml.tuning.cluster import run_trials
    from dist_dml.tuning.source import TrialSource

    search, ledger = study.search, study.ledger
    waiting = [one for one in ledger.of_kind("search") if one.state == "running"]
    source = TrialSource(ledger, study.sampler, waiting, search.budget)
    placement, plan = placed(study, cluster)
    if source.remaining:
        _say(
            f"{study.folder}: {len(ledger.of_kind('search')) - len(waiting)} trials done before, "
            f"{source.remaining} to run, {placement.concurrent} at a time"
        )
        run_trials(plan, placement, search.stop, source, ledger, study.sampler, _recording(study))
    if ledger.best() is None:
        reasons = sorted({one.reason for one in ledger.of_kind("search") if one.reason})
        raise RunError(
            f"none of {len(ledger.of_kind('search'))} trials could be evaluated: "
            f"{'; '.join(reasons[:3]) or 'they have not ended'}; look into {study.folder}"
        )


def confirm_best(study: Study, cluster: Cluster) -> None:
    """Train the best and the unchanged configuration with further seeds, seed by seed."""
    from dist_dml.tuning.cluster import run_trials
    from dist_dml.tuning.source import TrialSource, confirmation

    search, ledger = study.search, study.ledger
    seeds = range(_FIRST_CONFIRMING_SEED, _FIRST_CONFIRMING_SEED + search.confirm.seeds)
    waiting = confirmation(("default", "best"), ledger, seeds)
    if not waiting:
        return
    best = ledger.best()
    assert best is not None
    _say(f"the best ({best.name}) and the default are trained with {len(seeds)} further seeds")
    source = TrialSource(ledger, None, waiting, search.budget)
    placement, plan = placed(study, cluster)
    run_trials(plan, placement, search.stop, source, ledger, None, _recording(study))


def placed(study: Study, cluster: Cluster) -> tuple[Placement, TrialPlan]:
    """What a trial takes of the cluster, and what all have in common.

    Raises:
        UsageError: a trial fits nowhere.
    """
    from dist_dml.tuning.placement import place
    from dist_dml.tuning.trial import TrialPlan

    search, arguments = study.search, study.arguments
    placement = place(search.trial, cluster.nodes, search.cluster)
    plan = TrialPlan(
        config_files=tuple(arguments.config),
        overrides=tuple(arguments.overrides),
        study=study.config.run.name,
        parent=study.parent.run_id,
        folder=str(Path.cwd()),
        metric=study.metric,
        test_metric=search.confirm.metric,
        workers=search.trial.workers,
        worker=placement.worker,
        tags=dict(study.config.tracking.tags),
        storage=str((study.folder / "tune" / "ray").resolve()),
        threads=0 if study.config.engine.threads else max(1, int(search.trial.cpus)),
        searching=without_confirming_images(search, study.metric, study.config),
    )
    return placement, plan


def without_confirming_images(search: SearchConfig, metric: str, config: Config) -> tuple[str, ...]:
    """Overrides that keep the images of `confirm.metric` out of the search.

    Nothing is to be chosen by them, and nobody pays for evaluations that nothing looks at.
    """
    if not search.confirm.seeds:
        return ()
    protocols = config.evaluation.protocols
    held_out = _split(search.confirm.metric, protocols)
    needed = {name.split("/")[0] for name in (metric, config.checkpoint.best_metric)}
    kept = [one for one in protocols if one.query != held_out or one.name in needed]
    return (f"evaluation.protocols={json.dumps([one.model_dump() for one in kept])}",)


def write_results(study: Study) -> str:
    """Write study.json, table.txt, best.yaml and the pictures. Returns the table."""
    search, ledger, folder = study.search, study.ledger, study.folder
    importances = study.sampler.importances()
    write_json(folder / "study.json", study_facts(search, study.metric, ledger, importances))
    text = study_text(search, study.metric, ledger, importances)
    best = ledger.best()
    if best is not None:
        arguments = study.arguments
        name = f"run.name={json.dumps(study.config.run.name + '-best')}"
        words = [*arguments.overrides, *overrides_of(best.chosen), name]
        chosen = resolve(arguments.config, words).config
        head = f"# The best of {len(ledger.of_kind('search'))} trials ({best.name}): "
        head += f"{study.metric} {best.best:.4f}\n# dist-dml train --config {folder}/best.yaml\n"
        write_text(folder / "best.yaml", head + to_yaml(chosen))
        text += f"\n\nbest:   dist-dml train --config {folder / 'best.yaml'}"
    write_text(folder / "table.txt", text + "\n")
    study.parent.describe(f"```\n{text}\n```")
    for path in write_pictures(folder, search, study.metric, ledger, importances):
        study.parent.recorder.note_figure(path)
    for name in ("study.json", "table.txt", "best.yaml"):
        if (folder / name).is_file():
            study.parent.recorder.note_artifact(folder / name, "study")
    return f"{text}\nstudy:  {folder}/ (ledger.jsonl, study.json, pictures)"


def check_metrics(search: SearchConfig, metric: str, config: Config) -> None:
    """Whether every evaluation measures what the search looks at.

    Raises:
        UsageError: names what is measured.
    """
    evaluation = config.evaluation
    measured = [
        f"{protocol.name}/{named_distance(distance).name}/{score}"
        for protocol in evaluation.protocols
        for distance in evaluation.distances
        for score in score_names(evaluation.recall_at)
    ]
    for key, name in (("metric", metric), ("confirm.metric", search.confirm.metric)):
        if name and name not in measured:
            raise UsageError(f"{key}={name!r} is not measured; name one of {', '.join(measured)}")
    if search.confirm.seeds and _split(metric, evaluation.protocols) == _split(
        search.confirm.metric, evaluation.protocols
    ):
        raise UsageError(
            f"confirm.metric={search.confirm.metric!r} looks at the images by which the search has "
            f"chosen ({metric}); name a protocol whose queries it has not seen"
        )


def _split(metric: str, protocols: Sequence[ProtocolConfig]) -> str:
    name = metric.split("/")[0]
    return next(one.query for one in protocols if one.name == name)


def _digest(search: SearchConfig, metric: str, config: Config) -> str:
    """Of what must stay as it is while a search goes on: not its budget, nor where it runs."""
    content = {
        "search": search.model_dump(include={"space", "sampler", "seed", "start", "stop"}),
        "metric": metric,
        "config": config.model_dump(exclude={"engine", "tracking"}),
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recording(study: Study) -> Callable[[TrialRecord], None]:
    """Notes each ended trial's value among the study's own metrics: its curve in MLflow."""

    def record(trial: TrialRecord) -> None:
        ended = [one for one in study.ledger.trials.values() if one.state != "running"]
        values = {"tune/trials_ended": float(len(ended))}
        if trial.kind == "search" and trial.best is not None:
            values["tune/value"] = trial.best
        if trial.test is not None:
            values[f"tune/test_{trial.kind}"] = trial.test
        best = study.ledger.best()
        if best is not None and best.best is not None:
            values["tune/best"] = best.best
        seconds = sum(one.seconds for one in ended)
        images = sum(int(one.reports[-1]["images_seen"]) for one in ended if one.reports)
        study.parent.recorder.record(len(ended), images, seconds, values)

    return record


def _say(text: str) -> None:
    print(f"tune: {text}", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--search", required=True, metavar="FILE", help="space and budget, YAML")
    add_config_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--address",
        default="",
        metavar="RAY",
        help="cluster to join, for example auto; without, RAY_ADDRESS, or a Ray of its own",
    )


def run(arguments: argparse.Namespace) -> int:
    """Search. Returns the exit code."""
    tune(arguments)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.tune ...`, and by path, as `ray submit` runs it."""
    return run_command(
        "dist_dml.tune", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.tune import main as only_main  # one copy of the module

    sys.exit(only_main())
