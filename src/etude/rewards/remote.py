"""A reward on another machine: images go out as JSON over HTTP, scores come back."""

from __future__ import annotations

import inspect
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import urllib3
from pydantic import ValidationError
from torch import Tensor
from urllib3.exceptions import HTTPError, LocationParseError

from etude.errors import EtudeError, brief, unknown
from etude.rewards.protocol import TOKEN_VARIABLE, ScoreAnswer, check_token, encode_image, explain

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that another attempt may mend."""

_LARGEST_ANSWER = 1 << 20  # bytes; the scores of a batch are a few hundred


class RemoteReward:
    """Scores of `POST url`, in batches of which several are under way at a time.

    Request: `{"images": [base64 of a PNG file, ...], "prompts": [...], "metadata": {name: [...]}}`, n of each. Answer: status 200 and
    `{"scores": [n finite numbers]}`. `etude serve-reward` is a server.

    An attempt that finds no server, gets no answer in time or one of the statuses `RETRIED` is repeated after backoff, 2 backoff, 4 backoff, ...
    seconds, without jitter. Every other mistake is an error at once. Redirects are not followed: the images, and the token, go to `url` alone.

    If the environment variable `token_env` is set, it is sent as `Authorization: Bearer`; nothing writes it anywhere.

    Args:
        url: `http://host:port/path` or `https://host/path`.
        timeout: seconds for the answer to one attempt.
        batch_size: images per request.
        concurrency: requests under way at a time.
        retries: attempts after the first.
        backoff: seconds before the first retry.
        token_env: the variable; its name begins with `ETUDE_REWARD_TOKEN`, so that no recipe can ask for another secret.

    Raises:
        EtudeError: a url or an option that cannot be used; when called, a server that fails.
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
        token_env: str = "",
    ) -> None:
        for name, value, least in (
            ("timeout", timeout, 1e-3),
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("backoff", backoff, 0),
        ):
            if not least <= value < float("inf"):
                raise EtudeError(
                    f"{name} = {value:g} of a remote reward must be a finite number of at least {least:g}."
                )
        _check_url(url)
        self.url, self.timeout, self.batch_size = url, timeout, batch_size
        self.concurrency, self.retries, self.backoff = concurrency, retries, backoff
        self._token = _token(token_env)
        self._pool = urllib3.PoolManager(maxsize=concurrency, retries=False)

    @classmethod
    def from_name(cls, name: str) -> RemoteReward:
        """From a reward's name: the url, with options where a page's fragment would be: `http://host/score#timeout=300,batch_size=4`.

        Raises:
            EtudeError: an unknown option, or one that is no number.
        """
        url, _, text = name.partition("#")
        parameters = dict(list(inspect.signature(cls).parameters.items())[1:])
        options: dict[str, Any] = {}
        for part in text.split(",") if text else []:
            key, equals, value = part.partition("=")
            if key not in parameters:
                raise unknown("option of a remote reward", key, parameters)
            if not equals:
                raise EtudeError(
                    f"option {key} of a remote reward has no value: write {url}#{key}=VALUE (and the weight, if there "
                    f"is one, after another equals sign: {url}#{key}=VALUE=1)."
                )
            kind = type(parameters[key].default)
            try:
                options[key] = kind(value)
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise EtudeError(f"{key} = '{value}' of a remote reward must be {wanted}.") from None
        return cls(url, **options)

    def load(self) -> None:
        """Finds out before a run whether anything answers at the url; what it says to a GET is its own business.

        Raises:
            EtudeError: if nothing does.
        """
        self._attempts("GET", None, threading.Event(), every_status=True)

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        images, stop = images.cpu(), threading.Event()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="remote-reward") as pool:
            futures = []
            for start in range(0, len(prompts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                columns = {name: values[batch] for name, values in metadata.items()}
                futures.append(pool.submit(self._score, images[batch], prompts[batch], columns, stop))
            try:
                scores = [score for future in futures for score in future.result()]
            except BaseException:
                stop.set()  # nobody waits for the others any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return torch.tensor(scores, dtype=torch.float32)

    def _score(
        self, images: Tensor, prompts: list[str], metadata: dict[str, Any], stop: threading.Event
    ) -> list[float]:
        message = {"images": [encode_image(image) for image in images], "prompts": prompts, "metadata": metadata}
        try:
            body = json.dumps(message, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise EtudeError(
                f"the prompts' metadata cannot be sent to {self.url} as JSON: {brief(error, 80)}."
            ) from None
        status, answer = self._attempts("POST", body, stop)
        return self._scores(status, answer, len(prompts))

    def _attempts(
        self, method: str, body: bytes | None, stop: threading.Event, every_status: bool = False
    ) -> tuple[int, bytes]:
        """Status and body of the first answer that no other attempt could mend."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt and stop.wait(self.backoff * 2 ** (attempt - 1)):
                break
            try:
                status, answer = self._request(method, body)
            except (HTTPError, OSError) as error:
                problem = f"no answer ({brief(error, 150)})"
                continue
            if every_status or status not in RETRIED:
                return status, answer
            problem = f"status {status}{self._said(answer)}"
        count = f"{self.retries + 1} attempts" if self.retries else "1 attempt"
        raise EtudeError(f"{self.url}: {problem} after {count}: check that the server runs and is reachable.")

    def _request(self, method: str, body: bytes | None) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.timeout
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        response = self._pool.request(
            method,
            self.url,
            body=body,
            headers=headers,
            redirect=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=min(10.0, self.timeout), read=self.timeout),
        )
        try:
            answer = self._read(response, deadline)
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return response.status, answer

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        """The body, of at most so many bytes and so many seconds, however slowly it drips."""
        answer = bytearray()
        while chunk := response.read1(1 << 16, decode_content=False):
            answer += chunk
            if len(answer) > _LARGEST_ANSWER:
                raise EtudeError(
                    f"{self.url}: status {response.status} with more than {_LARGEST_ANSWER} bytes; "
                    'expected 200 and {"scores": [one number per image]}.'
                )
            if time.monotonic() > deadline:
                raise TimeoutError("it is still coming")
        return bytes(answer)

    def _scores(self, status: int, answer: bytes, count: int) -> list[float]:
        expected = f'expected 200 and {{"scores": [{count} finite numbers]}}'
        if 300 <= status < 400:
            raise EtudeError(
                f"{self.url}: status {status}, a redirect, which is not followed: give the url it leads to."
            )
        if status in {401, 403}:
            raise EtudeError(
                f"{self.url}: status {status}{self._said(answer)}: set the server's token in the environment variable "
                f"{TOKEN_VARIABLE} (it {'was refused' if self._token else 'is not set'})."
            )
        if status != 200:
            raise EtudeError(f"{self.url}: status {status}{self._said(answer)}; {expected}.")
        try:
            scores = ScoreAnswer.model_validate_json(answer).scores
        except ValidationError as error:
            raise EtudeError(f"{self.url}: status 200 with {self._hidden(explain(error))[:120]}; {expected}.") from None
        if len(scores) != count:
            raise EtudeError(f"{self.url}: status 200 with {len(scores)} scores; {expected}.")
        if not torch.tensor(scores, dtype=torch.float32).isfinite().all():
            raise EtudeError(f"{self.url}: status 200 with a score beyond float32; {expected}.")
        return scores

    def _said(self, answer: bytes) -> str:
        """The server's own words on an error, if it has any: its field `error` or `detail`, else the beginning of its text."""
        text = answer[:4096].decode("utf-8", errors="replace")
        try:
            fields = json.loads(text)
            text = str(fields.get("error") or fields.get("detail") or text) if isinstance(fields, dict) else text
        except (ValueError, RecursionError):
            pass  # not JSON: shown as it is
        text = "".join(c if c.isprintable() else " " for c in self._hidden(text))
        text = re.sub(r" +", " ", text).strip().rstrip(".")
        return f" ({text[:160]})" if text else ""

    def _hidden(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


def _check_url(url: str) -> None:
    try:
        parts = urllib3.util.parse_url(url)
    except LocationParseError:
        raise EtudeError(f"remote reward '{url}' is no url: give http://host:port/path.") from None
    if parts.auth is not None:  # it would be written to config.yaml
        raise EtudeError(
            f"the url of the remote reward at '{parts.host}' holds a user name or password: leave it out, "
            f"and set a token in the environment variable {TOKEN_VARIABLE}."
        )
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise EtudeError(f"remote reward '{url}' names no host: give http://host:port/path.")


def _token(variable: str) -> str:
    """The token of that variable; without a name, of the usual one if it is set."""
    if variable and not variable.startswith(TOKEN_VARIABLE):
        raise EtudeError(
            f"token_env = '{variable}' of a remote reward: the variable's name must begin with {TOKEN_VARIABLE}, "
            "so that no recipe can send another secret of yours."
        )
    token = os.environ.get(variable or TOKEN_VARIABLE, "")
    if variable and not token:
        raise EtudeError(f"token_env = '{variable}' of a remote reward: that environment variable is not set.")
    return check_token(token, variable or TOKEN_VARIABLE)
