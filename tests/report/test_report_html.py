"""The page itself: nothing from outside is obeyed, nothing outside is asked for."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from dist_dml.report.page import Html, Section, element, escaped, page, picture, table
from dist_dml.report.page_style import STYLE
from dist_dml.report.pictures import THUMBNAIL_PIXELS, figure_bytes, new_figure, png_size, thumbnail

HOSTILE = '<script>alert(1)</script> " onerror="x" \' & \u202etxt.exe'


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def hostile_page() -> str:
    body = element(
        "div",
        element("p", HOSTILE, title=HOSTILE),
        table((HOSTILE, "b"), [(HOSTILE, HOSTILE)], caption=HOSTILE),
        picture(b"\x89PNG\r\n", HOSTILE, 3, 4),
    )
    return page(HOSTILE, element("p", HOSTILE), [Section("one", HOSTILE, body)])


def test_a_hostile_name_is_shown_and_never_becomes_a_tag_or_an_attribute() -> None:
    parsed = Parsed(hostile_page())
    assert "script" not in {tag for tag, _ in parsed.tags}
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    shown = HOSTILE.replace("\u202e", "\ufffd")
    assert [word for word in parsed.words if word == shown]
    (image,) = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert image["alt"] == shown


def test_only_markup_made_by_element_is_left_as_it_is() -> None:
    assert escaped("<b>") == "&lt;b&gt;"
    assert escaped(Html("<b>")) == "<b>"
    assert element("p", "a < b", element("b", "c")) == "<p>a &lt; b<b>c</b></p>"
    assert element("a", "x", href='"><i>') == '<a href="&quot;&gt;&lt;i&gt;">x</a>'
    assert element("td", "x", data_id="7", class_="hit") == '<td data-id="7" class="hit">x</td>'


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\u2066", "\ud800"])
def test_what_is_no_character_or_turns_the_text_is_replaced(character: str) -> None:
    shown = escaped(f"a{character}b")
    assert character not in shown
    assert shown.encode("utf-8").decode() == shown
    assert (shown[0], shown[-1]) == ("a", "b")
    assert escaped("a\tb \u00e4\u4e2d\U0001f600") == "a\tb \u00e4\u4e2d\U0001f600"


def test_a_page_names_no_address_and_its_policy_knows_its_style_by_hash() -> None:
    text = hostile_page()
    assert "http://" not in text
    assert "https://" not in text
    parsed = Parsed(text)
    sources = [a for _, a in parsed.tags for name in a if name in ("src", "href")]
    assert all((a.get("src") or a.get("href") or "").startswith(("data:", "#")) for a in sources)
    (policy,) = [
        a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "url(" not in STYLE
    assert not [a for _, a in parsed.tags if "style" in a]


def test_the_contents_lead_to_every_section() -> None:
    sections = [Section(key, key.upper(), Html("<p>x</p>")) for key in ("one", "two")]
    parsed = Parsed(page("t", Html(""), sections))
    links = [a["href"] for tag, a in parsed.tags if tag == "a"]
    assert links == ["#one", "#two"]
    assert [a["id"] for tag, a in parsed.tags if tag == "section"] == ["one", "two"]
    with pytest.raises(AssertionError):
        page("t", Html(""), [sections[0], sections[0]])


@pytest.mark.parametrize("shape", [(20, 20), (300, 200, 1), (40, 90, 3), (3, 400, 3)])
def test_a_thumbnail_keeps_the_shape_and_the_colours(shape: tuple[int, ...]) -> None:
    image = np.zeros(shape, np.uint8)
    image[:, : shape[1] // 2] = 200
    if len(shape) == 3 and shape[2] == 3:
        image[:, :, 2] = 0
    content, width, height = thumbnail(image)
    seen = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert seen.shape[:2] == (height, width)
    assert max(width, height) == min(THUMBNAIL_PIXELS, max(shape[:2]))
    assert width / height == pytest.approx(min(shape[1] / shape[0], width), rel=0.05)
    left = seen[height // 2, width // 4].astype(int)
    expected = (200, 200, 0) if len(shape) == 3 and shape[2] == 3 else (200, 200, 200)
    np.testing.assert_allclose(left, expected, atol=12)
    assert len(content) < 6000


def test_a_figure_is_a_png_of_few_colours_and_of_its_size() -> None:
    figure = new_figure(2.0, 1.0)
    figure.add_subplot().plot([0, 1], [0, 1], color="#0072b2")
    content = figure_bytes(figure)
    assert png_size(content) == (288, 144)
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) <= 192
    distance = np.abs(image.astype(int) - (0x00, 0x72, 0xB2)).sum(axis=2)
    assert distance.min() < 20, "the line has its colour"
