"""A pool of 10,000 images and 100,000 votes, and what a vote and a fit on it take.

`PYTHONPATH=src:tests python tests/support/preference_scale.py` prints the figures of the documentation.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from etude.preferences import davidson
from etude.preferences.pairing import Pairing
from etude.preferences.pool import Pool
from etude.preferences.reward_fit import fit_reward
from etude.preferences.voting_desk import Desk
from support.preferences import quick

IMAGES, VOTES, RATERS, EACH = 10_000, 100_000, 20, 4
BLOCKS = (1280, 128, 11)
"""Sizes of the blocks of features of the embedded backbone."""


def large_pool(root: Path, utility: np.ndarray | None = None, makers: int = 1) -> Pool:
    """10,000 images of 2,500 prompts and 100,000 votes of 20 raters, written at once.

    Args:
        root: directory of the pool.
        utility: of each image, in logits, which the votes follow. Default: votes at random.
        makers: 2 makes it a judgement of two makers on 5,000 prompts. Default: 1.
    """
    pool, each = quick(root), EACH if makers == 1 else 2
    numbers = [pool.add_maker(f"large {i}", {"number": i}) for i in range(makers)]
    if makers == 2:
        pool.set_fact("sides", numbers)
    run = pool._connection.executemany
    pool._connection.execute("BEGIN")
    rows = ((f"{i:064x}", f"prompt {i // each}", numbers[i % makers], i // makers) for i in range(IMAGES))
    run("INSERT INTO images (digest, prompt, maker, sample) VALUES (?, ?, ?, ?)", rows)
    rng = np.random.default_rng(0)
    group, first, shift = (
        rng.integers(IMAGES // each, size=VOTES),
        rng.integers(each, size=VOTES),
        rng.integers(1, each, size=VOTES),
    )
    left, right = each * group + first, each * group + (first + shift) % each
    raters = [f"rater {i % RATERS}" for i in range(VOTES)]
    run(
        "INSERT INTO pairs (left_image, right_image, rater, time) VALUES (?, ?, ?, '')",
        zip((left + 1).tolist(), (right + 1).tolist(), raters, strict=True),
    )
    difference = np.zeros(VOTES) if utility is None else utility[left] - utility[right]
    outcomes = davidson.simulate(difference, np.full(VOTES, np.log(0.3)), rng)
    answers = np.array(["right", "tie", "left"])[outcomes + 1].tolist()
    numbers = range(1, VOTES + 1)
    run(
        "INSERT INTO votes (pair, rater, answer, time) VALUES (?, ?, ?, '')", zip(numbers, raters, answers, strict=True)
    )
    pool._connection.execute("COMMIT")
    return pool


def vote_seconds(pool: Pool, votes: int) -> float:
    """CPU time of a vote, its answer and the choice of the next pair: the median over some votes of one rater."""
    desk, took = Desk(pool, Pairing(pool, seed=0), 100), []
    state = desk.pairs({"rater": "rater 3"})
    for _ in range(votes):
        start = time.process_time()
        state = desk.vote({"rater": "rater 3", "pair": state["queue"][0]["pair"], "answer": "left"})
        desk.choose_ahead()
        took.append(time.process_time() - start)
    return sorted(took)[votes // 2]


def main() -> None:
    """Prints what a vote takes, and a fit to features of the embedded backbone's sizes that are in the cache."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(IMAGES, sum(BLOCKS))).astype(np.float32)
    weight = rng.normal(size=sum(BLOCKS)) / sum(BLOCKS) ** 0.5
    with tempfile.TemporaryDirectory() as place, large_pool(Path(place) / "judged", makers=2) as judged:
        print(f"a vote and the next pair of a judgement: {1e3 * vote_seconds(judged, 50):.1f} ms of CPU")
    with tempfile.TemporaryDirectory() as place, large_pool(Path(place) / "pool", values @ weight) as pool:
        print(f"a vote and the next pair: {1e3 * vote_seconds(pool, 50):.1f} ms of CPU")
        (pool.root / "features").mkdir()
        tensors = {
            "images": torch.arange(1, IMAGES + 1),
            "values": torch.from_numpy(values),
            "blocks": torch.tensor(BLOCKS),
        }
        save_file(tensors, pool.root / "features" / "embedded.safetensors")
        cpu, wall = time.process_time(), time.perf_counter()
        fit_reward(pool)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(f"a fit: {cpu:.0f} s of CPU ({wall:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
