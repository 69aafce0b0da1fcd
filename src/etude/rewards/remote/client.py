"""A reward on another machine: images go out as JSON over HTTP, scores come back."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import ssl
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import httpx2
import torch
from pydantic import ValidationError
from torch import Tensor

from etude.errors import EtudeError, brief, unknown
from etude.rewards.background import in_event_loop
from etude.rewards.remote.wire import SERVED, ScoreAnswer, encode_image, explain, token_for, token_variables

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes after which a request is repeated."""
Client = httpx2.AsyncClient
Answer = tuple[int, bytes]
Metadata = dict[str, Any]
T = TypeVar("T")
_LARGEST_ANSWER = 1 << 20  # bytes; the scores of a batch are a few hundred
_LEAST = {"timeout": 1e-3, "batch_size": 1, "concurrency": 1, "retries": 0, "backoff": 0, "whole_groups": 0}


class RemoteReward:
    """A reward behind `POST url`, which gets the images in batches, several at a time.

    Request and answer are `etude.rewards.remote.wire.ScoreRequest` and `ScoreAnswer`; `etude
    serve-reward` is a server. The token of the url's host (`token_for`) is sent as `Authorization:
    Bearer`, and is never written anywhere.

    An attempt is repeated if it finds no server, gets no answer in time, or gets a status in
    `RETRIED`. The waits are backoff, 2 backoff, 4 backoff, ... seconds, without jitter. Any other
    failure is an error at once, and cancels the other requests. Redirects are not followed: the
    images and the token go to `url` alone.

    Args:
        url: `http://host:port/path` or `https://host/path`.
        timeout: seconds for one attempt, from the look-up of the host to the answer's last byte.
        batch_size: images per request.
        concurrency: number of requests at a time, over all calls.
        retries: attempts after the first.
        backoff: seconds before the first retry.
        whole_groups: 1 if the server's reward compares the images of a group. A request then holds
            whole groups, as many as `batch_size` has room for and at least one, and says which
            image belongs to which group.

    Raises:
        EtudeError: the url or an option is invalid; in a call, the server fails.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        batch_size: int = 8,
        concurrency: int = 4,
        retries: int = 4,
        backoff: float = 1.0,
        whole_groups: int = 0,
    ) -> None:
        self.url, self.timeout, self.batch_size, self.concurrency = url, timeout, batch_size, concurrency
        self.retries, self.backoff, self.whole_groups = retries, backoff, whole_groups
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):
                remedy = f"must be a finite number of at least {least:g}"
                raise EtudeError(f"{name} = {value:g} of a remote reward {remedy}.")
        self._address = _parse_url(url)
        self._token = token_for(self._address.raw_host.decode("ascii"), self._address.port)
        self._verify = self._address.scheme == "https" and ssl.create_default_context()
        self._turns: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self.served: str | None = None  # the newest answer's header SERVED; None from a server that sends none

    @classmethod
    def from_name(cls, name: str) -> RemoteReward:
        """Builds the reward from a url with options, `http://host/score#timeout=300,batch_size=4`."""
        url, _, text = name.partition("#")
        parameters = dict(list(inspect.signature(cls).parameters.items())[1:])
        options: dict[str, Any] = {}
        for part in text.split(",") if text else []:
            key, equals, value = part.partition("=")
            if key not in parameters:
                raise unknown("option of a remote reward", key, parameters)
            if not equals:
                weighted = f"(and the weight, if there is one, after another equals sign: {url}#{key}=VALUE=1)"
                raise EtudeError(f"option {key} of a remote reward has no value: write {url}#{key}=VALUE {weighted}.")
            if key in options:
                raise EtudeError(f"option {key} of a remote reward stands twice in '{name}': leave one out.")
            kind = type(parameters[key].default)
            try:
                options[key] = kind(value)
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise EtudeError(f"{key} = '{value}' of a remote reward must be {wanted}.") from None
        return cls(url, **options)

    def load(self) -> None:
        """Checks that a server answers a GET at the url, with any status."""

        async def greet() -> None:
            async with self._client() as client:
                await self._attempts(client, "GET", None, every_status=True)

        _wait(in_event_loop(greet()))

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        return _wait(self.submit(images, prompts, **metadata))

    def submit(self, images: Tensor, prompts: list[str], **metadata: Any) -> Future[Tensor]:
        """Sends the requests and returns a future of the scores, float32 `[n]`, at once.

        Cancelling the future ends the requests. The images must not change meanwhile.
        """
        return in_event_loop(self._all(images.cpu(), prompts, metadata))

    async def _all(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        batches = self._batches(len(prompts), metadata.get("groups") if self.whole_groups else None)
        async with self._client() as client:
            tasks: list[asyncio.Future[list[float]]] = []
            for rows in batches:
                columns = {name: [values[row] for row in rows] for name, values in metadata.items()}
                own = [prompts[row] for row in rows]
                tasks.append(asyncio.ensure_future(self._batch(client, images[rows], own, columns)))
            answers = await all_or_none(tasks)
        scores = torch.empty(len(prompts), dtype=torch.float32)
        for rows, answer in zip(batches, answers, strict=True):
            scores[rows] = torch.tensor(answer, dtype=torch.float32)
        return scores

    def _batches(self, count: int, groups: list[int] | None) -> list[list[int]]:
        """The rows of each request: consecutive rows, or those of whole groups."""
        if groups is None:
            return [list(range(count))[start : start + self.batch_size] for start in range(0, count, self.batch_size)]
        batches: list[list[int]] = []
        for group in dict.fromkeys(groups):
            rows = [row for row, other in enumerate(groups) if other == group]
            if batches and len(batches[-1]) + len(rows) <= self.batch_size:
                batches[-1] += rows
            else:
                batches.append(rows)
        return batches

    def _turn(self) -> asyncio.Semaphore:
        """The semaphore of the running loop, which lets `concurrency` requests pass at a time."""
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, asyncio.Semaphore(self.concurrency)
        return self._turns[1]

    async def _batch(self, client: Client, images: Tensor, prompts: list[str], metadata: Metadata) -> list[float]:
        async with self._turn():
            body = await asyncio.to_thread(self._body, images, prompts, metadata)
            status, answer = await self._attempts(client, "POST", body)
        return self._scores(status, answer, len(prompts))

    def _body(self, images: Tensor, prompts: list[str], metadata: Metadata) -> bytes:
        columns = dict(metadata)
        groups = {"groups": columns.pop("groups")} if self.whole_groups else {}
        encoded = [encode_image(image) for image in images]
        message = {"images": encoded, "prompts": prompts, "metadata": columns, **groups}
        try:
            return json.dumps(message, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            problem = brief(error, 80)
            raise EtudeError(f"the prompts' metadata cannot be sent to {self.url} as JSON: {problem}.") from None

    def _client(self) -> Client:
        """A client for one call; a longer one would keep connections that the server closes."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        # The attempt as a whole has a deadline. No proxy and no credentials come from the environment.
        return Client(headers=headers, verify=self._verify, timeout=None, trust_env=False)

    async def _attempts(self, client: Client, method: str, body: bytes | None, every_status: bool = False) -> Answer:
        """The first answer with a status that is not in `RETRIED`, or with any (`every_status`)."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                status, answer = await asyncio.wait_for(self._request(client, method, body), self.timeout)
                if every_status or status not in RETRIED:
                    return status, answer
                problem = f"status {status}{self._quote(answer)}"
            except TimeoutError:
                problem = f"no answer (it took longer than {self.timeout:g} s)"
            except (httpx2.HTTPError, OSError) as error:
                problem = f"no answer ({_reason(error)})"
        count = f"{self.retries + 1} attempts" if self.retries else "1 attempt"
        raise EtudeError(f"{self.url}: {problem} after {count}: check that the server runs and is reachable.")

    async def _request(self, client: Client, method: str, body: bytes | None) -> Answer:
        answer = bytearray()
        async with client.stream(method, self._address, content=body, follow_redirects=False) as response:
            place, self.served = f"{self.url}: status {response.status_code}", response.headers.get(SERVED)
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > _LARGEST_ANSWER:
                    expected = 'expected 200 and {"scores": [one number per image]}'
                    raise EtudeError(f"{place} with more than {_LARGEST_ANSWER} bytes; {expected}.")
        return response.status_code, bytes(answer)

    def _scores(self, status: int, answer: bytes, count: int) -> list[float]:
        place, expected = f"{self.url}: status {status}", f'expected 200 and {{"scores": [{count} finite numbers]}}'
        self._check(status, answer, expected)
        try:
            scores = ScoreAnswer.model_validate_json(answer).scores
        except ValidationError as error:
            raise EtudeError(f"{place} with {self._hide_token(explain(error))[:120]}; {expected}.") from None
        if len(scores) != count:
            raise EtudeError(f"{place} with {len(scores)} scores; {expected}.")
        if not torch.tensor(scores, dtype=torch.float32).isfinite().all():
            raise EtudeError(f"{place} with a score beyond float32; {expected}.")
        return scores

    def _check(self, status: int, answer: bytes, expected: str) -> None:
        """Raises the error of an answer whose status is not 200."""
        place = f"{self.url}: status {status}"
        if 300 <= status < 400:
            raise EtudeError(f"{place}, a redirect, which is not followed: give the url it leads to.")
        if status in {401, 403}:
            variables = token_variables(self._address.raw_host.decode("ascii"), None)
            remedy = "tokens are sent to hosts of letters, digits, hyphens and dots only: give it such a name"
            if variables:
                state = "was refused" if self._token else "is not set"
                remedy = f"set the server's token in the environment variable {variables[-1]} (it {state})"
            raise EtudeError(f"{place}{self._quote(answer)}: {remedy}.")
        if status != 200:
            raise EtudeError(f"{place}{self._quote(answer)}; {expected}.")

    def _quote(self, answer: bytes) -> str:
        """The server's words on an error: its field `error` or `detail`, else the start of its text."""
        text = answer[:4096].decode("utf-8", errors="replace")
        with suppress(ValueError, RecursionError):  # not JSON: the text itself is shown
            fields = json.loads(text)
            text = str(fields.get("error") or fields.get("detail") or text) if isinstance(fields, dict) else text
        text = "".join(c if c.isprintable() else " " for c in self._hide_token(text))
        text = re.sub(r" +", " ", text).strip().rstrip(".")
        return f" ({text[:160]})" if text else ""

    def _hide_token(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


async def all_or_none(tasks: list[asyncio.Future[T]]) -> list[T]:
    """The results of all tasks; after a failure the others are cancelled, since their answers are not needed."""
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _wait(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BaseException:  # Ctrl-C in this thread must end the requests in the other
        future.cancel()
        raise


def _parse_url(url: str) -> httpx2.URL:
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise EtudeError(f"remote reward '{url}' is no url: give http://host:port/path.") from None
    host = parts.raw_host.decode("ascii")
    if parts.userinfo:  # the url is written to config.yaml
        remedy = f"set a token in an environment variable ({', '.join(token_variables(host, None)[-1:])})"
        problem = f"the url of the remote reward at '{host}' holds a user name or password"
        raise EtudeError(f"{problem}: leave it out, and {remedy}.")
    if parts.scheme not in {"http", "https"} or not host:
        raise EtudeError(f"remote reward '{url}' names no host: give http://host:port/path.")
    if parts.port is not None and not 0 < parts.port < 1 << 16:
        raise EtudeError(f"remote reward '{url}' is no url: there is no port {parts.port}.")
    return parts


def _reason(error: BaseException) -> str:
    """The operating system's message at the root of the library's errors, else the error's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return brief(error, 150) or type(error).__name__
