"""From a command line to a running worker and an exit code: what train and evaluate share.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 75 stopped on request and saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from dist_dml.command_line import add_config_option
from dist_dml.config_loading import Resolved, resolve
from dist_dml.credentials import print_traceback, redact
from dist_dml.errors import (
    STOPPED_EXIT_CODE,
    RunError,
    Stopped,
    UsageError,
    print_failure,
    print_stopped,
)
from dist_dml.parallel.world import World, environment_ranks, start_world, stop_world

Body = Callable[[Resolved, World, argparse.Namespace], None]

# In errors of a collective whose other side has gone away.
_LOST_PEER = (
    *("Connection closed", "Connection reset", "Broken pipe", "Timed out", "NCCL", "gloo"),
    "pair closure",  # Gloo's word where nothing comes within the time limit.
)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE section.key=value ...`, and what launchers append."""
    add_config_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    # The deepspeed launcher appends it; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run_worker(body: Body, arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Resolve the configuration, join the other workers, run `body`, leave in good order.

    A failure of one worker ends all: its reason is printed once a machine.

    Raises:
        UsageError: for what every worker finds before they meet, see `run_command`.
        RunError: if they do not meet.
    """
    ranks = environment_ranks()
    resolved = resolve(arguments.config, [*arguments.overrides, *overrides])
    world = start_world(resolved.config.engine, ranks)
    try:
        body(resolved, world, arguments)
        stop_world(world)
    except KeyboardInterrupt:
        return 130
    except Stopped as stopped:
        if not stopped.together and world.failures is not None:
            world.failures.report(str(stopped), STOPPED_EXIT_CODE)
        if world.ranks.local_rank == 0:
            print_stopped(str(stopped))
        stop_world(world)
        if world.failures is not None:
            # A launcher sends SIGTERM to the others when the first has left, and an interpreter on
            # its way out does not hold it off any more.
            sys.stdout.flush()
            os._exit(STOPPED_EXIT_CODE)
        return STOPPED_EXIT_CODE
    except BaseException as error:
        return _end_all(world, error)
    return 0


def _exit_code(error: BaseException) -> int:
    return 2 if isinstance(error, UsageError) else 1


def _end_all(world: World, error: BaseException) -> int:
    """Report a failure to the other workers, or learn that this one only follows from theirs."""
    known = isinstance(error, (UsageError, RunError))
    if world.failures is None:
        if not known:
            print_traceback(error)
        print_failure(failure_reason(error))
        return _exit_code(error)
    # A worker that failed cannot leave its process group in good order, as others wait inside it:
    # both calls end the process.
    # Other machines print it too, and do not know what was expanded here.
    reason = redact(failure_reason(error))
    world.failures.bound(reason, _exit_code(error))
    if not known:
        world.failures.follow()
        if not _is_lost_peer(error):
            print_traceback(error)
    world.failures.report(reason, _exit_code(error))


def failure_reason(error: BaseException) -> str:
    """Why a worker ended, in one line for the person who must act."""
    if isinstance(error, (UsageError, RunError)):
        return str(error)
    if _is_lost_peer(error):
        return (
            "another worker is gone without a word: it was killed, or its machine or the network "
            "to it failed; look at its own output, then start again with --resume auto"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({_first_line(error)}); lower data.batch_size or use more workers"
    return f"{type(error).__name__}: {_first_line(error)} (an error of dist_dml; please report it)"


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
