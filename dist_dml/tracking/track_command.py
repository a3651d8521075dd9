"""`dist-dml track sync|export`: what runs have written down, into MLflow or into tables."""

from __future__ import annotations

import argparse

from dist_dml.tracking import export_command, sync_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml track`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    sync = actions.add_parser("sync", help="send to MLflow what it does not have of a run")
    sync_command.add_arguments(sync)
    export = actions.add_parser("export", help="write runs and their curves as two tables")
    export_command.add_arguments(export)


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked. Returns the exit code; errors as the two modules."""
    command = export_command if arguments.action == "export" else sync_command
    return command.run(arguments)
