"""The search page in a browser: an image goes in, the exact neighbours are seen, all is local."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from launching import finish, kill_tree, start_command
from searched_run import FIRST, build, image_of, make_run, pack_images, png_of

from dist_dml.data.index import load_index
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.ranking import nearest
from dist_dml.retrieval.search_files import open_search_index
from dist_dml.search.query_command import load_model_of

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome here"),
]
PER_CLASS = 6


@dataclass(frozen=True)
class Served:
    """A server on an index, and the browser's page on it."""

    url: str
    index: Path
    page: Any
    complaints: list[str]
    """Errors on the page's console, and addresses asked for elsewhere."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "data").mkdir()
    make_run(folder / "run", pack_images(folder / "data", PER_CLASS))
    build(folder / "run", folder / "index")
    process = start_command("search", "serve", str(folder / "index"), "--port", "0")
    try:
        yield url_of(process), folder / "index"
    finally:
        kill_tree(process.pid)
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    """The address that the server prints when it listens."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        if found := re.match(r"search page: (http://127\.0\.0\.1:\d+/)", line):
            return found[1]
        said += line
    raise AssertionError(f"the server ended before it listened: {said}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def served(server: tuple[str, Path], browser: Any) -> Iterator[Served]:
    url, index = server
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def look(request: Any) -> None:
        if not request.url.startswith((url, "blob:" + url, "data:")):
            complaints.append(f"asked for {request.url}")

    page.on("request", look)
    page.goto(url)
    page.wait_for_selector("#start-list .card")
    yield Served(url, index, page, complaints)
    context.close()


def exact_ids(index: Path, image: bytes, k: int) -> list[str]:
    """The ids of the exact neighbours, by the function that evaluations use."""
    opened = open_search_index(index)
    model = load_model_of(opened, "")
    data = load_index(index.parent / "data")
    ids = data.select("train").astype(np.int64)
    images = [png_of(label, number) for label in range(11) for number in range(PER_CLASS)]
    gallery = Embeddings(model.embed_images(images), data.class_id[ids], ids)
    query = Embeddings(model.embed_images([image]), np.zeros(1, np.int64), np.full(1, 10**6))
    positions, _ = nearest(query, gallery, k, named_distance("cosine"))
    return [str(ids[position]) for position in positions[0]]


def shown_ids(page: Any) -> list[str]:
    return page.eval_on_selector_all(
        "#results .card", "cards => cards.map(card => card.dataset.id)"
    )


def until(page: Any, expression: str) -> None:
    """Wait for an expression; `wait_for_function` would need the policy to allow `eval`."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def drop(page: Any, image: bytes, name: str) -> None:
    """Drop a file on the page, as a person does from a folder."""
    page.evaluate(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], name, {type: "image/png"}));
            const options = {dataTransfer: files, bubbles: true, cancelable: true};
            document.body.dispatchEvent(new DragEvent("dragenter", options));
            document.body.dispatchEvent(new DragEvent("drop", options));
        }""",
        [base64.b64encode(image).decode(), name],
    )


def test_a_dropped_image_shows_the_exact_neighbours_and_the_line(served: Served) -> None:
    page, image = served.page, png_of(4, 0)
    drop(page, image, "four.png")
    page.wait_for_selector("#results .card")
    ids = shown_ids(page)
    assert ids == exact_ids(served.index, image, 12)
    # The image itself and its duplicate, which has another id.
    assert ids[:2] == [str(FIRST + 4 * PER_CLASS), str(FIRST + 4 * PER_CLASS + 1)]
    labels = page.eval_on_selector_all("#results .label", "all => all.map(one => one.textContent)")
    assert labels[:2] == ["class <b>04</b>"] * 2  # As text: no data set writes markup here.
    facts = json.loads((served.index / "search.json").read_text())
    line = page.text_content("#line-text")
    values = page.eval_on_selector_all("#results .value", "all => all.map(one => +one.textContent)")
    within = sum(value >= facts["threshold"] for value in values)
    assert f"threshold {facts['threshold']:.3f}: {within} of 12 within" in line
    assert page.is_visible("#line")
    assert len(page.query_selector_all("#near-list .card")) == within
    until(
        page,
        "[...document.querySelectorAll('#results img')].every(i => i.complete && i.naturalWidth)",
    )
    assert "Embedded in" in page.text_content("#status")
    assert served.complaints == []


def test_the_chosen_file_the_number_and_a_click_search_too(served: Served, tmp_path: Path) -> None:
    page = served.page
    cv2.imwrite(str(tmp_path / "seven.png"), image_of(7, 3))
    with page.expect_file_chooser() as chooser:
        page.focus("#choose")
        page.keyboard.press("Enter")
    chooser.value.set_files(str(tmp_path / "seven.png"))
    page.wait_for_selector("#results .card")
    assert shown_ids(page) == exact_ids(served.index, png_of(7, 3), 12)
    page.select_option("#k", "6")
    until(page, "document.querySelectorAll('#results .card').length === 6")
    other = page.query_selector_all("#results .card")[3]
    wanted = other.get_attribute("data-id")
    other.focus()
    page.keyboard.press("Space")
    until(page, f"document.querySelector('#results .card').dataset.id === '{wanted}'")
    assert served.complaints == []


def test_what_is_no_image_is_told_in_a_sentence_and_the_next_image_works(served: Served) -> None:
    page = served.page
    drop(page, b"no image at all", "notes.png")
    page.wait_for_selector("#error:not([hidden])")
    assert "This image cannot be searched for: it is not a JPEG" in page.text_content("#error")
    assert not page.is_visible("#results")
    drop(page, png_of(2, 2), "two.png")
    page.wait_for_selector("#results .card")
    assert not page.is_visible("#error")
    assert shown_ids(page) == exact_ids(served.index, png_of(2, 2), 12)
    # The browser itself reports the refusal; nothing else is on the console.
    assert [text for text in served.complaints if "415" not in text] == []


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_narrow_and_wide_windows(served: Served, width: int) -> None:
    page = served.page
    page.set_viewport_size({"width": width, "height": 800})
    drop(page, png_of(1, 2), "one.png")
    page.wait_for_selector("#results .card")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cards = [card.bounding_box() for card in page.query_selector_all("#results .card")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in cards)
    assert len({box["x"] for box in cards}) >= 2


def test_nothing_may_be_fetched_from_elsewhere(served: Served) -> None:
    failed = served.page.evaluate(
        "fetch('http://127.0.0.1:9/').then(() => '', (error) => error.name)"
    )
    assert failed == "TypeError"
    assert any("Content Security Policy" in text for text in served.complaints)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_told_to_end_ends_well(
    server: tuple[str, Path], number: signal.Signals
) -> None:
    process = start_command("search", "serve", str(server[1]), "--port", "0")
    try:
        url_of(process)
        process.send_signal(number)
        assert finish(process, 20) == (0, "")
    finally:
        kill_tree(process.pid)
