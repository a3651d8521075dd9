"""Pictures of a run, drawn from its records. Figures are objects: no pyplot, no global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dist_dml.tracking.recorder import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that remain apart for colour-blind readers (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#5A5A5A",
)
SCORES = {
    "recall_at_1": ("Recall@1", BLUE),
    "map_at_r": ("MAP@R", RED),
    "r_precision": ("R-precision", GREEN),
    "nmi": ("NMI", PURPLE),
}
"""Scores that are drawn, with label and colour: the last part of their names."""
DISTANCE_STYLES = {"cosine": "-", "l2": "--"}
OTHER_STYLES = ("-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""For distances between class probabilities, of which only MAP@R is drawn."""
CERTIFICATE = "certificate"
MOST_COLUMNS = 3


def training_curves(metrics: Mapping[str, Curve], title: str) -> Figure:
    """Small multiples over the steps: loss, training accuracy, scores, images/s, data wait.

    A panel is drawn where its figures were recorded: `loss`, `accuracy`, `images_per_second`,
    `data_wait_share` (with any prefix, as `train/loss`), for each protocol
    `PROTOCOL/DISTANCE/SCORE`, and the shares of `SPLIT/certificate/METRIC/certified_share`.

    Args:
        metrics: of `read_metrics`.
        title: of the whole picture.

    Returns:
        A figure to save with `figure.savefig`, at least one panel large.
    """
    from matplotlib.figure import Figure

    panels = _panels(metrics)
    columns = min(max(1, len(panels)), 2 if len(panels) <= 4 else MOST_COLUMNS)
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5.2 * columns, 2.7 * rows + 0.5), dpi=120)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    if not panels:
        figure.text(0.5, 0.45, "nothing recorded yet", ha="center", color=GREY)
        return figure
    last = max((int(curve.step[-1]) for curve in metrics.values() if len(curve.step)), default=1)
    for index, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _dress(axes, last)
        draw(axes)
        if index >= len(panels) - columns:
            axes.set_xlabel("step", color=GREY)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a picture; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panels(metrics: Mapping[str, Curve]) -> list[Callable[[Axes], None]]:
    """What can be drawn from these figures, in the order of the picture."""
    panels: list[Callable[[Axes], None]] = []
    if curve := _find(metrics, "loss"):
        panels.append(lambda axes, c=curve: _draw_smoothed(axes, c, "loss", BLUE))
    if curve := _find(metrics, "accuracy"):
        panels.append(lambda axes, c=curve: _draw_share(axes, c, "training accuracy", GREEN))
    # In the order of the config: the first protocol is the one that matters most.
    for protocol in dict.fromkeys(name.split("/")[0] for name in metrics if _score_of(name)):
        panels.append(lambda axes, p=protocol: _draw_scores(axes, metrics, p))
    certified = [name for name in metrics if name.endswith("/certified_share")]
    if certified:
        panels.append(lambda axes: _draw_certified(axes, metrics, certified))
    if curve := _find(metrics, "images_per_second"):
        panels.append(lambda axes, c=curve: _draw_rate(axes, c))
    if curve := _find(metrics, "data_wait_share"):
        panels.append(lambda axes, c=curve: _draw_share(axes, c, "time waiting for data", ORANGE))
    return panels


def _find(metrics: Mapping[str, Curve], name: str) -> Curve | None:
    found = [
        key
        for key in sorted(metrics)
        if key.split("/")[-1] == name and not _score_of(key) and f"/{CERTIFICATE}/" not in key
    ]
    return metrics[found[0]] if found else None


def _score_of(name: str) -> tuple[str, str, str] | None:
    """Protocol, distance and score of a name such as `unseen/cosine/map_at_r`."""
    parts = name.split("/")
    if len(parts) != 3 or parts[2] not in SCORES:
        return None
    if parts[1] not in DISTANCE_STYLES and parts[2] != "map_at_r":
        return None
    return parts[0], parts[1], parts[2]


