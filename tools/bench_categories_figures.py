"""Curves of `bench_categories`: time of a step, of an epoch, to a score, and memory, over C."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_categories_objectives import OBJECTIVES
from bench_categories_report import last_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
# A hue a family (blues: class weights, oranges: pairs, green: proxies), a marker an objective.
_STYLES: dict[str, tuple[str, str]] = {
    "cross_entropy": ("#08306B", "o"),
    "l1": ("#2171B5", "s"),
    "l2": ("#4292C6", "D"),
    "normalised_softmax": ("#6BAED6", "^"),
    "arcface": ("#7F7FBF", "v"),
    "partial_fc": ("#54278F", "P"),
    "proxy_anchor": ("#00838F", "X"),
    "spce": ("#FDAE6B", "o"),
    "multi_similarity": ("#D94801", "s"),
    "triplet": ("#A63603", "D"),
    "xbm": ("#E7298A", "^"),
    "ccp": ("#238B45", "*"),
}


def write_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`categories_time.png` and `categories_scores.png` in `folder`, where there is what to draw.

    Args:
        rows: of the ledger.
        folder: made where it does not exist.
    """
    steps = [row for row in rows if row["kind"] == "step" and not row["error"]]
    scores = [row for row in rows if row["kind"] == "score" and not row["error"]]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if steps:
        config = steps[0]["config"]
        each = config["images_per_class"]
        panels: list[tuple[str, Callable[[Row], float | None]]] = [
            ("seconds of a training step", lambda row: row["seconds_median"]),
            ("seconds of the head alone", lambda row: row["head_seconds_median"]),
            (f"seconds of an epoch, {each} images a class", lambda row: row["epoch_seconds"]),
            (
                "MiB of head and step beyond the start",
                lambda row: row["extra_bytes"] and max(row["extra_bytes"] / 2**20, 0.1),
            ),
        ]
        title = f"R = {config['rows']}, D = {config['dim']}, {config['threads']} threads"
        path = folder / "categories_time.png"
        _draw(path, title, [_over_classes(steps, *panel) for panel in panels])
        written.append(path)
    if scores:
        path = folder / "categories_scores.png"
        columns = sorted({_classes_of(row) for row in scores})
        curves = [_curves(scores, count) for count in columns if count]
        others = sorted({row["config"]["data"] for row in scores if not _classes_of(row)})
        curves += [_curves(scores, 0, data) for data in others]
        _draw(path, "", [*([_to_score(scores)] if any(columns) else []), *curves])
        written.append(path)
    return written


def _draw(path: Path, title: str, panels: Sequence[Callable[[Axes], None]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = -(-len(panels) // 2)
    figure = Figure(figsize=(11.0, 3.9 * height + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    handles: dict[str, Any] = {}
    for number, draw in enumerate(panels):
        axes = figure.add_subplot(height, 2, number + 1)
        draw(axes)
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=130)


def _plot(axes: Axes, name: str, points: Sequence[tuple[float, float]], **more: Any) -> None:
    colour, marker = _STYLES[name]
    thick = name == "cross_entropy"
    given = {
        "label": OBJECTIVES[name].title,
        "color": colour,
        "marker": marker,
        "markersize": 5,
        "linewidth": 2.4 if thick else 1.3,
        "zorder": 3 if thick else 2,
    }
    axes.plot(*zip(*points, strict=True), **(given | more))


def _over_classes(
    rows: Sequence[Row], label: str, value: Callable[[Row], float | None]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name in OBJECTIVES:
            found = [
                (row["config"]["num_classes"], value(row)) for row in rows if row["variant"] == name
            ]
            points = sorted((x, y) for x, y in found if y is not None)
            if points:
                _plot(axes, name, points)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("number of categories")
        axes.set_title(label, fontsize=10, loc="left")

    return draw


def _classes_of(row: Row) -> int:
    kind, _, count = row["config"]["data"].partition("-")
    return int(count) if kind == "synthetic" else 0


def _to_score(rows: Sequence[Row]) -> Callable[[Axes], None]:
    """Time to the target over synthetic classes; what did not get there stands at the limit."""

    def draw(axes: Axes) -> None:
        synthetic = [row for row in rows if _classes_of(row)]
        for name in OBJECTIVES:
            own = [row for row in synthetic if row["variant"] == name]
            there = sorted(
                (_classes_of(row), row["seconds_median"])
                for row in own
                if row["seconds_median"] is not None
            )
            late = [
                (_classes_of(row), last_seconds(row))
                for row in own
                if row["seconds_median"] is None
            ]
            if there:
                _plot(axes, name, there)
            if late:
                # An arrow up: later than this.
                _plot(axes, name, late, linestyle="none", marker=r"$\uparrow$", markersize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        config = synthetic[0]["config"]
        axes.set_xlabel(f"number of training categories of {config['num_images']:,} images")
        target = f"{config['metric']} = {config['target']:g}"
        axes.set_title(f"seconds of training to {target}", fontsize=10, loc="left")

    return draw


def _curves(rows: Sequence[Row], count: int, data: str = "") -> Callable[[Axes], None]:
    """Scores over training time on one data set."""

    def draw(axes: Axes) -> None:
        own = [
            row
            for row in rows
            if (row["config"]["data"] == data if data else _classes_of(row) == count)
        ]
        for name in OBJECTIVES:
            for row in own:
                if row["variant"] == name and row["curve"]:
                    _plot(axes, name, [(one[2], one[3]) for one in row["curve"]], markersize=3)
        axes.axhline(own[0]["config"]["target"], color="#888888", linewidth=0.9, linestyle="--")
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("seconds of training")
        metric = own[0]["config"]["metric"]
        axes.set_title(f"{metric}, {data or f'{count:,} categories'}", fontsize=10, loc="left")

    return draw
