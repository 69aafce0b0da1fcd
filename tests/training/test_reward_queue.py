"""Rewards beside the rollout: the same scores, the failures by name, and no waiting forever."""

from __future__ import annotations

import threading

import pytest
import torch

from etude.config import parse_config
from etude.errors import EtudeError
from etude.prompts import PromptSet
from etude.rewards import WeightedRewards, register
from etude.training.reward_queue import Scorer
from etude.training.supervision import Interrupted
from etude.training.trainer import Trainer
from support.small_runs import metrics, redness, same, weights
from support.tiny import save_stable_diffusion

PROMPTS = PromptSet([f"prompt {i}" for i in range(6)], {"tag": list("abcdef")})


def images(count=6):
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def handed_in(scorer, drawn, size, early=True):
    pending = scorer.pending(PROMPTS, early)
    for start in range(0, len(drawn), size):
        pending.begin(slice(start, min(start + size, len(drawn))), drawn[start : start + size])
    return pending


@pytest.mark.parametrize("size", [1, 4, 6])
def test_scores_of_batches_are_those_of_all_images_at_once(size):
    register("redness")(redness)
    rewards = WeightedRewards(
        {"redness": 1.0, "colorfulness": 0.5, "jpeg_compressibility": 1.0}, ["jpeg_incompressibility"]
    )
    scorer, drawn = Scorer(rewards, timeout=60), images()
    at_once = rewards(drawn, PROMPTS.texts, PROMPTS.metadata)
    assert same(handed_in(scorer, drawn, size).result(), at_once)
    assert same(
        scorer.evaluate(drawn, PROMPTS.texts, PROMPTS.metadata),
        rewards.evaluate(drawn, PROMPTS.texts, PROMPTS.metadata),
    )


def test_images_are_scored_while_the_next_are_made():
    scored = threading.Event()

    @register("telling")
    def telling(images, prompts, **metadata):
        scored.set()
        return redness(images, prompts)

    pending = handed_in(Scorer(WeightedRewards({"telling": 1.0}), timeout=60), images(2), 2)
    assert scored.wait(60)  # nobody has asked for the result yet
    assert len(pending.result()["telling"]) == 2


def test_a_failure_names_the_reward_and_the_sample_in_the_whole_batch_and_comes_early():
    @register("fickle")
    def fickle(images, prompts, **metadata):
        scores = redness(images, prompts)
        return scores.masked_fill(torch.tensor([text == "prompt 3" for text in prompts]), float("nan"))

    @register("broken")
    def broken(images, prompts, tag, **metadata):
        raise RuntimeError(f"no {tag[0]}")

    with pytest.raises(EtudeError, match="reward 'fickle' returned nan for sample 3, prompt 'prompt 3'"):
        handed_in(Scorer(WeightedRewards({"fickle": 1.0}), timeout=60), images(), 2).result()
    scorer = Scorer(WeightedRewards({"broken": 1.0}), timeout=60)
    late = handed_in(scorer, images(2), 2, early=False)
    late._batches[0].futures["broken"].exception(60)
    late.begin(slice(2, 4), images(2))  # several processes must end together: nothing is raised here
    with pytest.raises(EtudeError, match=r"reward 'broken' failed on samples 0 to 1 .*RuntimeError: no a"):
        late.result()
    early = handed_in(scorer, images(2), 2)
    early._batches[0].futures["broken"].exception(60)
    with pytest.raises(EtudeError, match="reward 'broken' failed on samples 0 to 1"):
        early.begin(slice(2, 4), images(2))


def test_a_process_names_samples_as_all_processes_count_them():
    @register("fussy")
    def fussy(images, prompts, **metadata):
        raise RuntimeError("no")

    scorer = Scorer(WeightedRewards({"fussy": 1.0}), timeout=60)
    pending = scorer.pending(PROMPTS, first=6)
    pending.begin(slice(2, 4), images(2))
    with pytest.raises(EtudeError, match="failed on samples 8 to 9"):
        pending.result()


@pytest.fixture
def hanging():
    """A reward that does not return before the test ends."""
    end = threading.Event()

    @register("hanging")
    def reward(images, prompts, **metadata):
        assert end.wait(120)
        return redness(images, prompts)

    yield
    end.set()


def test_a_reward_that_hangs_ends_by_a_time_out_and_keeps_no_process_alive(hanging):
    scorer = Scorer(WeightedRewards({"hanging": 1.0, "colorfulness": 1.0}), timeout=0.02)
    late = r"'hanging'.* has not finished after 0.02 s: it hangs, or rollout.reward_timeout"
    with pytest.raises(EtudeError, match=late), scorer:  # which drops what has not begun
        handed_in(scorer, images(), 3).result()
    with pytest.raises(EtudeError, match="has not finished"):
        scorer.evaluate(images(), PROMPTS.texts)
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_a_signal_ends_the_waiting_for_a_reward_that_hangs(hanging):
    def signalled():
        raise Interrupted("interrupted", 15)

    scorer = Scorer(WeightedRewards({"hanging": 1.0}), timeout=3600, on_wait=signalled)
    with pytest.raises(Interrupted), scorer:
        handed_in(scorer, images(), 6).result()


def test_training_ends_with_the_same_bits_whether_or_not_scoring_runs_ahead(tmp_path):
    (tmp_path / "prompts.txt").write_text("red heart\npizza\n")
    prompts = str(tmp_path / "prompts.txt")
    settings = {
        "model": str(save_stable_diffusion(tmp_path / "sd")),
        "iterations": 1,
        "rewards": {"colorfulness": 1.0, "jpeg_compressibility": 1.0},
        "prompts": {"train": prompts, "evaluation": prompts},
        "sampling": {"eta": 1.2, "num_steps": 2, "guidance_scale": 1.0},
        "objective": {"clip_range": None, "clip_nats": 1.6},
        "advantage": {"kind": "group"},
        "evaluation": {"num_images": 2, "grid_images": 2},
        "memory": {"decode_batch_size": 2},
    }
    rollout = {"images_per_iteration": 4, "images_per_prompt": 2, "batch_size": 2}
    ended = []
    for ahead in (True, False):
        out = tmp_path / str(ahead)
        trainer = Trainer(parse_config({**settings, "rollout": {**rollout, "score_ahead": ahead}}), out)
        trainer.train()
        ended.append((weights(trainer), metrics(out)))
    assert same(ended[0][0], ended[1][0])
    assert ended[0][1] == ended[1][1]
