"""Ray: its token, and a cluster that is named. Ray itself is not imported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dist_dml.doctor.findings import Finding, Setting, note, ok, problem, skipped, warning
from dist_dml.doctor.http_request import Answer, ask
from dist_dml.doctor.mlflow_server import ASK_SECONDS, clock, reached
from dist_dml.doctor.versions import version_of
from dist_dml.listening import is_loopback

_REFUSED_PORTS = range(10002, 20000)
_CLIENT_PORT, _HEAD_PORT = 10001, 6379


def ray_findings(setting: Setting) -> Iterator[Finding]:
    """The token of this user, then the cluster of `--ray` or RAY_ADDRESS."""
    client = version_of("ray")
    address = setting.ray or setting.environment.get("RAY_ADDRESS", "")
    if client is None:
        text = "ray is not installed; only `dist-dml tune` needs it"
        yield skipped("Ray", text, "pip install 'dist_dml[tune]'")
        return
    yield from token_findings(setting.environment, setting.home, bool(address))
    if not address or address == "local":
        yield skipped("Ray cluster", "no address given", "--ray ADDRESS, or RAY_ADDRESS")
        return
    token = token_of(setting.environment, setting.home)
    yield from cluster(address, client, token, setting.system)


def token_path(environment: Mapping[str, str], home: Path) -> Path:
    """Where Ray looks for the token."""
    given = environment.get("RAY_AUTH_TOKEN_PATH", "")
    return Path(given).expanduser() if given else home / ".ray" / "auth_token"


def token_of(environment: Mapping[str, str], home: Path) -> str:
    """The token that Ray's client would send; "" where it would send none."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    if given := environment.get("RAY_AUTH_TOKEN", "").strip():
        return given
    try:
        return token_path(environment, home).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def token_findings(
    environment: Mapping[str, str], home: Path, is_used: bool = True
) -> Iterator[Finding]:
    """Findings about the token's mode and file.

    Args:
        environment: RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH.
        home: of this user.
        is_used: whether a cluster is named.
    """
    mode, path = environment.get("RAY_AUTH_MODE", "").lower(), token_path(environment, home)
    in_environment = bool(environment.get("RAY_AUTH_TOKEN", "").strip())
    if in_environment:
        yield note(
            "RAY_AUTH_TOKEN",
            "the token is in the environment: it counts instead of the file, and every job has it",
            "unset RAY_AUTH_TOKEN and keep it in a file (RAY_AUTH_TOKEN_PATH, mode 600)",
        )
    there = path.is_file()
    if mode == "disabled":
        yield warning(
            "Ray token",
            "RAY_AUTH_MODE=disabled: whoever reaches a cluster's ports runs code on it as you",
            "export RAY_AUTH_MODE=token (cluster/ray_head.sh makes the token)",
        )
    elif mode not in ("", "token"):
        remedy = "export RAY_AUTH_MODE=token (or disabled)"
        yield problem("Ray token", f"RAY_AUTH_MODE={mode} is unknown to Ray", remedy)
    elif mode == "token" and not there and not in_environment:
        yield problem(
            "Ray token",
            f"RAY_AUTH_MODE=token, and there is no file {path}",
            "copy the head's token there with mode 600 (cluster/ray_head.sh makes one), or correct "
            "RAY_AUTH_TOKEN_PATH",
        )
    elif mode == "" and there:
        yield note(
            "Ray token",
            f"{path} exists and RAY_AUTH_MODE is not set: a cluster started here asks for the "
            "token, and `ray job submit` does not send it (401)",
            "export RAY_AUTH_MODE=token for servers and clients alike",
        )
    elif mode == "" and not is_used:
        yield ok("Ray token", "none, and no cluster is named")
    elif mode == "":
        remedy = "export RAY_AUTH_MODE=token before a cluster is started; cluster/ray_head.sh does"
        yield note("Ray token", "RAY_AUTH_MODE is not set, and there is no token", remedy)
    else:
        yield ok("Ray token", "RAY_AUTH_MODE=token")
    if there:
        yield token_file(path)


