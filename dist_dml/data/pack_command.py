"""What `dist-dml pack NAME` does for every packer: its own command, and with `--leaks` a report."""

from __future__ import annotations

import argparse
from types import ModuleType


class PackCommand:
    """A packer's command with the options that all of them share."""

    def __init__(self, packer: ModuleType) -> None:
        """
        Args:
            packer: has `add_arguments(parser)`, with an argument `out`, and `run(arguments)`.
        """
        self._packer = packer
        self.__doc__ = packer.__doc__

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The packer's arguments, and `--leaks`."""
        self._packer.add_arguments(parser)
        parser.add_argument(
            "--leaks",
            action="store_true",
            help="afterwards look for images that training and test splits share",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Pack, then report. Returns the exit code."""
        code = self._packer.run(arguments)
        if code or not arguments.leaks:
            return code
        from dist_dml.data.index import load_index
        from dist_dml.data.leaks import report_leaks

        print(report_leaks(load_index(arguments.out)).text())
        return 0
