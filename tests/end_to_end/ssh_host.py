"""A host that is reached by ssh: an sshd of our own on an address of the loopback.

Its home is a folder of the test, so that nothing is written into the home of whoever runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_INSTALL_SECONDS = 240


class NoSsh(Exception):
    """Why there is none."""


@dataclass(frozen=True)
class SshHost:
    """Its address (port 22), the key that lets in, and the home that commands begin in."""

    address: str
    key: Path
    home: Path


def install() -> None:
    """Have sshd, ssh and rsync.

    Raises:
        NoSsh: with the reason.
    """
    if os.geteuid() != 0:
        raise NoSsh("an sshd on port 22 needs root")
    if all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("sshd", "ssh", "rsync")):
        return
    packages = "openssh-server openssh-client rsync"
    # What a package starts by itself would listen on all addresses.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        done = subprocess.run(
            f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {packages}",
            shell=True,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
            check=False,
        )
    finally:
        if ours:
            policy.unlink()
    if done.returncode:
        raise NoSsh(f"apt-get install {packages}: {done.stderr.strip()[-200:]}")


@contextmanager
def ssh_host(folder: Path, variables: dict[str, str]) -> Iterator[SshHost]:
    """The host, until the block ends; what its commands have started is the caller's to end.

    Args:
        folder: empty; holds keys and the home.
        variables: of its commands' environment.

    Raises:
        NoSsh: there is none, and why.
    """
    install()
    number = os.getpid()
    address = f"127.77.{number // 250 % 250}.{number % 250 + 1}"
    home = folder / "home"
    home.mkdir()
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    every = " ".join(f'"{k}={v}"' for k, v in {**variables, "HOME": str(home)}.items())
    (folder / "sshd_config").write_text(
        f"ListenAddress {address}:22\nHostKey {folder / 'host'}\nPidFile {folder / 'pid'}\n"
        f"AuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 100\nSetEnv {every}\n"
        "Subsystem sftp internal-sftp\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # Of sshd's own, for its unprivileged part.
    log = folder / "sshd.log"
    with log.open("wb") as stream:
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 20
        while b"Server listening" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoSsh(f"sshd: {log.read_text().strip()[-200:]}")
            time.sleep(0.1)
        yield SshHost(address, folder / "user", home)
    finally:
        process.terminate()
        process.wait(10)