def token_file(path: Path) -> Finding:
    """The finding about a token's file: who may read it, and whether there is something in it.

    Args:
        path: of the file, which exists.
    """
    status = path.stat()
    others = status.st_mode & 0o077
    if others or status.st_uid not in (os.getuid(), 0):
        measured = f"{path} has mode {status.st_mode & 0o777:03o}"
        remedy = f"chmod 600 {path}; if others have an account here, delete it for a new token"
        if is_shielded(path):
            # Ray itself writes it so, with the usual umask.
            return warning(
                "Ray token file", f"{measured}: only its folder keeps others out", remedy
            )
        text = f"{measured}: whoever reads it runs code on the cluster as you"
        return problem("Ray token file", text, remedy)
    if not status.st_size:
        return problem("Ray token file", f"{path} is empty", f"delete {path} for a new token")
    return ok("Ray token file", f"{path}, mode {status.st_mode & 0o777:03o}")


def is_shielded(path: Path) -> bool:
    """Whether a folder around a file lets nobody but its owner through."""
    return any(not parent.stat().st_mode & 0o011 for parent in path.absolute().parents)


def cluster(
    address: str,
    client: str,
    token: str,
    system: Path = Path("/"),
    timeout_seconds: float = ASK_SECONDS,
) -> Iterator[Finding]:
    """Findings about a cluster.

    Args:
        address: `http://HOST:8265` (jobs), `ray://HOST:10001` (client), `HOST:6379` (the head), or
            `auto`: the one of this machine.
        client: version of ray here.
        token: to send; "" sends none.
        system: root of /tmp.
        timeout_seconds: of a question.
    """
    if address == "auto":
        try:
            address = (system / "tmp/ray/ray_current_cluster").read_text().strip()
        except OSError:
            remedy = "cluster/ray_head.sh starts one; --ray ADDRESS names another machine's"
            yield problem("Ray cluster", "no cluster runs on this machine", remedy)
            return
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    host = parts.hostname or ""
    if parts.scheme in ("http", "https"):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = ask(f"{address.rstrip('/')}/api/version", headers, timeout_seconds)
        yield from judged(answer, address, client, bool(token))
        yield from clock(answer, "Ray clock")
        if answer.status == 200 and not token and not is_loopback(host):
            yield problem(
                "Ray jobs",
                f"{address} takes jobs from anybody who reaches it: a job is code",
                "start the head with RAY_AUTH_MODE=token (cluster/ray_head.sh), or listen on "
                "127.0.0.1 and use ssh -L",
            )
        return
    port = parts.port or (_CLIENT_PORT if parts.scheme == "ray" else _HEAD_PORT)
    if parts.scheme == "gcs" and port in _REFUSED_PORTS:
        remedy = "ray start --port outside 10002-19999, which its workers use (6379 is usual)"
        yield warning("Ray port", f"{port} is among those of Ray's workers", remedy)
    further = "its version is told by the jobs' address, http://HOST:8265"
    yield reached("Ray cluster", address, host, port, further)


def judged(answer: Answer, address: str, client: str, with_token: bool) -> Iterator[Finding]:
    """Findings about the answer of a cluster's jobs interface.

    Args:
        answer: to GET /api/version.
        address: of the interface.
        client: version of ray here.
        with_token: whether a token was sent.
    """
    if not answer.status:
        yield problem(
            "Ray cluster",
            f"{address}: {answer.failure}",
            "start the head, or a tunnel: ssh -N -L 8265:127.0.0.1:8265 HEAD",
        )
    elif answer.status in (401, 403):
        refused = "it refuses the token that was sent" if with_token else "it asks for a token"
        yield problem(
            "Ray cluster",
            f"{address}: {refused} ({answer.status})",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE with a copy of the head's token",
        )
    elif answer.status != 200 or (there := _version(answer.body)) is None:
        remedy = "give the dashboard's address, http://HOST:8265"
        text = f"{address}: something else than Ray answers ({answer.status})"
        yield problem("Ray cluster", text, remedy)
    elif there != client:
        yield warning(
            "Ray cluster",
            f"{address} runs Ray {there}, and {client} is installed here",
            f"pip install 'ray[default,tune,train]=={there}' here, or {client} on the cluster: its "
            "parts must be equal",
            version=there,
        )
    else:
        measured = f"{address} runs Ray {there} as here, answers in {answer.seconds * 1e3:.0f} ms"
        yield ok("Ray cluster", measured, version=there, seconds=answer.seconds)


def _version(body: str) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    version = found.get("ray_version") if isinstance(found, dict) else None
    return version if isinstance(version, str) else None
