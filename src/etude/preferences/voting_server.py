"""The page on which people vote, and what it asks for: pairs, votes, undo, images.

    GET  /                 the page; behind a token, a form that asks for it
    POST /api/pairs        {rater} -> the next pairs and the progress
    POST /api/vote         {rater, pair, answer, seconds} -> the same, once the vote is on the disk;
                           further pairs are chosen after the answer
    POST /api/undo         {rater, votes} -> the same, with the withdrawn pair first; nothing is
                           withdrawn where `votes` is not the rater's number of votes, so that a
                           request whose answer was lost can be sent again
    GET  /image/DIGEST     an image of the pool

Without a token only requests under this machine's own names are answered (DNS rebinding); beyond
loopback a token is needed. Requests of pages from other origins are refused, bodies are bounded, and prompts
reach the page as text.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from etude.errors import EtudeError
from etude.preferences.pairing import Pairing
from etude.preferences.pool import Pool, VoteError
from etude.preferences.voting_desk import Desk, RefusedError
from etude.report.page import templates
from etude.rewards.remote.wire import check_token, is_loopback

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

TOKEN_VARIABLE = "ETUDE_VOTE_TOKEN"  # noqa: S105 - the name of an environment variable
LONGEST_BODY = 4096
_COOKIE = "etude-vote"
_STATIC = {"voting.css": "text/css", "voting.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # no-referrer would make the form's own origin "null"
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def build_app(
    pool: Pool,
    pairing: Pairing,
    token: str = "",
    *,
    target: int = 0,
    hosts: Collection[str] = LOOPBACK_HOSTS,
) -> Starlette:
    """The ASGI application of a pool.

    Args:
        pool: images and votes.
        pairing: the choice of pairs.
        token: the token that a visitor must give. Default: "", none.
        target: votes of one rater after which the page says that it is reached. Default: 0, none.
        hosts: names that the header `Host` may hold where there is no token. Default: those of loopback.

    Raises:
        EtudeError: the extra `serve` is not installed.
    """
    check_installed()
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
    from starlette.routing import Route

    template = templates("preferences", "report").get_template("voting.html")
    desk = Desk(pool, pairing, target)
    files = resources.files("etude.preferences")

    def guarded(
        handler: Callable[[Request], Awaitable[Response]], open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                _check_origin(request, () if token else hosts)
                if not (open_to_all or _knows(request, token)):
                    raise RefusedError(401, "this page asks for a token: open the address that you were given")
                response = await handler(request)
            except RefusedError as refused:
                response = JSONResponse({"error": refused.reason}, refused.status)
            except VoteError as error:
                response = JSONResponse({"error": str(error)}, 409)
            except EtudeError as error:
                response = JSONResponse({"error": str(error)}, 507)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return answer

    async def page(request: Request) -> Response:
        if given := request.query_params.get("token", ""):
            return let_in(given)  # the token leaves the address and the history
        inside = _knows(request, token)
        wrong = not inside and "wrong" in request.query_params
        text = template.render(inside=inside, wrong=wrong, target=target, title=desk.title)
        return HTMLResponse(text, 200 if inside else 401)

    async def enter(request: Request) -> Response:
        from urllib.parse import parse_qs

        fields = parse_qs((await _body(request, "application/x-www-form-urlencoded")).decode("utf-8", "replace"))
        return let_in(fields.get("token", [""])[0])

    def let_in(given: str) -> Response:
        right = not token or _equal(given, token)
        response = RedirectResponse("/" if right else "/?wrong", 303)
        if token and right:
            response.set_cookie(_COOKIE, token, httponly=True, samesite="lax", max_age=30 * 86400)
        return response

    def prepare() -> None:
        with suppress(EtudeError):  # which the next vote meets again, and tells
            desk.choose_ahead()

    def work(action: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            message = _message(await _body(request, "application/json"))
            return JSONResponse(await run_in_threadpool(action, message), background=BackgroundTask(prepare))

        return handler

    async def image(request: Request) -> Response:
        digest = request.path_params["digest"]
        if not await run_in_threadpool(pool.holds, digest):
            raise RefusedError(404, "there is no such image")
        data = await run_in_threadpool(pool.read_image, digest)
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _STATIC:
            raise RefusedError(404, "there is no such file")
        return Response((files / name).read_bytes(), media_type=_STATIC[name])

    return Starlette(
        routes=[
            Route("/", guarded(page, open_to_all=True)),
            Route("/enter", guarded(enter, open_to_all=True), methods=["POST"]),
            Route("/api/pairs", guarded(work(desk.pairs)), methods=["POST"]),
            Route("/api/vote", guarded(work(desk.vote)), methods=["POST"]),
            Route("/api/undo", guarded(work(desk.undo)), methods=["POST"]),
            Route("/image/{digest}", guarded(image)),
            Route("/static/{name}", guarded(static, open_to_all=True)),
        ]
    )


def voting_token(variable: str | None, host: str) -> str:
    """The token of a server on `host`, from an environment variable.

    Args:
        variable: name of the variable. None: ETUDE_VOTE_TOKEN, which need not be set on loopback.
        host: address to listen on.

    Raises:
        EtudeError: the named variable is not set, there is none beyond loopback, or no header can carry it.
    """
    token = os.environ.get(variable or TOKEN_VARIABLE, "")
    if variable and not token:
        raise EtudeError(f"--token-env {variable}: that environment variable is not set.")
    if not token and not is_loopback(host):
        raise EtudeError(
            f"--host {host} lets other machines in, and there is no token: set one in the environment variable "
            f"{TOKEN_VARIABLE}, or name another by --token-env."
        )
    return check_token(token, variable or TOKEN_VARIABLE)


def check_installed() -> None:
    """Refuse to serve without the extra.

    Raises:
        EtudeError: starlette or uvicorn is missing.
    """
    for module in ("starlette", "uvicorn"):
        if find_spec(module) is None:
            raise EtudeError(f"the voting page needs {module}: pip install 'etude[serve]'.")


def _message(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise RefusedError(400, "send a JSON object")
    return message


async def _body(request: Request, kind: str) -> bytes:
    from starlette.requests import ClientDisconnect

    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise RefusedError(415, f"send Content-Type: {kind}")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > LONGEST_BODY:
                raise RefusedError(413, f"a request has at most {LONGEST_BODY} bytes")
    except ClientDisconnect:
        raise RefusedError(400, "the request ended early") from None
    return bytes(body)


def _check_origin(request: Request, hosts: Collection[str]) -> None:
    """Refuses other names of this machine, and requests that a page of another origin sends."""
    host = request.headers.get("host", "").lower()
    name = host.removeprefix("[").partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if hosts and name not in hosts:
        raise RefusedError(421, "this server answers to the name of this machine only: use 127.0.0.1 or localhost")
    origin = request.headers.get("origin")
    foreign = origin is not None and re.sub(r"^https?://", "", origin.lower()) != host
    foreign = foreign or request.headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}
    if foreign and (request.method, request.url.path) != ("GET", "/"):  # a link from elsewhere may open the page
        raise RefusedError(403, "a page from another origin may not vote here")


def _knows(request: Request, token: str) -> bool:
    if not token:
        return True
    kind, _, bearer = request.headers.get("authorization", "").partition(" ")
    return _equal(request.cookies.get(_COOKIE, ""), token) or (
        kind.lower() == "bearer" and _equal(bearer.strip(), token)
    )


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
