"""The search page and its JSON API as an ASGI application (Starlette, on which FastAPI is built).

Bodies are bounded, names that ask are checked, and nothing that a user or a data set wrote becomes
part of a page: the page is one file as it is, and shows texts as texts.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from dist_dml.data.faults import BadSample
from dist_dml.errors import RunError, UsageError
from dist_dml.search.service import NotFound, SearchService

MOST_BODY_BYTES = 2**24
"""16 MiB of an image that is searched for; what it unpacks to is bounded by the decoder."""
_DEFAULT_NEIGHBOURS = 12
_MOST_SAMPLES = 60
_Application = Callable[..., Awaitable[None]]


def page_text() -> str:
    """The page, without anything to fill in."""
    return (resources.files("dist_dml.search") / "page.html").read_text("utf-8")


def content_policy(page: str) -> str:
    """What a browser may do with the page: run its own script and ask this server, no more."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def search_app(service: SearchService, is_allowed: Callable[[str], bool]) -> _Application:
    """The application.

    Args:
        service: what answers.
        is_allowed: whether a `Host` header is one of ours (`listening.name_filter`).
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = page_text()
    policy = content_policy(page)
    # One thread searches, one reads pictures: a search does not wait for a store that is slow.
    searcher, reader = ThreadPoolExecutor(1, "search"), ThreadPoolExecutor(1, "pictures")

    async def show_page(request: Any) -> Any:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def facts(request: Any) -> Any:
        return JSONResponse(service.facts())

    async def search(request: Any) -> Any:
        k = _number(request.query_params.get("k"), "k", _DEFAULT_NEIGHBOURS)
        if request.method == "GET":
            wanted = request.query_params.get("id")
            if wanted is None:
                raise HTTPException(400, "name a gallery item with ?id=, or POST an image")
            return JSONResponse(await _in(searcher, service.search_item, wanted, k))
        body = await _body(request)
        return JSONResponse(await _in(searcher, service.search_image, body, k))

    async def sample(request: Any) -> Any:
        count = _number(request.query_params.get("count"), "count", 12)
        seed = _number(request.query_params.get("seed"), "seed", secrets.randbelow(2**31))
        if not 1 <= count <= _MOST_SAMPLES or seed < 0:
            raise HTTPException(400, f"count must be in 1..{_MOST_SAMPLES} and seed 0 or more")
        return JSONResponse({"items": service.sample(count, seed)})

    async def picture(request: Any) -> Any:
        wanted = request.query_params.get("id")
        if wanted is None:
            raise HTTPException(400, "name a gallery item with ?id=")
        data = await _in(reader, service.thumbnail, wanted)
        kind = "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def refuse(request: Any, error: Exception) -> Any:
        status, text = _refusal(error)
        return JSONResponse({"error": text}, status_code=status)

    routes = [
        Route("/", show_page),
        Route("/api/index", facts),
        Route("/api/search", search, methods=["GET", "POST"]),
        Route("/api/sample", sample),
        Route("/api/image", picture),
    ]
    kinds = (HTTPException, BadSample, NotFound, UsageError, RunError)
    handlers: dict[Any, Any] = dict.fromkeys(kinds, refuse)
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), is_allowed)


def _refusal(error: Exception) -> tuple[int, str]:
    """Status and sentence."""
    if isinstance(error, BadSample):
        return 415, f"This image cannot be searched for: {error.reason}."
    if isinstance(error, NotFound):
        return 404, _sentence(str(error))
    if isinstance(error, (UsageError, RunError)):
        return 400 if isinstance(error, UsageError) else 500, _sentence(str(error))
    status = getattr(error, "status_code", 500)
    return status, _sentence(str(getattr(error, "detail", "")) or "it cannot be answered")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _number(text: str | None, name: str, default: int) -> int:
    from starlette.exceptions import HTTPException

    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise HTTPException(400, f"{name}={text[:20]!r} is not a whole number")
    return int(text)


async def _in(executor: ThreadPoolExecutor, function: Callable[..., Any], *values: Any) -> Any:
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(executor, function, *values)


async def _body(request: Any) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    too_large = HTTPException(413, f"an image may have {MOST_BODY_BYTES // 2**20} MiB at most")
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdecimal() and int(stated[:20]) > MOST_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MOST_BODY_BYTES:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise HTTPException(400, "the image did not come to its end") from None
    if not size:
        raise HTTPException(400, "the request has no image in its body")
    return b"".join(parts)


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)


def _guarded(app: _Application, is_allowed: Callable[[str], bool]) -> _Application:
    """Answers names of ours alone, and pages of ours alone where something is sent."""
    from starlette.responses import JSONResponse

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        reason = _not_ours(scope["path"], scope["headers"], is_allowed)
        if reason:
            response = JSONResponse({"error": reason}, status_code=403)
            return await response(scope, receive, send_with_headers)
        await app(scope, receive, send_with_headers)

    return guarded


def _not_ours(
    path: str, headers: list[tuple[bytes, bytes]], is_allowed: Callable[[str], bool]
) -> str:
    """Why a request is refused; empty if it is not. Links to the page itself may be anywhere."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not is_allowed(hosts[0]):
        return "This name is not one that the search answers to; see --allowed-hosts."
    for name, value in headers:
        origin = value.decode("latin-1")
        if name == b"origin" and not is_allowed(_netloc(origin)):
            return "Pages of another origin may not ask."
        if name == b"sec-fetch-site" and origin == "cross-site" and path != "/":
            return "Pages of another site may not ask."
    return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
