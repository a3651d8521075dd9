"""From words on a command line to one command and its exit code. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn, Protocol, runtime_checkable

from dist_dml.credentials import redact_tracebacks
from dist_dml.errors import (
    STOPPED_EXIT_CODE,
    RunError,
    Stopped,
    UsageError,
    print_failure,
    print_stopped,
)


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other refusal, and not once for every worker."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """`--config FILE[:VARIANT]`, as often as wanted; `arguments.config` is a list for `resolve`."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE[:VARIANT]",
        help="YAML file, or a variant of one; given again, the later one overrides",
    )


@runtime_checkable
class Command(Protocol):
    """A command that is no module of its own; its docstring is its help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it. Returns the exit code."""
        ...


def run_command(prog: str, command: ModuleType | Command, argv: Sequence[str]) -> int:
    """Parse `argv` with `command.add_arguments`, call `command.run`, return the exit code.

    Exit codes: what the command returns, 1 for a `RunError`, 2 for a `UsageError`, 75 for
    `Stopped`, 130 for Ctrl-C.
    """
    parser = CommandParser(
        prog=prog,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    redact_tracebacks()
    try:
        return command.run(_parse(parser, argv))
    except (UsageError, RunError) as error:
        # Every worker of a group finds the same mistake in the same words; one of them says so.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print_failure(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except Stopped as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print_stopped(str(stopped))
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt:
        return 130


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Options between overrides are fine: `a.b=1 --resume auto c.d=2`."""
    try:
        return parser.parse_intermixed_args(argv)
    except TypeError:  # Not offered for commands that have commands of their own.
        return parser.parse_args(argv)
