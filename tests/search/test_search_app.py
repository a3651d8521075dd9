"""The search page's API without a network: a real checkpoint, index and data set."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from searched_run import FIRST, build, image_of, make_run, pack_images, png_of
from stored_checkpoint import NUM_CLASSES

from dist_dml.errors import UsageError
from dist_dml.listening import name_filter
from dist_dml.retrieval.search_files import open_search_index
from dist_dml.search import app as app_module
from dist_dml.search.app import content_policy, page_text, search_app
from dist_dml.search.query_command import load_model_of
from dist_dml.search.service import NotFound, SearchService, images_of

OURS = "127.0.0.1:8765"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(app: Any, address: str, body: bytes | list[bytes] | None = None, **headers: str) -> Answer:
    """GET, or POST of a body in parts."""
    path, _, query = address.partition("?")
    parts = [body] if isinstance(body, bytes) else body or []
    named = {"host": OURS, **{name.replace("_", "-"): text for name, text in headers.items()}}
    scope = {
        "type": "http", "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8765),
        "method": "GET" if body is None else "POST", "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), text.encode()) for name, text in named.items() if text],
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    if body is None:
        parts = [b""]
    asyncio.run(app(scope, receive, send))
    start = sent[0]
    found = {name.decode(): text.decode() for name, text in start["headers"]}
    return Answer(start["status"], found, b"".join(m.get("body", b"") for m in sent[1:]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run and an index of its training images."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "data").mkdir()
    index = pack_images(folder / "data")
    make_run(folder / "run", index)
    build(folder / "run", folder / "index")
    return folder


@pytest.fixture(scope="module")
def service(place: Path) -> SearchService:
    opened = open_search_index(place / "index")
    model = load_model_of(opened, "")
    data, reason = images_of(opened, model, "")
    assert (data is None, reason) == (False, "")
    return SearchService(opened, model, data)


@pytest.fixture(scope="module")
def app(service: SearchService) -> Any:
    return search_app(service, name_filter([], 8765))


def test_an_image_of_the_gallery_finds_itself_and_its_duplicate_first(app) -> None:
    answer = ask(app, "/api/search?k=7", png_of(4, 0))
    assert answer.status == 200
    found = answer.json["neighbours"]
    # Images 0 and 1 of a class are equal, and so are their embeddings: by id.
    assert [one["id"] for one in found[:2]] == [FIRST + 16, FIRST + 17]
    assert [one["rank"] for one in found] == list(range(1, 8))
    assert found[0]["label"] == "class <b>04</b>"
    assert found[0]["value"] == pytest.approx(1, abs=1e-5)
    values = [one["value"] for one in found]
    assert values == sorted(values, reverse=True)
    assert [one["within"] for one in found] == [v >= answer.json["threshold"] for v in values]
    assert all(one["has_image"] for one in found)


def test_a_gallery_item_is_searched_by_its_own_picture(app) -> None:
    by_id = ask(app, f"/api/search?k=3&id={FIRST + 20}").json
    by_image = ask(app, "/api/search?k=3", png_of(5, 0)).json
    assert by_id["neighbours"] == by_image["neighbours"]


def test_k_beyond_the_gallery_gives_the_whole_gallery(app) -> None:
    found = ask(app, "/api/search?k=200", png_of(1, 2)).json["neighbours"]
    assert len(found) == 4 * NUM_CLASSES
    assert len({one["id"] for one in found}) == 4 * NUM_CLASSES


def test_the_body_may_come_in_parts(app) -> None:
    whole = png_of(2, 3)
    parts = ask(app, "/api/search", [whole[:10], whole[10:50], whole[50:]])
    assert parts.json["neighbours"] == ask(app, "/api/search", whole).json["neighbours"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of 70 bytes that states a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"not an image", 415, "it is not a JPEG, PNG or WebP image"),
        (b"GIF89a" + bytes(50), 415, "it is not a JPEG, PNG or WebP image"),
        (png_of(0, 0)[:200], 415, "This image cannot be searched for"),
        (bomb(60_000, 60_000), 415, "60000 x 60000 pixels exceed the limit"),
        (b"", 400, "no image in its body"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(app, body, status, says) -> None:
    answer = ask(app, "/api/search", body)
    assert answer.status == status
    assert says in answer.json["error"]
    assert answer.json["error"][0].isupper()
    assert answer.json["error"].endswith(".")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(app, monkeypatch) -> None:
    monkeypatch.setattr(app_module, "MOST_BODY_BYTES", 2**20)
    stated = ask(app, "/api/search", png_of(0, 0), content_length=str(2**20 + 1))
    assert (stated.status, stated.json["error"]) == (413, "An image may have 1 MiB at most.")
    # Whatever it says of itself; parts are handed out as they are asked for.
    parts = [bytes(2**18)] * 100
    lying = ask(app, "/api/search", parts, content_length="5")
    assert lying.status == 413
    assert len(parts) == 95
    assert ask(app, "/api/search", png_of(0, 0)).status == 200


@pytest.mark.parametrize(
    ("address", "status", "says"),
    [
        ("/api/search?id=999999", 404, "no item with the id 999999"),
        ("/api/search?id=x", 404, "no item with the id x"),
        ("/api/search", 400, "name a gallery item"),
        (f"/api/search?id={FIRST}&k=0", 400, "k=0 is outside 1..200"),
        (f"/api/search?id={FIRST}&k=201", 400, "k=201 is outside 1..200"),
        ("/api/search?id=1&k=-1", 400, "is not a whole number"),
        ("/api/image?id=999999", 404, "no item with the id"),
        ("/api/image?id=../../etc/passwd", 404, "no item with the id"),
        # In the data set, and not in the index, which holds the training images.
        (f"/api/image?id={FIRST - 1}", 404, "no item with the id"),
        ("/api/image", 400, "name a gallery item"),
        ("/api/sample?count=0", 400, "count must be in"),
        ("/api/sample?count=61", 400, "count must be in"),
        ("/api/none", 404, "Not Found"),
        ("/page.html", 404, "Not Found"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(app, address, status, says) -> None:
    answer = ask(app, address)
    assert answer.status == status
    assert says.lower() in answer.json["error"].lower()


def test_thumbnails_are_the_stored_pictures(app, service) -> None:
    answer = ask(app, f"/api/image?id={FIRST + 13}")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    pixels = cv2.imdecode(np.frombuffer(answer.body, np.uint8), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(pixels, image_of(3, 1))
    with pytest.raises(NotFound):
        service.thumbnail("nobody")


def test_samples_are_items_of_the_gallery(app) -> None:
    first = ask(app, "/api/sample?count=5&seed=3").json["items"]
    assert first == ask(app, "/api/sample?count=5&seed=3").json["items"]
    assert first != ask(app, "/api/sample?count=5&seed=4").json["items"]
    assert len({one["id"] for one in first}) == 5
    for one in first:
        assert one["label"] == f"class <b>{(one['id'] - FIRST) // 4:02d}</b>"


def test_large_pictures_are_sent_small(tmp_path: Path) -> None:
    from dist_dml.data.index_command import build_index
    from dist_dml.data.shards import write_shard

    photo = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    photo = cv2.resize(photo, (1200, 600))
    jpeg = cv2.imencode(".jpg", photo)[1].tobytes()
    write_shard(tmp_path / "train-000000.tar", [{"__key__": "a", "jpg": jpeg, "cls": b"x"}])
    index = build_index(tmp_path)
    make_run(tmp_path / "run", index, "evaluation.protocols=[{name: known, query: train}]")
    build(tmp_path / "run", tmp_path / "index")
    opened = open_search_index(tmp_path / "index")
    model = load_model_of(opened, "")
    data, _ = images_of(opened, model, "")
    sent = SearchService(opened, model, data).thumbnail("0")
    assert sent[:2] == b"\xff\xd8"
    small = cv2.imdecode(np.frombuffer(sent, np.uint8), cv2.IMREAD_COLOR)
    assert small.shape == (112, 224, 3)
    expected = cv2.resize(photo, (224, 112), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - expected).mean() < 8


def test_without_its_images_the_gallery_is_searched_all_the_same(place: Path, tmp_path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "index", tmp_path / "index")
    opened = open_search_index(tmp_path / "index")
    model = load_model_of(opened, "")
    data, reason = images_of(opened, model, "")
    assert data is None
    assert str(tmp_path / "data") in reason
    alone = search_app(SearchService(opened, model, None), name_filter([], 8765))
    assert ask(alone, "/api/index").json["has_images"] is False
    assert ask(alone, "/api/search?k=1", png_of(4, 2)).json["neighbours"][0]["id"] == FIRST + 18
    assert ask(alone, "/api/sample").json["items"] == []
    refused = ask(alone, f"/api/image?id={FIRST + 13}")
    assert (refused.status, "no picture" in refused.json["error"]) == (404, True)


def test_another_data_set_than_the_galleries_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    pack_images(tmp_path / "other", per_class=3)
    opened = open_search_index(place / "index")
    with pytest.raises(UsageError, match="is another data set than the index was built of"):
        images_of(opened, load_model_of(opened, ""), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("localhost:8765", 200),
        ("LOCALHOST", 200),
        ("[::1]:8765", 200),
        ("127.0.0.1:80", 200),  # Of any port, as `ssh -L` makes one of its own.
        ("evil.example", 403),
        ("evil.example:8765", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8765", 403),
        ("192.168.0.7:8765", 403),
        ("", 403),
    ],
)
def test_requests_under_foreign_names_get_nothing(app, host: str, status: int) -> None:
    for address in ("/", "/api/index", f"/api/image?id={FIRST + 1}"):
        answer = ask(app, address, host=host)
        assert answer.status == status
        assert (b"may ask" in answer.body or b"answers to" in answer.body) == (status == 403)


def test_names_that_were_listed_may_ask(service) -> None:
    listed = search_app(service, name_filter(["search.example.org", "here:99"], 8765))
    for host in ("search.example.org", "Search.Example.org:8765", "here:99", "localhost:1"):
        assert ask(listed, "/api/index", host=host).status == 200, host
    for host in ("search.example.org:80", "here", "here:8765", "a.search.example.org"):
        assert ask(listed, "/api/index", host=host).status == 403, host


def test_pages_of_other_origins_may_not_ask(app) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "file://"):
        assert ask(app, "/api/search", png_of(0, 0), origin=origin).status == 403, origin
    assert ask(app, "/api/search", png_of(0, 0), origin=f"http://{OURS}").status == 200
    assert ask(app, f"/api/image?id={FIRST}", sec_fetch_site="cross-site").status == 403
    assert ask(app, "/", sec_fetch_site="cross-site").status == 200  # A link to the page.


def test_the_page_may_fetch_nothing_from_elsewhere(app) -> None:
    page = ask(app, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy == content_policy(page_text())
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    text = page.body.decode()
    assert "http://" not in text
    assert "https://" not in text
    # What a data set calls its classes is set as text, never as markup.
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text
    for header, value in (("x-content-type-options", "nosniff"), ("x-frame-options", "DENY")):
        assert ask(app, "/api/index").headers[header] == value
