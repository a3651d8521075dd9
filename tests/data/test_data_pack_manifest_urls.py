"""URLs of a manifest are fetched, or left out, counted and listed; nothing hangs."""

from __future__ import annotations

import argparse
import csv
import http.server
import json
import socketserver
import tarfile
import threading
import time

import pytest
from tiny_images import image_of, png

from dist_dml.data.index import load_index
from dist_dml.data.pack import manifest as manifest_module
from dist_dml.data.pack.manifest import Division, pack_manifest
from dist_dml.data.pack.url_images import Fetching, fetch_images
from dist_dml.data.reader import open_reader, read_image
from dist_dml.data.retry import Retry
from dist_dml.errors import RunError, UsageError

QUICK = Fetching(seconds=1.0, largest_bytes=50_000, retry=Retry(2, 0.01), connections=4)
WHOLE = Division(test_fraction=0.0, seen_per_class=0)


def write_csv(path, rows: list[dict], delimiter: str = ","):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def pack_one(src, out, **options):
    return pack_manifest(src, out, processes=1, fetching=QUICK, **options)


def described(folder) -> dict[str, dict]:
    """The `.json` of every sample, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found[member.name.removesuffix(".json")] = json.loads(stream.read())
    return found


def stored(index) -> dict[int, tuple[str, bytes]]:
    found = {}
    for row in range(len(index)):
        shard = index.shard_path(int(index.shard[row])).read_bytes()
        data = shard[index.offset[row] :][: index.size[row]]
        found[int(index.key(row))] = (index.class_names[index.class_id[row]], data)
    return found


def refusal(call, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves images by number, and every way to fail."""

    asked: dict[str, int]

    def do_GET(self) -> None:
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        kind, _, number = self.path.strip("/").partition("/")
        image = png(image_of(int(number or 0)))
        if kind == "shaky" and self.asked[self.path] < 3:
            self.send_error(503)
        elif kind == "gone":
            self.send_error(404)
        elif kind == "moved":
            self.send_response(302)
            self.send_header("Location", f"/ok/{number}")
            self.end_headers()
        elif kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
        elif kind == "page":
            self.answer(b"<html>login</html>")
        elif kind == "large":
            self.answer(image * 1000)
        elif kind == "short":
            self.answer(image[:20], len(image))
        elif kind == "drip":
            self.drip(b"HTTP/1.0 200 OK\r\n" if number == "1" else b"", image)
        else:
            self.answer(image)

    def answer(self, data: bytes, length: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drip(self, start: bytes, image: bytes) -> None:
        """A byte every 50 ms, of the header or of the image: for ever, if nobody ends it."""
        try:
            if start:
                self.wfile.write(start + b"X: ")
            else:
                self.send_response(200)
                self.end_headers()
            for byte in (b"a" * 10_000) if start else image:
                self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, format: str, *arguments) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        pass


