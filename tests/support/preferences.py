"""Small pools, and a simulated rater with a known utility who votes like a person: noise, ties, a leaning to the left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from etude.preferences import davidson
from etude.preferences.pictures import encode_pictures
from etude.preferences.pool import ANSWERS, Pool


def pictures(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """uint8 `[count, 3, size, size]`: each one colour and some grain."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 256, (count, 3, 1, 1))
    return np.clip(colour + rng.integers(-20, 21, (count, 3, size, size)), 0, 255).astype(np.uint8)


def quick(root: Path) -> Pool:
    """A pool whose commits wait for no disk: a test that asks for durability opens a `Pool` itself."""

    class Quick(Pool):
        @contextmanager
        def _writing(self, durable: bool = True) -> Iterator[Any]:
            with self._lock, self._explained(), self._transaction() as run:
                yield run

    pool = Quick(root, create=True)
    pool._connection.execute("PRAGMA synchronous = OFF")
    return pool


def fill(pool: Pool, prompts: int, each: int, label: str = "made up", seed: int = 0, size: int = 16) -> Pool:
    """Adds `each` images of each of `prompts` prompts; image i shows prompt i modulo their number."""
    maker = pool.add_maker(label, {"kind": "test", "label": label})
    files = encode_pictures(pictures(prompts * each, size, seed))
    pool.add_images(maker, [(i, f"prompt {i // each}", data) for i, data in enumerate(files)])
    return pool


def vote_texts() -> dict[str, Any]:
    """Strategies of hostile votes."""
    names = st.one_of(
        st.text(max_size=50), st.sampled_from(["ann", "bob", "x" * 41, "a\0b", "'; DROP TABLE votes; --"])
    )
    answers = st.one_of(st.sampled_from([*ANSWERS, "Left", ""]), st.text(max_size=10))
    return {"rater": names, "answer": answers, "pair": st.integers(-(2**63), 2**63 - 1) | st.integers(0, 6)}


class SimulatedRater:
    """Votes by Davidson's model: d = sharpness (u(left) - u(right)) + side, tie parameter nu.

    Args:
        utility: from pixels uint8 `[3, h, w]` to a number.
        sharpness: logits of a unit of utility.
        side: leaning to the left in logits.
        nu: tie parameter; 0 forbids ties.
    """

    def __init__(self, utility: Any, sharpness: float = 1.0, side: float = 0.0, nu: float = 0.0, seed: int = 0) -> None:
        self.utility, self.sharpness, self.side = utility, sharpness, side
        self.eta = np.log(nu) if nu else -np.inf
        self.rng = np.random.default_rng(seed)
        self.known: dict[str, float] = {}

    def answer(self, left: str, right: str, pixels: Any) -> str:
        """The answer to two images by their digests; `pixels` maps a digest to its pixels."""
        for digest in (left, right):
            if digest not in self.known:
                self.known[digest] = float(self.utility(pixels(digest)))
        d = self.sharpness * (self.known[left] - self.known[right]) + self.side
        outcome = int(davidson.simulate([d], self.eta, self.rng)[0])
        return {1: "left", 0: "tie", -1: "right"}[outcome]
