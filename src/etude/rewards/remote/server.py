"""`etude serve-reward`: any reward behind `POST /score`, for trainers on other machines.

The server is small on purpose: one reward, one batch at a time, JSON. By default it listens on
loopback; on any other address it asks for a token. Images are unpacked only after their size is
known. At most `MAX_BODIES` requests are held in memory; the others wait unread.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
from collections.abc import Collection
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from etude.errors import EtudeError
from etude.files import fingerprints
from etude.rewards.background import LOCAL
from etude.rewards.remote.wire import (
    SERVED,
    TOKEN_VARIABLE,
    ScoreRequest,
    check_token,
    decode_images,
    explain,
    is_loopback,
)
from etude.rewards.reward import files, get
from etude.rewards.scoring import revisions, score_one

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse

MAX_REQUEST_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
"""Pixels of all images of a request, at most: 64 images of 1024 x 1024, 192 MiB unpacked."""
MAX_BODIES = 4
"""Requests whose bodies are read, or wait for their turn, at a time."""
_READ_SECONDS = 60  # for the body of a request
_MAX_CONNECTIONS = 64
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def build_app(
    name: str,
    token: str = "",
    *,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    max_pixels: int = MAX_PIXELS,
    hosts: Collection[str] = _LOOPBACK_HOSTS,
) -> Starlette:
    """The ASGI application: `POST /score` and `GET /health`.

    Args:
        name: name of the reward, as in `etude.rewards.get`. Its weights are read at once.
        token: the token that `Authorization: Bearer` must hold, if any.
        max_request_bytes: length of a request, at most; a longer one is refused while it arrives.
        max_pixels: pixels of all images of one request, at most.
        hosts: names without a port that the header `Host` may hold; empty: any name. A page in a
            browser on this machine could otherwise reach the server under the page's own name,
            which its owner has pointed at 127.0.0.1 (DNS rebinding). Default: those of loopback.

    Raises:
        EtudeError: the reward cannot be built, or the extra `serve` is not installed.
    """
    for module in ("starlette", "uvicorn"):
        if find_spec(module) is None:
            raise EtudeError(f"a reward server needs {module}: pip install 'etude[serve]'.")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    scorer = _Scorer(name, token, max_request_bytes, max_pixels)
    served = json.dumps([name, fingerprints(files(name)), revisions([name])], sort_keys=True)

    async def score(request: Request) -> JSONResponse:
        _check_host(request, hosts)
        return JSONResponse({"scores": await scorer.answer(request)})

    async def health(request: Request) -> JSONResponse:
        _check_host(request, hosts)
        return JSONResponse({"status": "ok"})

    async def refuse(request: Request, refused: Any) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
        return JSONResponse({"error": str(refused)}, refused.status, headers)

    routes = [Route("/score", score, methods=["POST"]), Route("/health", health)]
    return Starlette(
        routes=routes, middleware=[Middleware(_Signed, served)], exception_handlers={_RefusedError: refuse}
    )


def listen(host: str, port: int, token: str = "", insecure: bool = False) -> socket.socket:
    """A listening socket; port 0 takes a free one. Beyond this machine it needs a token or `insecure`."""
    if not (token or insecure or is_loopback(host)):
        raise EtudeError(
            f"--host {host} lets other machines in, and there is no token: set one in the environment variable "
            f"{TOKEN_VARIABLE} (or name another by --token-env), or give --insecure."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_MAX_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise EtudeError(f"--host {host} --port {port} cannot be listened on ({reason}): give another.") from None


def make_server(app: Starlette) -> uvicorn.Server:
    """A server, whose `run(sockets=[listen(...)])` ends by Ctrl-C or once its `should_exit` is set."""
    import uvicorn

    off: dict[str, Any] = {"access_log": False, "server_header": False, "proxy_headers": False, "ws": "none"}
    bounds: dict[str, Any] = {"limit_concurrency": _MAX_CONNECTIONS, "timeout_graceful_shutdown": 10}
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", **off, **bounds))


def server_token(variable: str | None) -> str:
    """The token in an environment variable; None stands for ETUDE_REWARD_TOKEN, which may be unset."""
    token = os.environ.get(variable or TOKEN_VARIABLE, "")
    if variable and not token:
        raise EtudeError(f"--token-env {variable}: that environment variable is not set.")
    return check_token(token, variable or TOKEN_VARIABLE)


def address(sock: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    host, port, *_ = sock.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def prepare(
    name: str, host: str, port: int, token: str = "", *, insecure: bool = False, max_request_bytes: int
) -> tuple[uvicorn.Server, socket.socket]:
    """The server of a reward (`build_app`) and its socket, which listens before the weights are read."""
    sock = listen(host, port, token, insecure)
    try:
        hosts = {host.lower(), *_LOOPBACK_HOSTS} if is_loopback(host) else ()
        return make_server(build_app(name, token, max_request_bytes=max_request_bytes, hosts=hosts)), sock
    except BaseException:
        sock.close()
        raise


class _Signed:
    """Middleware that adds the header `SERVED` to every answer."""

    def __init__(self, app: Any, served: str) -> None:
        self.app = app
        self.header = SERVED.lower().encode(), hashlib.sha256(served.encode()).hexdigest().encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def signed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self.header]
            await send(message)

        await self.app(scope, receive, signed)


class _Scorer:
    def __init__(self, name: str, token: str, max_request_bytes: int, max_pixels: int) -> None:
        import anyio

        self.name, self.reward = name, LOCAL.call(get, name)
        if hasattr(self.reward, "load"):
            LOCAL.call(self.reward.load)
        self.token, self.max_request_bytes, self.max_pixels = token.encode(), max_request_bytes, max_pixels
        # Memory is bounded by MAX_BODIES bodies and one batch at a time.
        self.bodies, self.turn = anyio.Semaphore(MAX_BODIES), anyio.Lock()

    async def answer(self, request: Request) -> list[float]:
        from starlette.concurrency import run_in_threadpool

        self._authorise(request)
        async with self.bodies:
            body = await self._body(request)
            async with self.turn:
                return await run_in_threadpool(self._score, body)

    def _authorise(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(token.strip().encode("latin-1", "replace"), self.token)
        if self.token and not (kind.lower() == "bearer" and right):
            raise _RefusedError(401, "this server asks for the right Authorization: Bearer token")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page in a browser on this machine cannot send this type to another origin.
            raise _RefusedError(415, "send Content-Type: application/json")

    async def _body(self, request: Request) -> bytes:
        import anyio
        from starlette.requests import ClientDisconnect

        longest = self.max_request_bytes
        too_long = _RefusedError(413, f"the request is longer than {longest} bytes: send fewer images in one")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > longest:
            raise too_long
        body = bytearray()
        try:
            with anyio.fail_after(_READ_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > longest:
                        raise too_long
        except TimeoutError:
            raise _RefusedError(408, f"the request did not arrive within {_READ_SECONDS} s") from None
        except ClientDisconnect:
            raise _RefusedError(400, "the request ended early") from None
        return bytes(body)

    def _score(self, body: bytes) -> list[float]:
        try:
            message = ScoreRequest.model_validate_json(body)
            images = decode_images(message.images, self.max_pixels)
        except (ValidationError, EtudeError) as error:
            raise _RefusedError(400, explain(error) if isinstance(error, ValidationError) else str(error)) from None
        try:
            prompts, metadata, groups = message.prompts, message.metadata, message.groups
            if groups is None and getattr(self.reward, "whole_groups", False):
                problem = f"the reward '{self.name}' compares the images of a group and was told no groups"
                raise EtudeError(f"{problem}: name it with #whole_groups=1 after the url.")
            score = partial(score_one, self.name, self.reward, images, prompts, metadata, groups=groups)
            scores = LOCAL.call(score)
        except EtudeError as error:
            raise _RefusedError(422, str(error)) from error
        return list(scores.tolist())


def _check_host(request: Request, hosts: Collection[str]) -> None:
    """Refuses a request whose `Host` is not one of `hosts` (DNS rebinding)."""
    host = request.headers.get("host", "").lower()
    name = host.removeprefix("[").partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if hosts and name not in hosts:
        remedy = "use 127.0.0.1 or localhost, or serve with --host"
        raise _RefusedError(421, f"this server answers to the name of this machine only: {remedy}")
