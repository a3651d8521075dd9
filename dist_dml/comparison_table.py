"""The result of a comparison of methods: as JSON with every number, and as tables to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_dml.comparison_plan import Trial
from dist_dml.protocol_scores import SCORES
from dist_dml.protocol_table import HEADINGS, duration, markdown, percent
from dist_dml.tracking.recorder import read_metrics
from dist_dml.tracking.run_files import CONFIG, IDENTITY, read_json

_TOLD = ("precision_at_1", "map_at_r")


def build_comparison(
    planned: Mapping[str, Sequence[Trial]],
    chosen: Mapping[str, Trial | None],
    reports: Mapping[str, Mapping[str, Any]],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """Everything the tables and the picture are made of, JSON-able; scores as shares, 0..1.

    Args:
        planned: every trial of every method.
        chosen: of each method.
        reports: each method's `protocol.json`, of those that are done.
        failures: what failed, by the run's name.
    """
    first = next(iter(planned.values()))[0].folds[0].config
    report = next(iter(reports.values()))
    methods = []
    for method, trials in planned.items():
        best = chosen[method]
        if best is None or method not in reports:
            continue
        own = reports[method]
        over = own["over_runs"]
        methods.append(
            {
                "method": method,
                "loss": own["loss"],
                "trial": best.name,
                "setting": best.setting,
                "scores": {name: over[name] for name in SCORES},
                "concatenated": {
                    name: spread["mean"]
                    for name, spread in own["over_repeats"]["concatenated"].items()
                },
                "validation_map_at_r": over["validation_map_at_r"],
                "best_seconds": over["best_seconds"],
                "best_images_seen": over["best_images_seen"],
                "total_images_seen": _mean([run["total_images_seen"] for run in own["runs"]]),
                "peak_mebibytes": max(run["peak_mebibytes"] or 0.0 for run in own["runs"]),
                "trials": [
                    {
                        "trial": trial.name,
                        "setting": trial.setting,
                        "validation_map_at_r": trial.validation_score(),
                        "failed": failures.get(f"{trial.name}/{trial.folds[0].name}", ""),
                    }
                    for trial in trials
                ],
                "runs": [
                    {
                        **run,
                        "identity": read_json(Path(run["run"]) / IDENTITY),
                        "validation": _validation_curve(
                            Path(run["run"]), first.checkpoint.best_metric
                        ),
                    }
                    for run in own["runs"]
                ],
            }
        )
    return {
        "name": str(Path(first.run.name).parents[2]),
        "data": first.data.path,
        "folds": first.data.folds,
        "max_seconds": first.training.max_seconds,
        "threads": first.engine.threads,
        "workers": report["runs"][0]["workers"],
        "embedding_dim": report["embedding_dim"],
        "protocol": report["protocol"],
        "distance": report["distance"],
        "num_trials": len(next(iter(planned.values()))),
        "methods": methods,
        "failures": dict(failures),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _validation_curve(run: Path, metric: str) -> dict[str, list[float]]:
    """Validation MAP@R over seconds of training."""
    curve = read_metrics(run).get(metric)
    if curve is None:
        return {"seconds": [], "map_at_r": []}
    return {
        "seconds": [float(value) for value in curve.seconds],
        "map_at_r": [float(value) for value in curve.value],
    }


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """The tables as Markdown; scores in percent, as the papers print them."""
    parts = [_title(comparison), _main_table(comparison)]
    if comparison["num_trials"] > 1:
        parts += ["## Trials", _trial_table(comparison)]
    parts += ["## Runs", _run_table(comparison)]
    if comparison["failures"]:
        parts.append(
            "Failed:\n\n" + "\n".join(f"- {why}" for why in comparison["failures"].values())
        )
    return "\n\n".join(parts) + "\n"


def _title(comparison: Mapping[str, Any]) -> str:
    protocol = comparison["protocol"]
    searched = f"gallery {protocol['gallery']}" if protocol["gallery"] else "each without itself"
    limit = comparison["max_seconds"]
    budget = f"{limit:g} s of training a fold on " if limit else ""
    trials = comparison["num_trials"]
    tried = (
        f"best of {trials} trials of each method by the first fold's validation MAP@R; "
        if trials > 1
        else ""
    )
    width = comparison["embedding_dim"]
    return (
        f"# {comparison['name']}: {len(comparison['methods'])} methods on {comparison['data']}\n\n"
        f"{budget}{comparison['workers']} worker(s) of {comparison['threads']} thread(s); {tried}"
        f"{comparison['folds']} class-disjoint folds, best checkpoint of each by validation MAP@R, "
        f"tested once: queries {protocol['query']}, {searched}, {comparison['distance']}. Percent, "
        f"mean ± standard deviation of the folds' {width}-D embeddings; the last two columns are "
        f"of the concatenation ({width * comparison['folds']}-D). Time and images are those until "
        "the best checkpoint, memory the most that a worker has held."
    )


def _main_table(comparison: Mapping[str, Any]) -> str:
    headings = ["method", "P@1", "MAP@R", "validation MAP@R", "time to best", "images seen"]
    headings += ["peak MiB", "P@1 (concat.)", "MAP@R (concat.)"]
    ranked = sorted(comparison["methods"], key=lambda one: -one["scores"]["map_at_r"]["mean"])
    rows = []
    for one in ranked:
        seconds, images = one["best_seconds"], one["best_images_seen"]
        rows.append(
            [
                one["method"],
                *(_spread(one["scores"][name]) for name in _TOLD),
                _spread(one["validation_map_at_r"]),
                _around(duration(seconds["mean"]), f"{seconds['deviation']:.0f}"),
                _around(f"{images['mean']:,.0f}", f"{images['deviation']:,.0f}"),
                f"{one['peak_mebibytes']:,.0f}",
                *(percent(one["concatenated"][name]) for name in _TOLD),
            ]
        )
    return markdown(headings, rows)


def _spread(spread: Mapping[str, float | None]) -> str:
    return _around(percent(spread["mean"]), percent(spread["deviation"]))


def _around(mean: str, deviation: str) -> str:
    return f"{mean} ± {deviation}"


def _trial_table(comparison: Mapping[str, Any]) -> str:
    settings = [trial["setting"] for trial in comparison["methods"][0]["trials"]]
    headings = ["method", *(f"`{setting}`" for setting in settings), "chosen"]
    rows = []
    for one in comparison["methods"]:
        scores = [
            "failed" if trial["failed"] else percent(trial["validation_map_at_r"])
            for trial in one["trials"]
        ]
        rows.append([one["method"], *scores, Path(one["trial"]).name])
    said = "Validation MAP@R of the first fold, whose run is that fold's of the chosen trial."
    return f"{said}\n\n{markdown(headings, rows)}"


def _run_table(comparison: Mapping[str, Any]) -> str:
    headings = ["run", "seed", "config", "best step", "time to best", "images seen", "all images"]
    headings += ["peak MiB", "validation MAP@R", *HEADINGS.values()]
    rows = []
    root = comparison["name"]
    for one in comparison["methods"]:
        for run in one["runs"]:
            peak = run["peak_mebibytes"]
            rows.append(
                [
                    f"{one['trial']}/fold-{run['fold']}",
                    str(run["seed"]),
                    run["config_hash"][:8],
                    f"{run['best_step']} of {run['total_steps']}",
                    duration(run["best_seconds"]),
                    f"{run['best_images_seen']:,}",
                    f"{run['total_images_seen']:,}",
                    f"{peak:,.0f}" if peak is not None else "-",
                    percent(run["validation_map_at_r"]),
                    *(percent(run["scores"][score]) for score in SCORES),
                ]
            )
    commits = {
        run["identity"].get("git_commit", "") for m in comparison["methods"] for run in m["runs"]
    }
    made = ", ".join(sorted(commit[:12] for commit in commits if commit))
    said = f"Folders below `{root}/`, each with `{CONFIG}`, `metrics.jsonl` and `test.json`."
    said += f" Trained by commit {made}." if made else ""
    return f"{said}\n\n{markdown(headings, rows)}"
