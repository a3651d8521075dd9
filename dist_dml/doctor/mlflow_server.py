"""The store that a run is mirrored to: does it answer, to whom, in which version, at what time.

Nothing is written to it, and mlflow itself is not imported.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from dist_dml.credentials import redact
from dist_dml.doctor.findings import Finding, Setting, note, ok, problem, skipped, warning
from dist_dml.doctor.http_request import Answer, ask, basic, split_address
from dist_dml.doctor.storage import existing, file_system, is_network
from dist_dml.doctor.versions import version_of
from dist_dml.listening import is_loopback
from dist_dml.tracking.destination import destination_of

ASK_SECONDS = 5.0
_SLOW_SECONDS = 1.0
# Time stamps come from here and the server's pages sort by them; signed URLs fail at minutes.
_SKEW_SECONDS, _BAD_SKEW_SECONDS = 5.0, 300.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_DRIVERS = {"postgresql": "psycopg2", "mysql": "pymysql", "mssql": "pyodbc"}


def mlflow_findings(setting: Setting) -> Iterator[Finding]:
    """The store of `tracking.mlflow_uri`, or the default database in `run.root`."""
    config = setting.config
    if not config.tracking.mlflow and not setting.mlflow_named:
        yield skipped("MLflow", "tracking.mlflow=false")
        return
    client = version_of("mlflow")
    if client is None:
        remedy = "pip install 'dist_dml[mlflow]', or tracking.mlflow=false"
        yield warning("MLflow", "mlflow is not installed, and tracking.mlflow=true", remedy)
    root = Path(config.run.root)
    destination = destination_of(config.tracking, root, config.run.name)
    address, shown = destination.address, destination.shown
    scheme = urlsplit(address).scheme.split("+")[0]
    if scheme in ("http", "https"):
        yield from server(address, shown, config.tracking.experiment, client, setting.environment)
    elif scheme == "sqlite":
        path = Path(address.partition(":///")[2].partition("?")[0] or "mlflow.db")
        yield from sqlite_file(path, setting.system, setting.several_hosts)
    elif scheme in _PORTS:
        yield from database(address, shown, scheme)
    else:
        yield skipped("MLflow", f"stores of kind {scheme} are not looked at")


def server(
    address: str,
    shown: str,
    experiment: str,
    client: str | None,
    environment: Mapping[str, str],
    timeout_seconds: float = ASK_SECONDS,
) -> Iterator[Finding]:
    """Findings about a tracking server: two questions, neither of which changes anything.

    Args:
        address: its URL, with a password in it if there is one.
        shown: the same without.
        experiment: that is asked for.
        client: version of mlflow here; None where it is not installed.
        environment: credentials as mlflow's client reads them.
        timeout_seconds: of each question.
    """
    plain, headers = split_address(address)
    headers = headers or credentials(environment)
    yield from _unencrypted(plain, headers)
    version = ask(f"{plain}/version", headers, timeout_seconds)
    if not version.status:
        yield problem(
            "MLflow",
            f"{shown}: {version.failure}",
            "start the server, correct tracking.mlflow_uri, or open the way to it (firewall, "
            "proxy: NO_PROXY); a training goes on without it, and `dist-dml track sync` follows",
        )
        return
    # The two words of that path are answered to anybody; this one only to those who may.
    wanted = f"experiment_name={quote(experiment, safe='')}"
    answer = ask(
        f"{plain}/api/2.0/mlflow/experiments/get-by-name?{wanted}", headers, timeout_seconds
    )
    yield from judged(answer, shown, bool(headers))
    yield from _versions(version, client)
    yield from clock(version if version.skew is not None else answer, "MLflow clock")


def judged(answer: Answer, shown: str, with_credentials: bool) -> Iterator[Finding]:
    """Findings about the answer to a question of the API.

    Args:
        answer: of the server.
        shown: its address without secrets.
        with_credentials: whether a user or a token was sent.
    """
    body = " ".join(answer.body.split())[:160]
    absent = answer.status == 404 and "RESOURCE_DOES_NOT_EXIST" in answer.body
    if absent or (answer.status == 200 and answer.body.lstrip().startswith("{")):
        yield _answered(answer, shown, absent)
    elif answer.status == 401:
        sent = (
            "the user, password or token that was sent is refused"
            if with_credentials
            else ("it asks for a user and a password")
        )
        yield problem(
            "MLflow",
            f"{shown}: {sent} (401)",
            "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
            "MLFLOW_TRACKING_TOKEN) where the workers run",
        )
    elif answer.status == 403 and "host" in answer.body.lower():
        host = urlsplit(shown).netloc.rpartition("@")[2]
        yield problem(
            "MLflow",
            f"{shown}: the server does not answer to the name {host} (403: {body})",
            f"start it with --allowed-hosts {host} (MLflow 3.5 and newer; beside the names that it "
            "has), or reach it by a name that it knows",
        )
    elif answer.status == 403:
        yield problem(
            "MLflow",
            f"{shown}: forbidden (403: {body or 'no reason given'})",
            "ask for the right to read and write this experiment, or tracking.experiment=ANOTHER",
        )
    elif not answer.status:
        yield problem(
            "MLflow",
            f"{shown}: it is there, but its interface gives no answer: {answer.failure}",
            "look at the server's log; its database may be locked or gone",
        )
    elif answer.status >= 500:
        yield problem(
            "MLflow",
            f"{shown}: the server fails ({answer.status}: {body})",
            "look at the server's log; `mlflow db upgrade URI` if its database is of another "
            "version",
        )
    else:
        yield problem(
            "MLflow",
            f"{shown}: something else than MLflow answers ({answer.status}: {body[:60]})",
            "correct tracking.mlflow_uri: its port, and its path behind a proxy",
        )


def _answered(answer: Answer, shown: str, absent: bool) -> Finding:
    measured = f"{shown} answers in {answer.seconds * 1e3:.0f} ms"
    measured += "; the experiment will be made" if absent else ""
    if answer.seconds > _SLOW_SECONDS:
        remedy = "training does not wait for it; a run's last records take longer to arrive"
        return note("MLflow", measured, remedy, seconds=answer.seconds)
    return ok("MLflow", measured, seconds=answer.seconds)


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """The header of MLflow's own variables, where they are set."""
    user = environment.get("MLFLOW_TRACKING_USERNAME", "")
    password = environment.get("MLFLOW_TRACKING_PASSWORD", "")
    if user and password:
        return basic(user, password)
    token = environment.get("MLFLOW_TRACKING_TOKEN", "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _unencrypted(plain: str, headers: Mapping[str, str]) -> Iterator[Finding]:
    parts = urlsplit(plain)
    if headers and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        yield warning(
            "MLflow password",
            f"goes to {parts.hostname} unencrypted (http)",
            "https:// in tracking.mlflow_uri, or a tunnel: ssh -L 5000:127.0.0.1:5000 HOST",
        )


def _versions(answer: Answer, client: str | None) -> Iterator[Finding]:
    there = answer.body.strip()
    if answer.status != 200 or not there[:1].isdigit() or len(there) > 40:
        return  # An old server, or something else: said above.
    if client is None:
        yield ok("MLflow version", f"server {there}", server=there)
    elif there.split(".")[:2] == client.split(".")[:2]:
        yield ok("MLflow version", f"server {there}, client {client}", server=there)
    else:
        level = warning if there.split(".")[0] != client.split(".")[0] else note
        yield level(
            "MLflow version",
            f"server {there}, client {client}",
            f"pip install 'mlflow=={there}' here, or the same version for the server (then `mlflow "
            "db upgrade`)",
            server=there,
        )


def clock(answer: Answer, name: str) -> Iterator[Finding]:
    """A finding about the clock of a server, from its `Date`; none where it does not say.

    Args:
        answer: of the server.
        name: of the finding.
    """
    if answer.skew is None:
        return
    ahead = "ahead of" if answer.skew > 0 else "behind"
    off = max(0.0, abs(answer.skew) - 0.5)  # What whole seconds cannot tell.
    measured = f"the server is {off:.1f} s {ahead} this host" if off > 1 else "agrees within 1 s"
    remedy = "chronyd or systemd-timesyncd on both (timedatectl shows the state)"
    if off > _BAD_SKEW_SECONDS:
        yield problem(name, f"{measured}: signed URLs and tokens fail", remedy, skew=answer.skew)
    elif off > _SKEW_SECONDS:
        yield warning(name, f"{measured}: runs are sorted wrongly", remedy, skew=answer.skew)
    else:
        yield ok(name, measured, skew=answer.skew)


def sqlite_file(path: Path, system: Path, several_hosts: bool) -> Iterator[Finding]:
    """Findings about a database file.

    Args:
        path: of the file, which need not exist.
        system: root of /proc.
        several_hosts: whether the workers are on several.
    """
    folder = existing(path.absolute().parent)
    kind = file_system(folder, system)
    if is_network(kind):
        yield warning(
            "MLflow database",
            f"{path} is on {kind}, where SQLite's locks fail",
            "tracking.mlflow_uri=http://HOST:5000 of a server, or a local run.root",
        )
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        remedy = "tracking.mlflow_uri=sqlite:///PATH that this user may write, or chown it"
        yield problem("MLflow", f"{path} cannot be written", remedy)
        return
    if not path.exists():
        yield ok("MLflow", f"{path}, which the first run makes")
        return
    try:
        name = f"file:{quote(str(path.absolute()))}?mode=ro"
        connection = sqlite3.connect(name, uri=True, timeout=1.0)
        try:
            schema = connection.execute("select version_num from alembic_version").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        locked = "locked" in str(error)
        remedy = (
            "end the process that writes to it, or use a server"
            if locked
            else (
                "move the file away: `dist-dml track sync RUN` fills a new one from the run folders"
            )
        )
        yield problem("MLflow", f"{path}: {error}", remedy)
        return
    yield ok("MLflow", f"{path}, schema {schema[0] if schema else 'empty'}")


def database(address: str, shown: str, kind: str) -> Iterator[Finding]:
    """Findings about a database that is reached over the network, without logging in.

    Args:
        address: its URI, with a password in it if there is one.
        shown: the same without.
        kind: postgresql, mysql or mssql.
    """
    parts = urlsplit(address)
    driver = parts.scheme.partition("+")[2] or _DRIVERS[kind]
    if importlib.util.find_spec(driver) is None:
        package = {"psycopg2": "psycopg2-binary"}.get(driver, driver)
        yield problem("MLflow driver", f"{driver} is not installed", f"pip install {package}")
    host, port = unquote(parts.hostname or "localhost"), parts.port or _PORTS[kind]
    yield reached("MLflow", shown, host, port, "log in with its own client to try the password")


def reached(name: str, shown: str, host: str, port: int, further: str) -> Finding:
    """The finding about whether a port takes connections.

    Args:
        name: of the finding.
        shown: what is there, without secrets.
        host: its name or address.
        port: of it.
        further: what was not tried.
    """
    place = redact(shown) if f"{host}:{port}" in shown else f"{redact(shown)} ({host}:{port})"
    try:
        with socket.create_connection((host, port), ASK_SECONDS):
            return ok(name, f"{place} takes connections ({further})")
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            reason = f"no answer within {ASK_SECONDS:g} s"
        remedy = "start it, correct host and port, or open the way to it (firewall)"
        return problem(name, f"{place}: {reason}", remedy)
