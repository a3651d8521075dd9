"""One self-contained HTML page: sections, tables, pictures as data URIs; all text escaped.

A page asks nobody for anything: its content security policy allows pictures out of the page itself
and the one style sheet below, by its hash, and no script. So a class or a file with a hostile name
is shown and does nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_dml.report.page_style import STYLE

# Marks that turn the direction of all text behind them.
_TURNING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_EMPTY_TAGS = ("img", "meta", "br")


class Html(str):
    """Text that is markup already. Every other text is escaped where it enters a page."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of the page, with its place in the table of contents."""

    key: str
    """Anchor: letters and dashes."""
    title: str
    body: Html


def escaped(text: str) -> Html:
    """`text` as it is, shown and not obeyed. What is no character becomes U+FFFD."""
    if isinstance(text, Html):
        return text
    readable = text.encode("utf-8", "replace").decode("utf-8")
    if not readable.isprintable():
        readable = "".join(
            "\ufffd"
            if (unicodedata.category(c) == "Cc" and c not in "\t\n") or c in _TURNING
            else c
            for c in readable
        )
    return Html(html.escape(readable, quote=True))


def element(tag: str, *children: str, **attributes: str) -> Html:
    """`<tag name="value">children</tag>`; children and values are escaped unless they are `Html`.

    An underscore in an attribute's name stands for a dash, and one at its end for nothing:
    `class_="hit"`, `data_id="7"`.
    """
    words = [tag]
    for name, value in attributes.items():
        words.append(f'{name.rstrip("_").replace("_", "-")}="{escaped(value)}"')
    opening = f"<{' '.join(words)}>"
    if tag in _EMPTY_TAGS:
        return Html(opening)
    return Html(f"{opening}{''.join(map(escaped, children))}</{tag}>")


def joined(parts: Iterable[str]) -> Html:
    """The parts one behind the other, each escaped unless it is `Html`."""
    return Html("".join(map(escaped, parts)))


def picture(content: bytes, alt: str, width: int, height: int, class_: str = "") -> Html:
    """A PNG or JPEG inside the page, of a size in CSS pixels, with what it shows in words."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    sizes = {"width": str(width), "height": str(height), "alt": alt}
    return element("img", src=source, **sizes, **({"class_": class_} if class_ else {}))


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1, caption: str = ""
) -> Html:
    """A table that scrolls by itself where it is wider than the screen.

    Args:
        headings: of the columns.
        rows: cells; the first of each names its row.
        text_columns: how many columns are words, on the left; all others are numbers.
        caption: above it.
    """
    head = joined(_cell("th", place, cell, text_columns) for place, cell in enumerate(headings))
    lines = [
        element(
            "tr",
            joined(
                _cell("th" if place == 0 else "td", place, cell, text_columns)
                for place, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    parts = [element("caption", caption)] if caption else []
    parts += [element("thead", element("tr", head)), element("tbody", joined(lines))]
    # Whoever has no mouse scrolls it by the keyboard.
    return element("div", element("table", joined(parts)), class_="wide", tabindex="0")


def _cell(tag: str, place: int, content: str, text_columns: int) -> Html:
    return element(tag, content, **({"class_": "word"} if place < text_columns else {}))


def paragraph(text: str, class_: str = "") -> Html:
    """A paragraph; `class_="note"` is small print, `"empty"` says why there is nothing."""
    return element("p", text, **({"class_": class_} if class_ else {}))


def page(title: str, lead: Html, sections: Sequence[Section]) -> str:
    """The whole document.

    Args:
        title: of the page, and its headline.
        lead: below the headline, before the first section.
        sections: in order; their titles are the table of contents.
    """
    assert len({section.key for section in sections}) == len(sections), "two anchors of one name"
    entries = [
        element("li", element("a", section.title, href=f"#{section.key}")) for section in sections
    ]
    bodies = [
        element("section", element("h2", section.title), section.body, id=section.key)
        for section in sections
    ]
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = joined(
        (
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", title),
            element("style", Html(STYLE)),
        )
    )
    contents = element("nav", element("ul", joined(entries)), aria_label="Contents")
    top = element("header", element("h1", title), lead)
    body = element("body", top, contents, element("main", joined(bodies)))
    return f'<!DOCTYPE html>\n<html lang="en">{element("head", head)}{body}</html>\n'
