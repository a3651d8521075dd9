"""Ray's settings, which it reads from the environment when it is imported: this comes before."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import tempfile

from dist_dml.errors import UsageError

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Proposals learn from what has ended: no more of them than can run.
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    # The progress of trials is the ledger's, not Ray's.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A node whose helpers have not answered after 30 s ends itself: too short for a busy machine,
    # or for packages on a network's file system.
    "RAY_agent_register_timeout_ms": "300000",
}


def cluster_address(given: str) -> str:
    """The cluster that is asked for; empty for one of this machine alone."""
    return given or os.environ.get("RAY_ADDRESS", "")


def prepare_environment(address: str) -> None:
    """Set what the user has not set. A Ray of our own asks for a token that nobody else is told.

    Args:
        address: of the cluster; empty starts one.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not address and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # In a file of its own: without one Ray leaves a token in the home that everybody may read.
        folder = tempfile.mkdtemp(prefix="dist_dml-ray-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = os.path.join(folder, "auth_token")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
        finally:
            os.close(descriptor)
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = path


def check_shared(root: str, address: str) -> None:
    """On a cluster, run folders must lie where every machine sees them.

    Raises:
        UsageError: `run.root` is relative, which would be a folder of each machine's own.
    """
    if address and not os.path.isabs(root):
        raise UsageError(
            f"run.root={root} is relative, and trials run on the machines of {address}: give an "
            "absolute path that all of them share"
        )
