"""A reward behind HTTP: the client, the server, and what either makes of the other's mistakes."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest
import torch
from PIL import Image

from etude.config import parse_config
from etude.errors import EtudeError
from etude.rewards import WeightedRewards, get, register, score_one
from etude.rewards.remote.client import RemoteReward
from etude.rewards.remote.server import address, build_app, listen, make_server
from etude.rewards.remote.wire import ScoreRequest, decode_images, encode_image
from etude.training.trainer import Trainer
from support.small_runs import outcome
from support.tiny import save_stable_diffusion

IMAGES = torch.randint(0, 256, (5, 3, 12, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "Łódź 🦊", "", "a cat"]
TOKEN = "a-secret-token"


@contextmanager
def serving(name: str, **options: Any) -> Iterator[str]:
    """The url of a real server; its socket listens before it starts, so nobody has to wait for it."""
    sock = listen("127.0.0.1", 0)
    server = make_server(build_app(name, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield address(sock)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()


class Scripted(BaseHTTPRequestHandler):
    """Answers each POST with what the test's script returns: (status, headers, body)."""

    protocol_version = "HTTP/1.1"
    script: ClassVar[Callable[[dict[str, Any], int], tuple[int, dict[str, str], bytes]]]
    seen: ClassVar[list[dict[str, Any]]]
    headers_seen: ClassVar[list[dict[str, str]]]
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append(message)
            self.headers_seen.append(dict(self.headers))
            number = len(self.seen)
        status, headers, body = type(self).script(message, number)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(501)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def scripted(script: Callable[[dict[str, Any], int], tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, Any]]:
    handler = type("Handler", (Scripted,), {"script": staticmethod(script), "seen": [], "headers_seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ok(scores: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"scores": scores}).encode()


@pytest.fixture
def checksum() -> str:
    @register("checksum")
    def checksum(images, prompts, offset=None, **metadata):
        """A number that any changed byte, order, prompt or entry changes."""
        weights = torch.arange(1, images[0].numel() + 1, dtype=torch.float64)
        total = (images.double().flatten(1) * weights).sum(1) % 10007
        return (total + torch.tensor([float(len(p)) for p in prompts]) + torch.tensor(offset or 0.0)).float()

    return "checksum"


def test_a_png_file_returns_every_byte() -> None:
    assert torch.equal(decode_images([encode_image(i) for i in IMAGES], 5 * 12 * 9), IMAGES)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_a_round_trip_gives_the_scores_of_the_reward_itself(checksum: str, batch_size: int) -> None:
    metadata = {"offset": [0.5, 1.5, 2.5, 3.5, 4.5]}
    expected = score_one(checksum, get(checksum), IMAGES, PROMPTS, metadata)
    with serving(checksum) as url:
        remote = get(f"{url}/score#batch_size={batch_size},concurrency=3,retries=0")
        assert torch.equal(score_one("remote", remote, IMAGES, PROMPTS, metadata), expected)
        assert remote(IMAGES[:0], []).shape == (0,)
        health = httpx2.get(f"{url}/health", verify=False)
        assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_batches_are_under_way_together_and_their_scores_stay_in_order() -> None:
    both = threading.Barrier(2, timeout=20)

    def script(message: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        both.wait()  # nobody is answered before two requests have arrived
        return ok([float(p) for p in message["prompts"]])

    with scripted(script) as (url, _):
        scores = RemoteReward(url, batch_size=1, concurrency=2)(IMAGES[:4], ["0", "1", "2", "3"])
    assert scores.tolist() == [0, 1, 2, 3]


def test_the_token_opens_the_server_and_appears_in_no_message(checksum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(checksum, token=TOKEN) as url:
        with pytest.raises(EtudeError, match=r"status 401.*ETUDE_REWARD_TOKEN \(it is not set\)"):
            get(f"{url}/score#batch_size=8")(IMAGES, PROMPTS)
        monkeypatch.setenv("ETUDE_REWARD_TOKEN", TOKEN + "x")
        with pytest.raises(EtudeError, match=r"status 401.*was refused") as caught:
            get(f"{url}/score#batch_size=7")(IMAGES, PROMPTS)
        assert TOKEN not in str(caught.value)
        monkeypatch.setenv(f"ETUDE_REWARD_TOKEN_127_0_0_1_{url.rpartition(':')[2]}", TOKEN)
        assert get(f"{url}/score#batch_size=6")(IMAGES, PROMPTS).shape == (5,)
        assert httpx2.get(f"{url}/health", verify=False).status_code == 200


def test_a_token_goes_to_the_host_that_its_variable_names_and_the_usual_one_to_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ETUDE_REWARD_TOKEN", "for-this-machine")
    monkeypatch.setenv("ETUDE_REWARD_TOKEN_GPU__7_EXAMPLE_ORG", "for-gpu-7")
    monkeypatch.setenv("ETUDE_REWARD_TOKEN_GPU__7_EXAMPLE_ORG_8001", "for-its-port")
    sent = {
        "http://127.0.0.1:8000/score": "for-this-machine",
        "http://localhost/score": "for-this-machine",
        "http://[::1]:8000/score": "for-this-machine",
        "https://gpu-7.example.org/score": "for-gpu-7",
        "https://GPU-7.Example.org:8000/score": "for-gpu-7",
        "https://gpu-7.example.org:8001/score": "for-its-port",
        "https://example.org/score": "",
        "https://gpu.7.example.org/score": "",
        "https://gpu-7.example.org.evil.test/score": "",
        "https://127.0.0.1.evil.test/score": "",
        "http://10.0.0.7/score": "",
        "http://gpu_7_example_org/score": "",
        "http://[2001:db8::7]/score": "",
    }
    for url, token in sent.items():
        assert RemoteReward(url)._token == token, url
    with pytest.raises(EtudeError, match=r"ETUDE_REWARD_TOKEN_EXAMPLE_ORG \(it is not set"):
        RemoteReward("https://example.org/score")._scores(401, b"", 1)


def test_a_server_that_repeats_the_token_does_not_get_it_into_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_REWARD_TOKEN", TOKEN)
    with scripted(lambda message, number: (400, {}, f"you sent {TOKEN}\x1b[31m".encode())) as (url, handler):
        with pytest.raises(EtudeError, match=r"status 400 \(you sent \*\*\* \[31m\)"):
            RemoteReward(url)(IMAGES, PROMPTS)
        assert handler.headers_seen[0]["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_failure_is_tried_again(status: int) -> None:
    with scripted(lambda message, number: ok([1.0] * 5) if number == 3 else (status, {}, b"")) as (url, handler):
        assert RemoteReward(url, retries=2, backoff=0)(IMAGES, PROMPTS).tolist() == [1.0] * 5
        assert len(handler.seen) == 3
        assert handler.seen[0] == handler.seen[2]


def test_attempts_wait_twice_as_long_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def request(client: Any, method: str, body: bytes | None) -> tuple[int, bytes]:
        return 503, b'{"error": "still loading"}'

    monkeypatch.setattr("etude.rewards.remote.client.asyncio.sleep", sleep)
    reward = RemoteReward("http://127.0.0.1:9/score", retries=4, backoff=0.5)
    monkeypatch.setattr(reward, "_request", request)
    with pytest.raises(EtudeError, match=r"status 503 \(still loading\) after 5 attempts"):
        reward(IMAGES, PROMPTS)
    assert waited == [0.5, 1.0, 2.0, 4.0]


GARBAGE = {
    "wrong length": (ok([1.0]), "with 1 scores; expected 200 and"),
    "too many": (ok([1.0] * 6), "with 6 scores"),
    "NaN": ((200, {}, b'{"scores": [1, 2, NaN, 4, 5]}'), r"scores\.2"),
    "infinite in float32": (ok([1.0, 1e300, 0, 0, 0]), "beyond float32"),
    "text": (ok(["1.0"] * 5), r"scores\.0"),
    "booleans": (ok([True] * 5), r"scores\.0"),
    "nested": (ok([[1.0]] * 5), r"scores\.0"),
    "null": (ok(None), "scores"),
    "a list": ((200, {}, b"[1, 2, 3, 4, 5]"), "expected 200"),
    "no field": ((200, {}, b"{}"), "scores: Field required"),
    "not JSON": ((200, {}, b"<html>hello</html>"), "Invalid JSON"),
    "not text": ((200, {}, b"\xff\xfe\x00"), "Invalid JSON"),
    "empty": ((200, {}, b""), "Invalid JSON"),
    "deep": ((200, {}, b"[" * 100_000), "expected 200"),
    "huge number": ((200, {}, b'{"scores": [1' + b"0" * 5000 + b", 1, 1, 1, 1]}"), "expected 200"),
    "huge body": ((200, {}, b" " * (3 << 20)), "with more than 1048576 bytes"),
    "compressed": ((200, {"Content-Encoding": "gzip"}, b"\x1f\x8b" + b"\0" * 50), "Invalid JSON"),
    "redirect": ((307, {"Location": "http://127.0.0.1:1/"}, b""), "status 307, a redirect"),
    "no content": ((204, {}, b""), "status 204; expected 200"),
    "not found": ((404, {}, b'{"detail": "Not Found"}'), r"status 404 \(Not Found\)"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_every_garbage_answer_is_one_sentence_that_names_the_url(kind: str) -> None:
    answer, words = GARBAGE[kind]
    with scripted(lambda message, number: answer) as (url, handler):
        with pytest.raises(EtudeError, match=words) as caught:
            RemoteReward(url, backoff=0)(IMAGES, PROMPTS)
        assert url in str(caught.value)
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
        assert len(handler.seen) == 1  # another attempt would get the same


def test_a_server_that_is_not_there_is_named_with_the_number_of_attempts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    remote = RemoteReward(f"http://127.0.0.1:{port}/score", retries=2, backoff=0)
    for call in (remote.load, lambda: remote(IMAGES, PROMPTS)):
        with pytest.raises(EtudeError, match=rf"127\.0\.0\.1:{port}/score: no answer \(.*refused.*\) after 3 attempts"):
            call()


def test_a_silent_server_and_one_that_hangs_up_are_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/score"
        with pytest.raises(EtudeError, match=r"no answer \(it took longer than 0\.05 s\) after 1 attempt"):
            RemoteReward(url, timeout=0.05, retries=0)(IMAGES, PROMPTS)
    with (
        scripted(lambda message, number: (200, {"Content-Length": "99", "Connection": "close"}, b"{")) as (url, _),
        pytest.raises(EtudeError, match="no answer"),
    ):
        RemoteReward(url, retries=0)(IMAGES, PROMPTS)


@contextmanager
def dripping(start: bytes, drop: bytes) -> Iterator[str]:
    """A server that takes every connection, sends `start`, and then `drop` again and again, faster than any pause would count as silence."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.sendall(start)
                while not over.wait(0.01):
                    connection.sendall(drop)

        def take() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=take, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["status", "headers", "body", "chunks"],
)
def test_an_answer_that_drips_is_no_answer_when_its_time_is_over(start: bytes, drop: bytes) -> None:
    with dripping(start, drop) as url:
        began = time.monotonic()
        with pytest.raises(EtudeError, match=r"no answer"):
            RemoteReward(url, timeout=0.3, retries=1, backoff=0)(IMAGES, PROMPTS)
        assert time.monotonic() - began < 5


def test_the_first_failure_ends_the_requests_beside_it_at_once() -> None:
    hanging = threading.Event()

    def script(message: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        if message["prompts"] == ["bad"]:
            return 400, {}, b"no"
        hanging.wait(30)
        return ok([0.0])

    with scripted(script) as (url, handler):
        began = time.monotonic()
        with pytest.raises(EtudeError, match="status 400"):
            RemoteReward(url, batch_size=1, concurrency=3)(IMAGES, ["a", "b", "bad", "c", "d"])
        assert time.monotonic() - began < 10
        assert len(handler.seen) <= 4  # those that waited for a turn were never sent
        hanging.set()


def test_scores_are_under_way_while_the_caller_goes_on_and_cancelling_ends_them() -> None:
    go_on = threading.Event()

    def script(message: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        go_on.wait(30)
        return ok([float(len(p)) for p in message["prompts"]])

    with scripted(script) as (url, _):
        rewards = WeightedRewards({f"{url}#retries=0": 1.0, "jpeg_compressibility": 0.5})
        scoring = rewards.start(IMAGES, PROMPTS)
        assert not scoring.done()
        with pytest.raises(EtudeError, match=rf"reward '{url}.*' has not finished after 0\.2 s"):
            scoring.result(timeout=0.2)
        assert scoring.futures[f"{url}#retries=0"].cancelled()
        scoring = rewards.start(IMAGES, PROMPTS)
        go_on.set()
        started = scoring.result()
        assert list(started) == list(rewards.weights)
        for name, values in rewards(IMAGES, PROMPTS).items():
            assert torch.equal(started[name], values)


def test_load_is_content_with_any_answer() -> None:
    with scripted(lambda message, number: ok([])) as (url, handler):
        RemoteReward(url).load()
        assert handler.seen == []


def test_a_server_says_which_reward_it_computes(checksum: str) -> None:
    served = []
    for name in (checksum, checksum, "colorfulness"):
        with serving(name) as url:
            reward = RemoteReward(url)
            reward.load()
            served.append(reward.served)
    assert served[0] == served[1] != served[2]
    assert all(re.fullmatch("[0-9a-f]{64}", str(text)) for text in served)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("http://", "names no host"),
        ("http://host:99999/", "is no url"),
        ("http://host/score#timeout", "timeout of a remote reward has no value"),
        ("http://host/score#timeout=soon", "timeout = 'soon'"),
        ("http://host/score#batch_size=1.5", "a whole number"),
        ("http://host/score#timeout=nan", "timeout = nan"),
        ("http://host/score#concurrency=0", "concurrency = 0"),
        ("http://host/score#timeout=1,timeout=2", "option timeout of a remote reward stands twice"),
        ("pickscore:batch_size=1,batch_size=2", "option batch_size of the reward PickScore stands twice"),
        ("http://host/score#tiemout=3", "did you mean 'timeout'"),
        ("http://host/score#token_env=HF_TOKEN", "unknown option of a remote reward 'token_env'"),
    ],
)
def test_a_name_that_cannot_be_a_remote_reward_is_refused_before_anything_is_sent(name: str, words: str) -> None:
    with pytest.raises(EtudeError, match=words):
        get(name)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(EtudeError, match="holds a user name or password") as caught:
        get("https://me:hunter2@host/score")
    assert "hunter2" not in str(caught.value)


def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_REWARD_TOKEN", "line\nbreak")
    with pytest.raises(EtudeError, match="ETUDE_REWARD_TOKEN holds a blank") as caught:
        RemoteReward("http://127.0.0.1/score")
    assert "line\nbreak" not in str(caught.value)


def test_metadata_that_is_no_json_is_said_before_anything_is_sent() -> None:
    with pytest.raises(EtudeError, match="metadata cannot be sent to http://host/score"):
        RemoteReward("http://host/score")(IMAGES, PROMPTS, tag=[object()] * 5)


# The server, with requests that the client would not make.


def png(size: tuple[int, int] = (9, 12), mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def jpeg() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def body(**changes: Any) -> bytes:
    return json.dumps({"images": [png()], "prompts": ["a"], **changes}).encode()


BAD_REQUESTS = {
    "not JSON": (b"{", 400, "Invalid JSON"),
    "nested deep": (b"[" * 100_000, 400, "JSON"),
    "no images": (body(images=[]), 400, "images"),
    "an unknown field": (body(metdata={}), 400, "metdata"),
    "a prompt too few": (body(prompts=[]), 400, "1 images but 0 entries in 'prompts'"),
    "metadata of another length": (body(metadata={"tag": [1, 2]}), 400, "2 entries in 'tag'"),
    "not base64": (body(images=["???"]), 400, "image 0 is not base64 of a PNG"),
    "a JPEG": (body(images=[jpeg()]), 400, "image 0 is not base64 of a PNG"),
    "grey": (body(images=[png(mode="L")]), 400, "mode L"),
    "half a PNG": (body(images=[png((30, 30))[:80]]), 400, "image 0"),
    "two sizes": (body(images=[png(), png((4, 4))], prompts=["a", "b"]), 400, "image 1 is of size"),
    "a bomb": (body(images=[png((3000, 3000))]), 400, "more than 1000 pixels"),
    "a failing reward": (body(metadata={"offset": ["x"]}), 422, "reward 'checksum' failed"),
}


def test_every_bad_request_gets_a_status_and_a_sentence_and_the_server_goes_on(checksum: str) -> None:
    with serving(checksum, max_pixels=1000) as url:
        for kind, (content, status, words) in BAD_REQUESTS.items():
            answer = httpx2.post(
                f"{url}/score", content=content, headers={"Content-Type": "application/json"}, verify=False
            )
            assert answer.status_code == status, kind
            assert words in answer.json()["error"], kind
        assert len(get(f"{url}/score")(IMAGES, PROMPTS)) == 5


def test_a_page_in_a_browser_cannot_post_to_it(checksum: str) -> None:
    with serving(checksum) as url:
        answer = httpx2.post(f"{url}/score", content=body(), headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415


def test_a_server_on_loopback_answers_to_this_machines_names_only(checksum: str) -> None:
    with serving(checksum) as url:
        port = url.rpartition(":")[2]
        names = {"127.0.0.1": 200, f"localhost:{port}": 200, f"[::1]:{port}": 200, "LOCALHOST": 200}
        names |= {
            "rebound.example": 421,
            f"127.0.0.1.rebound.example:{port}": 421,
            "": 421,
            "[::2]": 421,
            "10.0.0.7": 421,
        }
        for host, status in names.items():
            headers = {"Host": host, "Content-Type": "application/json"}
            assert httpx2.get(f"{url}/health", headers=headers, verify=False).status_code == status, host
            assert httpx2.post(f"{url}/score", content=body(), headers=headers, verify=False).status_code == status, (
                host
            )
    with serving(checksum, hosts=()) as url:  # beyond loopback, where a token is asked for
        assert httpx2.get(f"{url}/health", headers={"Host": "gpu-7.example.org"}, verify=False).status_code == 200


def test_requests_beyond_what_memory_is_meant_for_wait_unread_and_are_scored_later(
    checksum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etude.rewards.remote.server.MAX_BODIES", 1)
    first, second = body(), body(prompts=["longer"])
    head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    with serving(checksum) as url:
        at = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(at, timeout=20) as slow, socket.create_connection(at, timeout=20) as whole:
            slow.sendall(head.format(len(first)).encode() + first[:10])
            assert (
                httpx2.get(f"{url}/health", verify=False).status_code == 200
            )  # a round trip: the slow one has its place by then
            whole.sendall(head.format(len(second)).encode() + second)
            whole.settimeout(0.3)
            with pytest.raises(TimeoutError):
                whole.recv(1)
            whole.settimeout(20)
            slow.sendall(first[10:])
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200")
            assert whole.recv(1 << 16).startswith(b"HTTP/1.1 200")


CHUNK = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"


@pytest.mark.parametrize(
    ("length", "content"),
    [("Content-Length: 196608", b""), ("Transfer-Encoding: chunked", CHUNK * 3)],
    ids=["said", "unsaid"],
)
def test_a_request_is_refused_at_the_limit_whether_or_not_it_says_its_length(
    checksum: str, length: str, content: bytes
) -> None:
    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    with serving(checksum, max_request_bytes=1 << 17) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as sock:
            sock.sendall(head.encode() + content)  # and it never ends
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 413")
        large = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
        with pytest.raises(EtudeError, match=r"status 413 \(the request is longer than 131072 bytes"):
            get(f"{url}/score")(large, ["a"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7"])
def test_a_host_beyond_this_machine_needs_a_token(host: str) -> None:
    with pytest.raises(EtudeError, match="there is no token"):
        listen(host, 0)


def test_loopback_needs_no_token_and_a_taken_port_is_said() -> None:
    with listen("localhost", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(EtudeError, match=rf"--port {port} cannot be listened on \(Address already in use\)"):
            listen("127.0.0.1", port)
        assert address(sock) == f"http://127.0.0.1:{port}"


def test_the_request_that_is_documented_is_the_one_that_is_sent() -> None:
    with scripted(lambda message, number: ok([0.0] * 5)) as (url, handler):
        RemoteReward(url)(IMAGES, PROMPTS, tag=list("abcde"))
        RemoteReward(url, whole_groups=1)(IMAGES, PROMPTS, groups=[0] * 5, tag=list("abcde"))
        plain, grouped = (ScoreRequest.model_validate(seen) for seen in handler.seen)
    assert (plain.prompts, plain.metadata, plain.groups) == (PROMPTS, {"tag": list("abcde")}, None)
    assert (grouped.prompts, grouped.metadata, grouped.groups) == (PROMPTS, {"tag": list("abcde")}, [0] * 5)
    fields = list(ScoreRequest.model_json_schema()["properties"])
    assert list(handler.seen[0]) == [name for name in fields if name != "groups"]
    assert list(handler.seen[1]) == fields


# A run.


@pytest.mark.slow
def test_a_server_that_fails_loses_no_run_and_is_told_what_the_prompts_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETUDE_REWARD_TOKEN", TOKEN)
    prompts = {"red heart": 1, "pizza": 2, "tiger": 3, "sun": 4}
    lines = [json.dumps({"prompt": text, "number": number}) for text, number in prompts.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    failing: set[int] = set()

    def script(message: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        if number in failing:
            return 200, {}, b"out of memory"
        images = decode_images(message["images"], 1 << 20)
        assert message["metadata"] == {"number": [prompts[text] for text in message["prompts"]]}
        return ok(images.float().mean((1, 2, 3)).tolist())

    with scripted(script) as (url, handler):
        config = parse_config(
            {
                "model": str(save_stable_diffusion(tmp_path / "sd")),
                "iterations": 2,
                "rewards": {f"{url}#retries=0,concurrency=1": 1.0},
                "prompts": dict.fromkeys(("train", "evaluation"), str(tmp_path / "prompts.jsonl")),
                "sampling": {"eta": 1.2, "num_steps": 3},
                "rollout": {"images_per_iteration": 8, "images_per_prompt": 4},
                "advantage": {"kind": "group"},
                "evaluation": {"num_images": 4, "grid_images": 4},
            }
        )
        Trainer(config, tmp_path / "whole").train()
        failing.add(len(handler.seen) + 4)  # two requests of the first evaluation, one of each rollout
        with pytest.raises(EtudeError, match=r"status 200 with Invalid JSON.*intact checkpoint: iteration 1"):
            Trainer(config, tmp_path / "failed").train()
        Trainer(config, tmp_path / "failed", resume=True).train()
    assert outcome(tmp_path / "failed") == outcome(tmp_path / "whole")
    assert url in (tmp_path / "failed" / "report.html").read_text()
    assert handler.headers_seen[-1]["Authorization"] == f"Bearer {TOKEN}"
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in written if TOKEN.encode() in file.read_bytes()] == []


def test_a_server_that_is_not_there_stops_a_run_before_anything_is_drawn(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score#retries=0"
    config = parse_config({"model": str(save_stable_diffusion(tmp_path / "sd")), "rewards": {url: 1.0}})
    with pytest.raises(EtudeError, match=r"cannot be used: .*no answer"):
        Trainer(config, tmp_path / "run").train()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_serves_at_the_url_that_it_prints_until_it_is_interrupted() -> None:
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from etude.cli.app import main; main()"
    command = [sys.executable, "-c", code, "serve-reward", "colorfulness", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        scores = RemoteReward(words[words.index("at") + 1])(IMAGES, PROMPTS)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert torch.equal(scores, get("colorfulness")(IMAGES, PROMPTS))
    assert (process.returncode, errors) == (130, "")
