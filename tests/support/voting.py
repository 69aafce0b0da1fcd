"""A voting server in a process of its own, and a client that votes as the page does."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from support.preferences import SimulatedRater

SOURCE = Path(__file__).parents[2] / "src"


@contextmanager
def serving(pool: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`etude preferences vote POOL` on a free port; gives the process and its address."""
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "etude", "preferences", "vote", str(pool), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + process.stdout.read()
        yield process, address[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Voter:
    """Votes over HTTP.

    Args:
        client: an HTTP client with the server's address as base.
        name: the rater.
    """

    def __init__(self, client: httpx2.Client, name: str) -> None:
        self.client, self.name = client, name
        self.pixels_of: dict[str, np.ndarray] = {}

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        answer = self.client.post(f"/api/{what}", json={"rater": self.name, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def pixels(self, digest: str) -> np.ndarray:
        if digest not in self.pixels_of:
            data = self.client.get(f"/image/{digest}")
            assert data.status_code == 200, data.text
            picture = np.asarray(Image.open(io.BytesIO(data.content)))
            self.pixels_of[digest] = picture.transpose(2, 0, 1)
        return self.pixels_of[digest]

    def vote_all(self, rater: SimulatedRater, votes: int) -> int:
        """Gives up to so many votes; returns how many pairs there were."""
        state, given = self.ask("pairs"), 0
        while state["queue"] and given < votes:
            pair = state["queue"][0]
            answer = rater.answer(pair["left"], pair["right"], self.pixels)
            state = self.ask("vote", pair=pair["pair"], answer=answer, seconds=1.5)
            given += 1
        return given
