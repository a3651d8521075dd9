"""The picture of a comparison: scores with their spread, and validation over training time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dist_dml.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (RED, BLUE, GREEN, ORANGE, PURPLE)
"""Of the best methods' curves; all others are grey."""


def comparison_picture(comparison: Mapping[str, Any]) -> Figure:
    """Left MAP@R and P@1 of each method, best first; right the first fold's validation MAP@R.

    Args:
        comparison: of `build_comparison`.
    """
    from matplotlib.figure import Figure

    methods = sorted(comparison["methods"], key=lambda one: -one["scores"]["map_at_r"]["mean"])
    figure = Figure(figsize=(12, 1.8 + 0.3 * len(methods)), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.15)
    limit = comparison["max_seconds"]
    budget = f", {limit:g} s of training a fold" if limit else ""
    figure.suptitle(
        f"{comparison['name']}: {comparison['folds']} folds, unseen classes{budget}",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    colours = {one["method"]: colour for one, colour in zip(methods, _COLOURS, strict=False)}
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    for axes, score, title in ((left, "map_at_r", "MAP@R"), (middle, "precision_at_1", "P@1")):
        _scores(axes, methods, score, title, colours)
    middle.set_yticklabels([])
    _curves(right, methods, colours)
    return figure


def _scores(
    axes: Axes,
    methods: list[Mapping[str, Any]],
    score: str,
    title: str,
    colours: Mapping[str, str],
) -> None:
    for place, one in enumerate(methods):
        spread = one["scores"][score]
        colour = colours.get(one["method"], GREY)
        axes.errorbar(
            100 * spread["mean"],
            place,
            xerr=100 * (spread["deviation"] or 0.0),
            fmt="o",
            color=colour,
            capsize=3,
        )
    axes.set_yticks(range(len(methods)), [one["method"] for one in methods])
    axes.invert_yaxis()
    axes.set_title(f"test {title}, percent", loc="left", fontsize=10)
    _dress(axes)


def _curves(axes: Axes, methods: list[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    for one in reversed(methods):  # The best on top.
        curve = one["runs"][0]["validation"]
        colour = colours.get(one["method"], GREY)
        known = one["method"] in colours
        axes.plot(
            curve["seconds"],
            [100 * value for value in curve["map_at_r"]],
            color=colour,
            alpha=1.0 if known else 0.35,
            linewidth=1.8 if known else 1.0,
            label=one["method"] if known else None,
        )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training", color=GREY)
    axes.set_title("validation MAP@R of the first fold, percent", loc="left", fontsize=10)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
