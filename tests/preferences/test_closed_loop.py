"""The whole loop with a rater who hides what they like: votes over HTTP, fit, training, blind judgement."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch

import etude
from etude.policies.source import ModelSource
from etude.preferences.drawing import draw_into
from etude.preferences.pairing import Pairing
from etude.preferences.pool import Pool
from etude.preferences.preference_reward import write_reward
from etude.preferences.reward_fit import fit_reward
from etude.preferences.verdict import judge
from etude.preferences.voting_server import build_app
from etude.prompts import load_prompts
from etude.rewards.colorfulness import colorfulness
from etude.rewards.remote.server import address, listen, make_server
from support.preferences import SimulatedRater, quick
from support.voting import Voter

STEPS = 8
SETTINGS = {
    "iterations": 3,
    "optimizer.learning_rate": 5.0e-3,
    "rollout.images_per_iteration": 32,
    "rollout.images_per_prompt": 8,
    "sampling.num_steps": STEPS,
    "sampling.guidance_scale": 1.0,
    "evaluation.every": 3,
    "evaluation.num_images": 32,
    "evaluation.held_out_rewards": ["colorfulness"],
    "objective.kl_coef": 0.0,
}


def hidden(pixels: np.ndarray) -> float:
    """The utility: nothing but the votes tells it."""
    return float(colorfulness(torch.from_numpy(pixels.copy())[None], [""])[0])


@contextmanager
def served(pool: Pool) -> Iterator[httpx2.Client]:
    """The voting server on a socket, in a thread."""
    sock = listen("127.0.0.1", 0)
    server = make_server(build_app(pool, Pairing(pool, seed=0)))
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    try:
        with httpx2.Client(base_url=address(sock), timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.slow
def test_votes_become_a_reward_that_raises_the_hidden_utility_and_wins_the_blind_judgement(tmp_path: Path) -> None:
    source, ode = ModelSource("emoji-sd"), etude.ODE(steps=STEPS, guidance=1.0)
    policy = etude.load_policy("emoji-sd")
    prompts = load_prompts("emoji-train").texts[:30]
    pool = quick(tmp_path / "pool")
    draw_into(pool, policy, source, ode, prompts, 120)
    with served(pool) as client:
        for name, side, seed in (("ann", 0.5, 1), ("bob", 0.0, 2)):
            rater = SimulatedRater(hidden, sharpness=0.12, side=side, nu=0.3, seed=seed)
            assert Voter(client, name).vote_all(rater, 150) == 150
    fitted = fit_reward(pool)
    assert fitted.told_from_chance
    write_reward(fitted, tmp_path / "taste")

    run = etude.train(
        "emoji-ddpo", str(tmp_path / "tuned"), SETTINGS | {"rewards": {f"preference:{tmp_path / 'taste'}": 1.0}}
    )
    assert run["colorfulness"].improvement.low > 0  # the hidden utility, which the training never saw

    judged, unseen = quick(tmp_path / "judged"), load_prompts("emoji-eval").texts[:60]
    tuned = etude.load_policy("emoji-sd", lora=tmp_path / "tuned" / "lora")
    sides = [
        draw_into(judged, tuned, replace(source, lora=tmp_path / "tuned" / "lora"), ode, unseen, 60),
        draw_into(judged, policy, source, ode, unseen, 60),
    ]
    judged.set_fact("sides", sides)
    with served(judged) as client:
        Voter(client, "eve").vote_all(SimulatedRater(hidden, sharpness=0.5, side=0.2, nu=0.2, seed=3), 66)
        assert Voter(client, "eve").ask("pairs")["enough"]
    verdict = judge(judged)
    assert verdict.running.decision() == "A"
    assert verdict.win_rate.low > 0.5
    print(*fitted.lines(), run, *verdict.lines(), sep="\n")
