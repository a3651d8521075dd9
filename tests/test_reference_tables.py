"""Published numbers: read as printed, whole, and of losses that this project knows."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from dist_dml.data.pack import cars, cub, inshop, online_products
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.reference_command import add_arguments, run
from dist_dml.reference_tables import (
    ReferenceRow,
    check_names,
    known_datasets,
    lines_for,
    printed_value,
    reference_rows,
    rows_for,
)
from dist_dml.retrieval.metrics import score_names

KINDS = [pack.PUBLISHED.kind for pack in (cub, cars, online_products, inshop)]
LOSSES = get_args(LossConfig.model_fields["name"].annotation)


def value(dataset: str, method: str, metric: str, **where: object) -> float:
    """The one number that matches."""
    found = [
        row
        for row in rows_for(dataset)
        if (row.method, row.metric) == (method, metric)
        and all(getattr(row, key) == wanted for key, wanted in where.items())
    ]
    assert len(found) == 1, found
    return found[0].mean


# Read by eye from the papers' own tables, corners and middles, and each data set's odd rows.
PAPER_B = [
    ("cub", "Lifted Structure", "l2", 1, 47.2),
    ("cub", "Proxy-NCA", "cosine", 8, 81.9),
    ("cub", "NormSoftmax", "cosine", 4, 85.4),
    ("cub", "Cross-Entropy", "l2", 1, 67.6),
    ("cub", "Cross-Entropy", "cosine", 1, 69.2),
    ("cub", "Cross-Entropy", "cosine", 32, 97.3),
    ("cars196", "NormSoftmax", "cosine", 1, 89.3),
    ("cars196", "Cross-Entropy", "l2", 2, 93.7),
    ("cars196", "Cross-Entropy", "cosine", 32, 99.7),
    ("online_products", "HDC", "cosine", 1000, 97.8),
    ("online_products", "Cross-Entropy", "cosine", 1, 81.1),
    ("online_products", "Cross-Entropy", "l2", 1000, 98.1),
    ("inshop", "D&C", "cosine", 50, 98.0),
    ("inshop", "Multi-Similarity", "cosine", 40, 99.1),
    ("inshop", "Cross-Entropy", "l2", 10, 97.8),
    ("inshop", "Cross-Entropy", "cosine", 10, 98.0),
]
PAPER_C = [
    ("online_products", "C1", 512, "recall_at_1", 68.84),
    ("online_products", "C1-CCP-L", 512, "map_at_r", 52.73),
    ("online_products", "HPL-PA", 128, "map_at_r", 45.11),
    ("inshop", "MS-CCP-L", 512, "recall_at_1", 90.24),
    ("inshop", "Triplet-CCP-L", 512, "map_at_r", 64.28),
    ("inshop", "SoftTriple-S", 128, "r_precision", 58.74),
    ("cub", "C1", 512, "recall_at_1", 63.67),
    ("cub", "C2-CCP-L", 512, "map_at_r", 28.02),
    ("cub", "C2", 128, "map_at_r", 21.01),
    ("cub", "SoftTriple-L", 128, "recall_at_1", 57.94),
    ("cars196", "HPL-PA", 512, "recall_at_1", 86.84),
    ("cars196", "MS-CCP-L", 512, "map_at_r", 29.14),
    ("cars196", "Triplet", 128, "map_at_r", 15.68),
]


@pytest.mark.parametrize(("dataset", "method", "distance", "k", "percent"), PAPER_B)
def test_numbers_of_paper_b(
    dataset: str, method: str, distance: str, k: int, percent: float
) -> None:
    found = value(dataset, method, f"recall_at_{k}", paper="B", distance=distance)
    assert found == percent


@pytest.mark.parametrize(("dataset", "method", "dim", "metric", "percent"), PAPER_C)
def test_numbers_of_paper_c(
    dataset: str, method: str, dim: int, metric: str, percent: float
) -> None:
    assert value(dataset, method, metric, paper="C", dim=dim) == percent


def test_numbers_of_paper_a_and_training_lengths() -> None:
    assert value("cifar10", "L1", "map_at_r") == 84.23
    assert value("cifar100", "L1", "recall_at_1", backbone="ResNet50") == 57.69
    best = value("cifar10", "trained with p = 0.99, tiny a", "map_at_r", distance="p=0.1")
    assert best == 84.81
    assert value("inshop", "Triplet-CCP", "training_steps") == 115_000
    assert value("online_products", "SoftTriple", "training_steps") == 48_000


def test_tables_are_whole() -> None:
    """Rows of the printed tables; a method that lost its name or a column would change these."""
    rows = reference_rows()
    methods = Counter(
        (row.dataset, row.paper)
        for row in {(r.dataset, r.paper, r.method, r.dim, r.distance): r for r in rows}.values()
        if row.metric != "training_steps"
    )
    assert {kind: methods[kind, "B"] for kind in KINDS} == dict(
        zip(KINDS, (12, 12, 10, 10), strict=True)
    )
    assert {kind: methods[kind, "C"] for kind in KINDS} == dict(
        zip(KINDS, (28, 28, 28, 26), strict=True)
    )
    # 28 methods x 2 widths x 3 scores on two pairs of data sets, HPL-PA has no In-Shop.
    scores = [row for row in rows if row.paper == "C" and row.metric != "training_steps"]
    assert len(scores) == 2 * 28 * 6 - 6
    assert sum(row.metric == "training_steps" for row in rows) == 20


def test_every_row_is_well_formed() -> None:
    seen = set()
    for row in reference_rows():
        assert row.method, row
        assert row.dataset in (*KINDS, "cifar10", "cifar100")
        assert row.protocol in ("standard", "separated", "concatenated")
        assert row.protocol == {128: "separated", 512: "concatenated"}.get(row.dim or 0, "standard")
        if row.metric == "training_steps":
            assert row.mean == round(row.mean, -3) > 0
        else:
            recalls = (1, 2, 4, 8, 10, 16, 20, 30, 32, 40, 50, 100, 1000)
            assert row.metric in (*score_names(recalls), "nmi")
            assert 0 < row.mean < 100, row
        assert row.deviation is None or row.deviation >= 0
        key = tuple(
            getattr(row, name) for name in ReferenceRow.__dataclass_fields__ if name != "mean"
        )
        assert key not in seen, row
        seen.add(key)


def test_recall_grows_with_k_in_every_printed_row() -> None:
    """A digit read wrongly, or a column that slipped, would break the order."""
    for dataset in KINDS:
        previous = None
        for row in rows_for(dataset):
            if row.paper != "B":
                continue
            line = (row.method, row.distance)
            if previous and previous[0] == line:
                assert row.mean >= previous[1], row
            previous = line, row.mean


def test_scores_of_paper_c_are_ordered_as_they_must_be() -> None:
    """MAP@R <= P@R for every method; 512-D beats 128-D in every one of the tables' rows."""
    table = {
        (r.dataset, r.method, r.dim, r.metric): r.mean
        for r in reference_rows()
        if r.paper == "C" and r.metric != "training_steps"
    }
    for (dataset, method, dim, metric), mean in table.items():
        if metric == "r_precision":
            assert table[dataset, method, dim, "map_at_r"] < mean
        if dim == 128:
            assert table[dataset, method, 512, metric] > mean