@pytest.fixture
def server():
    """Base URL and how often each path was asked for."""
    asked: dict[str, int] = {}
    handler = type("Handler", (_Handler,), {"asked": asked})
    with _Server(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", asked
        http_server.shutdown()


def test_each_url_is_its_image_or_a_reason_in_order(server):
    base, asked = server
    paths = ["ok/1", "gone/2", "shaky/3", "moved/4", "loop/5", "page/6", "large/7", "ok/8"]
    answers = list(fetch_images([f"{base}/{path}" for path in paths], QUICK))
    for place, number in ((0, 1), (2, 3), (3, 4), (7, 8)):
        assert answers[place] == png(image_of(number))
    assert answers[1] == "HTTP 404 (Not Found)"
    assert isinstance(answers[4], str)
    assert answers[5] == b"<html>login</html>"
    assert answers[6] == "larger than 0 MiB"
    assert asked["/shaky/3"] == 3
    assert asked["/gone/2"] == 1


def test_dripping_and_short_answers_and_dead_hosts_end_in_bounded_time(server):
    base, asked = server
    urls = [f"{base}/drip/0", f"{base}/drip/1", f"{base}/short/2", "http://127.0.0.1:1/x"]
    fetching = Fetching(seconds=0.4, retry=Retry(1, 0.01))
    started = time.monotonic()
    answers = list(fetch_images([*urls, f"{base}/ok/3"], fetching))
    assert time.monotonic() - started < 5
    assert [isinstance(answer, str) for answer in answers] == [True, True, True, True, False]
    assert answers[0] == "no answer in time"
    assert asked["/drip/0"] == asked["/short/2"] == 2


def test_many_urls_come_in_order_with_few_connections(server):
    base, _ = server
    urls = [f"{base}/ok/{n % 5}" for n in range(60)]
    answers = list(fetch_images(urls, Fetching(connections=2)))
    assert answers == [png(image_of(n % 5)) for n in range(60)]
    stopped = fetch_images(urls, Fetching(connections=2))
    assert next(stopped) == answers[0]
    del stopped  # Ends the downloads that are still going on.


def test_urls_that_fail_are_left_out_counted_and_listed(server, tmp_path, capsys):
    base, asked = server
    rows = [{"url": f"{base}/ok/{n}", "label": f"c{n % 3}"} for n in range(20)]
    rows[4]["url"], rows[9]["url"] = f"{base}/gone/4", f"{base}/page/9"
    path = write_csv(tmp_path / "a.csv", rows)
    index = pack_one(path, tmp_path / "out", division=WHOLE)
    expected = {n: (f"c{n % 3}", png(image_of(n))) for n in range(20) if n not in (4, 9)}
    assert stored(index) == expected
    assert described(tmp_path / "out")["000000003"]["url"] == f"{base}/ok/3"
    noted = capsys.readouterr().err
    assert "2 images could not be fetched (" in noted
    with (tmp_path / "out" / "failed" / "train-000000.csv").open() as stream:
        failed = {row["row"]: row["reason"] for row in csv.DictReader(stream)}
    assert failed == {"4": "HTTP 404 (Not Found)", "9": "no JPEG, PNG or WebP image"}

    before = sum(asked.values())
    assert pack_one(path, tmp_path / "out", division=WHOLE).fingerprint == index.fingerprint
    assert sum(asked.values()) == before


def test_failed_urls_are_tried_again_when_asked(server, tmp_path):
    base, _ = server
    rows = [
        {"url": f"{base}/shaky/{n}" if n == 3 else f"{base}/ok/{n}", "label": "a"}
        for n in range(12)
    ]
    path = write_csv(tmp_path / "a.csv", rows)
    once = Fetching(retry=Retry(0, 0.0))
    options = {"division": WHOLE, "shard_samples": 6, "processes": 1, "fetching": once}
    assert len(pack_manifest(path, tmp_path / "out", **options)) == 11
    (untouched,) = {p.name for p in (tmp_path / "out").glob("*.tar")} - {
        p.stem + ".tar" for p in (tmp_path / "out" / "failed").iterdir()
    }
    kept = (tmp_path / "out" / untouched).stat().st_mtime_ns
    assert len(pack_manifest(path, tmp_path / "out", retry_failed=True, **options)) == 11
    assert len(pack_manifest(path, tmp_path / "out", retry_failed=True, **options)) == 12
    assert not list((tmp_path / "out" / "failed").iterdir())
    assert (tmp_path / "out" / untouched).stat().st_mtime_ns == kept
    message = refusal(lambda: pack_manifest(path, tmp_path / "x", retry_failed=True, **options))
    assert "--retry-failed needs a pack of the same manifest" in message


def test_too_many_failures_stop_the_pack_at_once(server, tmp_path):
    base, _ = server
    rows = [{"url": f"{base}/gone/{n}", "label": "a"} for n in range(40)]
    path = write_csv(tmp_path / "a.csv", rows)
    message = refusal(lambda: pack_one(path, tmp_path / "out", division=WHOLE), RunError)
    assert "train-000000.tar: 9 of 40 URLs failed (HTTP 404 (Not Found): 9)" in message
    assert "--max-failed=0.2" in message
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_the_command_packs_files_and_urls(server, tmp_path, capsys):
    base, _ = server
    rows = []
    for n in range(24):
        (tmp_path / f"{n}.png").write_bytes(png(image_of(n)))
        rows.append({"path": f"{n}.png", "label": f"class {n % 4}"})
    rows[5]["path"] = f"{base}/ok/5"
    path = write_csv(tmp_path / "a.csv", rows)
    parser = argparse.ArgumentParser()
    manifest_module.add_arguments(parser)
    arguments = [str(path), str(tmp_path / "out"), "--resize=10", "--processes=1"]
    arguments += ["--test-fraction=0", "--seen-per-class=0", "--shard-samples=12"]
    assert manifest_module.run(parser.parse_args(arguments)) == 0
    assert "24 samples (train 24), 4 training classes" in capsys.readouterr().out
    index = load_index(tmp_path / "out")
    reader = open_reader(index, 3)
    assert {read_image(index, reader, i).shape for i in range(24)} == {(10, 12, 3)}
    with pytest.raises(UsageError, match=r"--timeout=0\.0: too small"):
        manifest_module.run(parser.parse_args([*arguments, "--timeout=0"]))
