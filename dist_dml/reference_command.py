"""`dist-dml reference [DATASET] [LOSS]`: what papers A, B and C publish, line by line.

    dist-dml reference                  which data sets and losses there are numbers of
    dist-dml reference cub              every published row of CUB-200-2011
    dist-dml reference sop multi_similarity

Scores are in percent. docs/recipes.md says where each number is from, and what to mind.
"""

from __future__ import annotations

import argparse

from dist_dml.reference_tables import (
    check_names,
    dataset_of,
    known_datasets,
    lines_for,
    rows_for,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml reference`."""
    parser.add_argument("dataset", nargs="?", default="", help="cub, cars196, sop, inshop, cifar10")
    parser.add_argument("loss", nargs="?", default="", help="a `loss.name`, such as c2")


def run(arguments: argparse.Namespace) -> int:
    """Print the rows, or what there is. Returns the exit code.

    Raises:
        UsageError: for a data set or a loss without published results.
    """
    check_names(arguments.dataset, arguments.loss)
    if not arguments.dataset:
        for dataset in known_datasets():
            losses = sorted({row.loss_name for row in rows_for(dataset)} - {""})
            print(f"{dataset:<16} {', '.join(losses)}")
        return 0
    print(f"# {dataset_of(arguments.dataset)}: scores in percent")
    for line in lines_for(arguments.dataset, arguments.loss):
        print(line)
    return 0
