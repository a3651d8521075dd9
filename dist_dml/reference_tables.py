"""Published results of papers A, B and C, to be printed beside a user's own.

The numbers are in `reference/paper_a.csv`, `paper_b.csv` and `paper_c.csv`, one a line, as printed:
scores in percent, `training_steps` in steps. Those of paper B are read from its text, those of
paper C from its supplement (Tables 1 and 2; the copy agrees with the PDF in all 336 numbers), those
of paper A from the project's reference, as its main text was not at hand. docs/recipes.md has the
errata, and what stands between such a number and a fair comparison.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from dist_dml.errors import UsageError

_FOLDER = Path(__file__).parent / "reference"
PAPERS = ("A", "B", "C")
# Names that users have for what packers write as `source.kind` into dataset.json.
ALIASES = {
    "cub200": "cub",
    "cub_200_2011": "cub",
    "cars": "cars196",
    "products": "online_products",
    "sop": "online_products",
    "stanford_online_products": "online_products",
    "in_shop": "inshop",
}
# Scores of this project under the name that papers give them.
_PRINTED = {
    "precision_at_1": "P@1",
    "r_precision": "P@R",
    "map_at_r": "MAP@R",
    "f1_at_1": "F@1",
    "nmi": "NMI",
    "training_steps": "steps",
}


@dataclass(frozen=True)
class ReferenceRow:
    """One published number.

    Attributes:
        paper: "A", "B" or "C".
        table: number of the table there.
        dataset: `source.kind` of the packed data set.
        method: as printed, without its citation.
        loss_name: the `loss.name` that it is to be compared with; empty for what this project has
            not (an ensemble, another objective). Variants of a loss (XBM, CCP) have its name.
        backbone: as printed; empty where it is not said.
        dim: width of the embedding; None where it is not said.
        protocol: "standard" (all training classes, the last or best model of one run), "separated"
            (mean of the models of 4 folds) or "concatenated" (their embeddings side by side).
        distance: "cosine", "l2"; in paper A "probability_l2" or the exponent of its own distance.
        metric: as in `retrieval.metrics.score_names`, or "nmi", "training_steps".
        mean: percent; of `training_steps` a number of steps.
        deviation: over runs; None where it is not given: neither paper gives any.
        page: of the paper or its supplement; None where the text has no pages.
    """

    paper: str
    table: int
    dataset: str
    method: str
    loss_name: str
    backbone: str
    dim: int | None
    protocol: str
    distance: str
    metric: str
    mean: float
    deviation: float | None
    page: int | None


@cache
def reference_rows() -> tuple[ReferenceRow, ...]:
    """All published numbers, in the order of the papers and their tables."""
    return tuple(row for paper in PAPERS for row in _read(_FOLDER / f"paper_{paper.lower()}.csv"))


def _read(path: Path) -> list[ReferenceRow]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            ReferenceRow(
                paper=row["paper"],
                table=int(row["table"]),
                dataset=row["dataset"],
                method=row["method"],
                loss_name=row["loss_name"],
                backbone=row["backbone"],
                dim=int(row["dim"]) if row["dim"] else None,
                protocol=row["protocol"],
                distance=row["distance"],
                metric=row["metric"],
                mean=float(row["mean"]),
                deviation=float(row["deviation"]) if row["deviation"] else None,
                page=int(row["page"]) if row["page"] else None,
            )
            for row in csv.DictReader(file)
        ]


def known_datasets() -> tuple[str, ...]:
    """The data sets that published numbers are of."""
    return tuple(dict.fromkeys(row.dataset for row in reference_rows()))


def dataset_of(name: str) -> str:
    """`name`, or what packers call it: "cars" and "Cars196" are "cars196", "sop" is
    "online_products". Others are returned as they are.
    """
    plain = name.lower().replace("-", "_")
    return ALIASES.get(plain, plain)


def rows_for(dataset: str, loss_name: str = "") -> list[ReferenceRow]:
    """The published numbers of a data set and, unless it is empty, of one loss.

    No rows for a data set or a loss that no table has: a user's own data have no published row.

    Args:
        dataset: `source.kind` of dataset.json, or a usual name, see `dataset_of`.
        loss_name: `loss.name` of the configuration.
    """
    kind = dataset_of(dataset)
    return [
        row
        for row in reference_rows()
        if row.dataset == kind and (not loss_name or row.loss_name == loss_name)
    ]


def lines_for(dataset: str, loss_name: str = "") -> list[str]:
    """`rows_for` as lines of a table: one for each method, width, protocol and distance.

    `C   Table 2  C2  BN-Inception  128  separated  cosine  R@1 59.73  P@R 31.86  MAP@R 21.01`
    """
    described = [
        (_description(rows), _scores(rows)) for rows in _results(rows_for(dataset, loss_name))
    ]
    if not described:
        return []
    columns = zip(*(cells for cells, _ in described), strict=True)
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(cells, widths, strict=True)), scores])
        for cells, scores in described
    ]


def _results(rows: Iterable[ReferenceRow]) -> Iterable[list[ReferenceRow]]:
    """The numbers of one line of a printed table, side by side in the files as well."""

    def line(row: ReferenceRow) -> tuple[object, ...]:
        return (row.paper, row.table, row.method, row.dim, row.protocol, row.distance)

    return (list(group) for _, group in groupby(rows, line))


def _description(rows: Sequence[ReferenceRow]) -> tuple[str, ...]:
    row = rows[0]
    where = f"paper {row.paper}, Table {row.table}"
    return (where, row.method, row.backbone, str(row.dim or ""), row.protocol, row.distance)


def _scores(rows: Sequence[ReferenceRow]) -> str:
    return "  ".join(f"{printed_metric(row.metric)} {printed_value(row)}" for row in rows)


def printed_metric(metric: str) -> str:
    """A score's name as papers print it: `recall_at_10` is R@10, `map_at_r` MAP@R."""
    if metric.startswith("recall_at_"):
        return f"R@{metric.removeprefix('recall_at_')}"
    return _PRINTED[metric]


def printed_value(row: ReferenceRow) -> str:
    """The number as the paper prints it, with its deviation where there is one."""
    if row.metric == "training_steps":
        return f"{row.mean:,.0f}"
    digits = 1 if row.paper == "B" else 2
    spread = "" if row.deviation is None else f" +- {row.deviation:.{digits}f}"
    return f"{row.mean:.{digits}f}{spread}"


def check_names(dataset: str, loss_name: str) -> None:
    """For a command line, where a name without published results is a slip.

    Raises:
        UsageError: no published number is of this data set, or none of it of this loss.
    """
    if dataset and not rows_for(dataset):
        raise UsageError(
            f"no published results of data set {dataset!r}; use {', '.join(known_datasets())}"
        )
    datasets = (dataset_of(dataset),) if dataset else known_datasets()
    names = sorted({row.loss_name for name in datasets for row in rows_for(name)} - {""})
    if loss_name and loss_name not in names:
        raise UsageError(
            f"no published results of loss {loss_name!r} on {', '.join(datasets)}; use "
            f"{', '.join(names)}"
        )
