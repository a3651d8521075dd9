"""Secrets are refused in configurations, come from the environment, and are in no text."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_dml import credentials
from dist_dml.config import TrackingConfig
from dist_dml.config_loading import config_hash, resolve, to_yaml
from dist_dml.credentials import RedactedStream, expand, find_secret, redact
from dist_dml.errors import RunError, UsageError, print_failure
from dist_dml.tracking import run_files, sync_command
from dist_dml.tracking.destination import destination_of, stored_config
from dist_dml.tracking.mirror import _command
from dist_dml.tracking.received import Received, load_received, save_received

SECRET = "hunter2-correct-horse"


@pytest.fixture(autouse=True)
def nothing_expanded(monkeypatch):
    monkeypatch.setattr(credentials, "_shown_as", {})


HOLDING = [
    f"http://ann:{SECRET}@host:5000",
    f"https://ann:{SECRET}@host/path?x=1",
    f"postgresql+psycopg2://ann:{SECRET}/with/slashes@host/db",
    f"https://{SECRET}@github.com/x",
    f"https://host/a.tar?token={SECRET}",
    f"https://host/a.tar?x=1&access_token={SECRET}&y=2",
    f"https://host/a.tar?sig={SECRET}",
    f"s3://b/a.tar?X-Amz-Security-Token={SECRET}",
    f"https://b/a.tar?X-Amz-Signature={SECRET}",
    f"https://b/a.tar?X-Goog-Signature={SECRET}#part",
    f"https://host/?password={SECRET}",
    f"https://host/?KEY={SECRET}",
    f"mssql+pyodbc://?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}",
    f"text before https://ann:{SECRET}@host and after",
]
FREE = [
    "",
    "runs/demo",
    "http://host:5000/#/e?x=a@b",
    "http://host:5000/a@b",
    "https://ann@host/x",
    "http://ann:${PASSWORD}@host",
    "https://host/a.tar?token=${TOKEN}&x=1",
    "https://host/a.tar?${SIGNED}",
    "postgresql://ann:${A}${B}@host/db",
    "sqlite:////home/ann/mlflow.db",
    "s3://bucket/train-{000000..000127}.tar",
    "metric(k=0.8,p=0.5)",
    "timm:resnet50",
]


@pytest.mark.parametrize("text", HOLDING)
@pytest.mark.parametrize("key", ["tracking.mlflow_uri", "data.path", "run.root", "model.weights"])
def test_a_value_that_holds_a_secret_is_refused_without_repeating_it(text, key):
    with pytest.raises(UsageError) as caught:
        resolve(None, [f"{key}={text}"])
    assert SECRET not in str(caught.value)
    assert key in str(caught.value)
    assert "${NAME}" in str(caught.value)


@pytest.mark.parametrize("text", FREE)
def test_what_holds_no_secret_is_not_touched(text):
    assert find_secret(text) == ""
    assert redact(text) == text


@pytest.mark.parametrize("text", HOLDING)
def test_urls_are_shown_without_their_secrets_wherever_they_stand(text):
    assert SECRET not in redact(f"it failed: '{text}' was not reached")


def test_secrets_inside_lists_and_variants_are_found(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "data: {path: a}\nvariants:\n"
        f"  far: {{data: {{mixture: [{{path: 'https://ann:{SECRET}@host/x'}}]}}}}\n"
    )
    assert resolve(str(file), []).config.data.path == "a"
    with pytest.raises(UsageError, match=r"^data\.mixture\.path holds a password"):
        resolve(f"{file}:far", [])


def test_a_reference_is_stored_hashed_and_printed_as_it_stands(monkeypatch):
    config = resolve(None, ["tracking.mlflow_uri=http://ann:${MLFLOW_PW}@host"]).config
    before = config_hash(config)
    monkeypatch.setenv("MLFLOW_PW", SECRET)
    assert config_hash(config) == before
    assert "http://ann:${MLFLOW_PW}@host" in to_yaml(config)
    assert expand(config.tracking.mlflow_uri, "tracking.mlflow_uri") == f"http://ann:{SECRET}@host"


def test_a_reference_where_nothing_expands_it_is_refused():
    with pytest.raises(UsageError, match=r"run\.root='\$\{SCRATCH\}/runs': .* only"):
        resolve(None, ["run.root=${SCRATCH}/runs"])


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named_with_its_key(monkeypatch, value):
    monkeypatch.delenv("NOT_THERE", raising=False)
    if value is not None:
        monkeypatch.setenv("NOT_THERE", value)
    with pytest.raises(UsageError, match=r"tracking\.mlflow_uri=.* NOT_THERE, which is not set"):
        expand("http://ann:${NOT_THERE}@host", "tracking.mlflow_uri")


@pytest.mark.parametrize("text", ["${", "${A B}", "${}", "${NAME:-x}", "x${1}"])
def test_what_begins_no_name_is_refused(text):
    with pytest.raises(UsageError, match="begins no name"):
        expand(text, "data.path")


def test_an_expanded_value_is_hidden_in_all_its_spellings(monkeypatch):
    monkeypatch.setenv("PW", 'a"b/c+d e%41')
    expand("http://ann:${PW}@host", "k")
    for spelling in ('a"b/c+d e%41', "a%22b%2Fc%2Bd%20e%2541", 'a\\"b/c+d e%41', 'a"b/c+d eA'):
        assert redact(f"<{spelling}>") == "<${PW}>", spelling


def test_the_header_of_basic_authentication_is_hidden(monkeypatch):
    monkeypatch.setenv("PW", "one%2Ftwo")
    expand("http://ann:${PW}@host", "k")
    header = base64.b64encode(b"ann:one/two").decode()
    assert redact(f"Authorization: Basic {header}") == "Authorization: Basic ***"


def test_parts_of_a_url_that_is_a_variable_are_hidden_too(monkeypatch):
    monkeypatch.setenv("URL", f"https://ann:{SECRET}@host/?sig=abcdefgh")
    expand("${URL}", "tracking.mlflow_uri")
    assert redact(f"password {SECRET}, sig abcdefgh") == "password ***, sig ***"
    assert redact(f"GET https://ann:{SECRET}@host/?sig=abcdefgh") == "GET ${URL}"


def test_short_values_do_not_spoil_every_text(monkeypatch):
    monkeypatch.setenv("N", "1")
    assert expand("data/${N}", "data.path") == "data/1"
    assert redact("step 11 of 100") == "step 11 of 100"


def test_secrets_that_libraries_read_by_themselves_are_hidden(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert redact(f"denied: {SECRET}") == "denied: ${MLFLOW_TRACKING_PASSWORD}"


@given(st.text(max_size=200))
def test_any_text_can_be_redacted_twice_and_searched(text):
    once = redact(text)
    assert redact(once) == once
    find_secret(text)


def test_failures_notes_and_streams_are_redacted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PW", SECRET)
    expand("${PW}", "data.path")
    print_failure(f"no answer from http://ann:{SECRET}@host ({SECRET})")
    run_files.note_problem(tmp_path, "x" * 490 + SECRET)  # Cut behind its tenth letter.
    stream = io.StringIO()
    print(f"Basic {SECRET}", file=RedactedStream(stream))
    texts = [capsys.readouterr().err, (tmp_path / run_files.MIRROR_LOG).read_text()]
    for text in (*texts, stream.getvalue()):
        assert SECRET[:5] not in text
    assert texts[0].endswith("http://ann:${PW}@host (${PW})\n")


def test_an_uncaught_error_is_printed_without_its_secrets():
    code = f"""
