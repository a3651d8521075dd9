"""The report in a browser: a person's eyes, as far as a program has them."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import Launcher, finish, start_command

from dist_dml.report.page import Html
from dist_dml.report.page import page as page_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed"
    ),
]
SECTIONS = [
    "scores", "curves", "gallery", "confusions", "sizes", "map", "pairs", "radii", "certificates",
    "facts",
]  # fmt: skip


@pytest.fixture
def report(launcher: Launcher) -> Path:
    """The report of a run of three steps, as the documented command writes it."""
    finished = launcher.run("python", 1, "run.name=one", "training.max_steps=3")
    assert finished.exit_code == 0, finished.output
    code, output = finish(start_command("evaluate", str(launcher.root / "one")))
    assert code == 0, output
    path = launcher.root / "one" / "report" / "report.html"
    assert str(path) in output
    return path


class Opened:
    """A page in a headless browser: what its console said, and what it asked for."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.page = browser.new_page(viewport={"width": 1400, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def exact_cosines(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all test images and their cosines (the own one -2), by plain numpy in float64."""
    import torch

    from dist_dml.checkpoint import load_embedder_tensors
    from dist_dml.config_loading import resolve
    from dist_dml.data.loader import evaluation_batches
    from dist_dml.data.opening import open_index
    from dist_dml.evaluate import choose_checkpoint
    from dist_dml.models.embedder import build_embedder

    config = resolve(str(run / "config.yaml"), []).config
    index = open_index(config.data)
    embedder = build_embedder(config.model, config.data.image, config.run.seed, None).eval()
    embedder.load_state_dict(load_embedder_tensors(choose_checkpoint(run, "best")[0]))
    with torch.inference_mode():
        batches = evaluation_batches(index, "test", config.data, 256, 0, 1)
        rows = torch.cat([embedder(batch.images) for batch in batches]).numpy().astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    return index.select("test"), cosines


def check_gallery(page: Any, run: Path) -> None:
    """Every row shows the exact neighbours; two whose cosines differ by rounding may be swapped."""
    ids, cosines = exact_cosines(run)
    rows = page.eval_on_selector_all(
        "#gallery .row",
        "all => all.map(x => [x.dataset.query, [...x.querySelectorAll('img')].map(i => i.alt)])",
    )
    assert len(rows) == 12
    same = 0
    for query, alts in rows:
        assert alts[0].startswith(f"query: sample {query},")
        mine = cosines[np.flatnonzero(ids == int(query))[0]]
        shown = [int(re.findall(r": sample (\d+),", alt)[0]) for alt in alts[1:]]
        written = [float(re.findall(r"cosine (-?[\d.]+)", alt)[0]) for alt in alts[1:]]
        order = np.argsort(-mine)[:8]
        found = mine[np.searchsorted(ids, shown)]
        np.testing.assert_allclose(found, mine[order], atol=1e-5)
        np.testing.assert_allclose(written, found, atol=2e-4)
        same += int((np.array(shown) == ids[order]).sum())
    assert same >= 90, "nearly all of 96 are the same images, in the same order"


def test_the_report_shows_everything_asks_for_nothing_and_has_the_right_neighbours(
    report: Path, browser: Any
) -> None:
    opened = Opened(browser, report)
    page = opened.page
    assert opened.asked[0] == report.as_uri()
    assert [url for url in opened.asked[1:] if not url.startswith("data:image/")] == []
    assert page.eval_on_selector_all("main > section", "all => all.map(x => x.id)") == SECTIONS
    for key in SECTIONS:
        page.click(f"nav a[href='#{key}']")
        assert page.locator(f"#{key} h2").is_visible()
    images = page.eval_on_selector_all(
        "img", "all => all.map(x => [x.complete, x.naturalWidth, x.alt])"
    )
    assert len(images) > 50
    assert all(complete and width > 0 and alt for complete, width, alt in images)
    check_gallery(page, report.parents[1])
    for width in (1400, 390):
        page.set_viewport_size({"width": width, "height": 844})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels on a screen of {width}"
    assert opened.said == []
    assert report.stat().st_size < 3e6


def test_a_script_in_a_page_is_stopped_and_the_browser_says_so(
    tmp_path: Path, browser: Any
) -> None:
    # Silence of the console, above, is therefore no accident.
    path = tmp_path / "page.html"
    hostile = Html("<script>document.title = 'obeyed'</script><img src='https://example.org/a'>")
    path.write_text(page_of("calm", hostile, []), encoding="utf-8")
    opened = Opened(browser, path)
    opened.page.wait_for_timeout(200)
    assert opened.page.title() == "calm"
    assert len([text for text in opened.said if "Content Security Policy" in text]) >= 2
    style = opened.page.evaluate("getComputedStyle(document.querySelector('h1')).fontSize")
    assert float(style.removesuffix("px")) < 32, "the style sheet's, not the browser's 32 px"