def _dress(axes: Axes, last_step: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    axes.tick_params(colors=GREY, labelsize=8.5, length=3)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, max(1, last_step) * 1.01)


def _name(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color="#222222")


def _draw_smoothed(axes: Axes, curve: Curve, label: str, colour: str) -> None:
    axes.plot(curve.step, curve.value, color=colour, alpha=0.25, linewidth=0.9)
    smooth = running_mean(curve.value, max(1, len(curve.value) // 50))
    axes.plot(curve.step, smooth, color=colour, linewidth=1.7)
    last = smooth[np.isfinite(smooth)]
    _name(axes, f"{label}, last {last[-1]:.3g}" if len(last) else label)


def _draw_share(axes: Axes, curve: Curve, label: str, colour: str) -> None:
    from matplotlib.ticker import PercentFormatter

    _draw_smoothed(axes, curve, label, colour)
    # A few percent should look like a few percent.
    axes.set_ylim(0, min(1.0, max(0.25, 1.1 * _highest(curve))))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _name(axes, f"{label}, last {running_mean(curve.value, 5)[-1]:.1%}")


def _draw_rate(axes: Axes, curve: Curve) -> None:
    _draw_smoothed(axes, curve, "images/s", GREY)
    axes.set_ylim(0, 1.1 * max(1.0, _highest(curve)))
    _name(axes, f"images/s, median {np.median(curve.value):.0f}")


def _highest(curve: Curve) -> float:
    """The largest finite value, or 0."""
    return float(max(curve.value[np.isfinite(curve.value)], default=0.0))


def _draw_scores(axes: Axes, metrics: Mapping[str, Curve], protocol: str) -> None:
    """All scores of a protocol: colour tells the score, line style the distance."""
    found = {key: parts for key in metrics if (parts := _score_of(key)) and parts[0] == protocol}
    distances = {parts[1] for parts in found.values()}
    order = list(SCORES)
    others = sorted(distances - set(DISTANCE_STYLES))
    styles = DISTANCE_STYLES | {
        name: OTHER_STYLES[i % len(OTHER_STYLES)] for i, name in enumerate(others)
    }
    for key, (_, distance, score) in sorted(found.items(), key=lambda f: order.index(f[1][2])):
        label, colour = SCORES[score]
        curve = metrics[key]
        axes.plot(
            curve.step,
            curve.value,
            color=colour,
            linestyle=styles[distance],
            linewidth=1.7 if distance == "cosine" else 1.1,
            marker="o",
            markersize=3 if distance == "cosine" else 2,
            label=f"{label}{f' {distance}' if len(distances) > 1 else ''} {curve.value[-1]:.3f}",
        )
    axes.set_ylim(0, 1)
    columns = min(3, len(distances))
    axes.legend(fontsize=8, frameon=False, loc="best", ncols=columns, labelcolor=GREY)
    named = f"{protocol} classes" if protocol in ("seen", "unseen") else protocol
    _name(axes, f"scores on {named}")


def _draw_certified(axes: Axes, metrics: Mapping[str, Curve], names: list[str]) -> None:
    """One line a metric: the share of samples whose class separation is certified."""
    for name, colour in zip(
        sorted(names), (BLUE, RED, GREEN, PURPLE, ORANGE, GREY) * 9, strict=False
    ):
        curve = metrics[name]
        label = f"{name.split('/')[-2]} {curve.value[-1]:.1%}"
        axes.plot(curve.step, curve.value, color=colour, marker="o", markersize=3, label=label)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=GREY)
    _name(axes, "certified share of held-out images")


def running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean of each value and up to `window` - 1 before it. Values that are not finite are left out.

    Equal to `[values[max(0, i - window + 1) : i + 1].mean() for i in range(n)]` on finite values;
    nan where none of them is finite.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    number = counts[stop] - counts[start]
    total = sums[stop] - sums[start]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