import threading
from dist_dml.credentials import redact_tracebacks
redact_tracebacks()
def fail():
    raise KeyError("http://ann:{SECRET}@host")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("KeyError: 'http://ann:***@host'") == 2
    # The line of the source, which the traceback quotes, is not there for `-c`.
    assert SECRET not in done.stderr


def test_mlflow_is_reached_by_the_value_and_called_by_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("PW", SECRET)
    tracking = TrackingConfig(mlflow_uri="http://ann:${PW}@host:1", experiment="e")
    destination = destination_of(tracking, tmp_path, "a")
    assert destination.address == f"http://ann:{SECRET}@host:1"
    assert destination.shown == "http://ann:${PW}@host:1"
    save_received(tmp_path, destination, Received("7"))
    assert SECRET not in (tmp_path / run_files.MIRROR_STATE).read_text()
    assert load_received(tmp_path, destination).run_id == "7"
    assert SECRET not in " ".join(_command(tmp_path, destination, "b", True))


@pytest.mark.parametrize("uri", [f"http://ann:{SECRET}@host", "http://ann:${NOT_SET}@host"])
def test_a_destination_with_a_secret_or_without_its_variable_is_refused(uri, tmp_path):
    with pytest.raises(UsageError) as caught:
        destination_of(TrackingConfig(mlflow_uri=uri), tmp_path, "a")
    assert SECRET not in str(caught.value)


def test_the_scheme_may_be_in_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE", f"sqlite:///{tmp_path}/x.db")
    assert destination_of(TrackingConfig(mlflow_uri="${STORE}"), tmp_path, "a").shown == "${STORE}"
    monkeypatch.setenv("STORE", str(tmp_path))
    with pytest.raises(UsageError, match="is a folder"):
        destination_of(TrackingConfig(mlflow_uri="${STORE}"), tmp_path, "a")


def test_sync_refuses_a_secret_and_shows_the_reference(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("run: {name: a}\n")
    with pytest.raises(UsageError, match=r"^--uri holds a password"):
        sync_command.sync(tmp_path, f"http://ann:{SECRET}@host", None, None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("PW", SECRET)
    with pytest.raises(RunError) as caught:
        sync_command.sync(tmp_path, "http://ann:${PW}@127.0.0.1:9", None, None)
    assert SECRET not in str(caught.value)
    assert "http://ann:${PW}@127.0.0.1:9" in str(caught.value)


def test_a_stored_config_with_a_secret_is_not_sent_to_mlflow(tmp_path):
    (tmp_path / "config.yaml").write_text(f"tracking: {{mlflow_uri: 'http://a:{SECRET}@h'}}\n")
    with pytest.raises(UsageError, match=r"config\.yaml: tracking\.mlflow_uri holds") as caught:
        stored_config(tmp_path)
    assert SECRET not in str(caught.value)
