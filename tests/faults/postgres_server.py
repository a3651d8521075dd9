"""A real PostgreSQL on the loopback, with a password, that can be killed and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launching import free_port

PASSWORD = "p@ss/word-of-a-test"
_INSTALL_SECONDS = 240


class NoPostgreSQL(Exception):
    """Why there is none."""


@dataclass
class PostgreSQL:
    """A server and its data; `uri` is without the password."""

    binaries: Path
    data: Path
    port: int

    @property
    def uri(self) -> str:
        """Of its database, the password as a variable of the environment."""
        return f"postgresql+psycopg2://mlflow:${{TEST_PG}}@127.0.0.1:{self.port}/mlflow"

    def start(self) -> None:
        """Returns when it answers."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories=''"
        self.control("start", "-w", "-t", "60", "-l", str(self.data / "log"), "-o", options)

    def kill(self) -> None:
        """As a machine that goes down: connections break, nothing is tidied up."""
        self.control("stop", "-m", "immediate")

    def control(self, *words: str) -> None:
        """`pg_ctl WORDS`, as the user whose files these are."""
        run([self.binaries / "pg_ctl", "-D", self.data, *words])


def run(command: list[object], **variables: str) -> None:
    """Run as a user that PostgreSQL accepts: it refuses root. Raises with what was printed."""
    words = [str(word) for word in command]
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if _is_root() else {}
    # Not pipes: the server would hold on to them.
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | variables,
            cwd="/",
            check=False,
            **user,
        )
        if done.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {log.read()!r}")


def find_binaries() -> Path:
    """The folder of PostgreSQL's programs, installed if that is possible.

    Raises:
        NoPostgreSQL: with the reason.
    """
    found = _installed()
    if found is None and _is_root() and shutil.which("apt-get"):
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql"
        done = subprocess.run(
            install,
            shell=True,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
            check=False,
        )
        found = _installed()
        if found is None:
            raise NoPostgreSQL(f"apt-get install postgresql: {done.stderr.strip()[-200:]}")
    if found is None:
        raise NoPostgreSQL("PostgreSQL is not installed, and this user cannot install it")
    if _is_root():
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            raise NoPostgreSQL("PostgreSQL refuses root, and has no user of its own") from None
    return found


def _installed() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def _is_root() -> bool:
    return os.geteuid() == 0


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """A server with an empty database, gone after the block.

    Raises:
        NoPostgreSQL: there is none, and why.
    """
    binaries = find_binaries()
    # Not pytest's folder, which is closed to the other user.
    folder = Path(tempfile.mkdtemp(prefix="dist_dml-postgresql-"))
    try:
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if _is_root():
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")
        server = PostgreSQL(binaries, folder / "data", free_port())
        command = [binaries / "initdb", "-D", server.data, "-U", "mlflow", "--no-sync"]
        run([*command, "--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8"])
        server.start()
        try:
            address = ["-h", "127.0.0.1", "-p", server.port, "-U", "mlflow"]
            run([binaries / "createdb", *address, "mlflow"], PGPASSWORD=PASSWORD)
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