def test_every_loss_of_a_row_is_a_loss_of_the_configuration() -> None:
    named = {row.loss_name for row in reference_rows()} - {""}
    assert named <= set(LOSSES)
    assert {"cross_entropy", "c1", "c2", "multi_similarity", "triplet", "proxy_nca"} <= named


@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_benchmark_has_rows_under_its_own_name(kind: str) -> None:
    assert kind in known_datasets()
    assert {row.paper for row in rows_for(kind)} == {"B", "C"}


@pytest.mark.parametrize(
    ("usual", "kind"),
    [
        ("sop", "online_products"),
        ("SOP", "online_products"),
        ("cars", "cars196"),
        ("In-Shop", "inshop"),
    ],
)
def test_usual_names_of_data_sets_are_understood(usual: str, kind: str) -> None:
    assert rows_for(usual) == rows_for(kind) != []


def test_data_of_the_users_own_have_no_published_rows() -> None:
    assert rows_for("glyphs", "c2") == lines_for("glyphs", "c2") == []
    assert rows_for("cub", "l1") == []


def test_lines_are_one_for_each_printed_row_and_aligned() -> None:
    lines = lines_for("cub", "c2")
    assert " ".join(lines[1].split()) == (
        "paper C, Table 2 C2 BN-Inception 128 separated cosine R@1 59.73 P@R 31.86 MAP@R 21.01"
    )
    assert len(lines) == 6
    assert len({line.index("R@1") for line in lines}) == 1
    (l2, cosine) = lines_for("sop", "cross_entropy")
    assert "l2 " in l2
    assert cosine.endswith("R@1 81.1  R@10 91.7  R@100 96.3  R@1000 98.8")
    assert any(line.endswith("steps 69,000") for line in lines_for("sop", "c2"))


def test_a_deviation_is_printed_where_there_is_one() -> None:
    row = ReferenceRow("C", 1, "cub", "X", "", "", 128, "separated", "", "map_at_r", 21.5, 0.25, 2)
    assert printed_value(row) == "21.50 +- 0.25"


def test_the_command_prints_rows_or_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([])) == 0
    overview = capsys.readouterr().out
    assert all(kind in overview for kind in KINDS)
    assert run(parser.parse_args(["sop", "multi_similarity"])) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# online_products")
    assert "MS-CCP-L" in shown
    assert "Cross-Entropy" not in shown


def test_names_without_published_results_are_refused_with_those_that_have() -> None:
    with pytest.raises(UsageError, match=r"data set 'cubs'; use cifar10, cifar100, cub, cars196"):
        check_names("cubs", "")
    with pytest.raises(UsageError, match=r"loss 'l1' on cub; use c1, c2, cross_entropy"):
        check_names("cub", "l1")
    check_names("", "")
    check_names("cars", "c1")
