"""Diffusion-DPO: the implicit reward is the one that the preferences follow, online and from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from etude.config import parse_config
from etude.errors import EtudeError
from etude.learning.objectives.dpo import DPO, dpo_loss
from etude.learning.objectives.objective import Samples
from etude.policies.loading import load_policy
from etude.preferences.pairing import Pairing
from etude.preferences.pictures import encode_pictures
from etude.preferences.pool import Pool
from etude.preferences.vote_exchange import export_votes
from etude.preferences.voting_desk import Desk
from etude.prompts.preference_pairs import load_pairs
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import Trajectory
from etude.training.trainer import Trainer
from support.gaussian_policy import GaussianPolicy, flow_path, sd_path
from support.small_runs import brief_settings, metrics, same, weights
from support.tiny import save_flux
from support.tiny_flow import qwen_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PAIRS, BETA, LAM, VARIANCE = 3000, 4.0, 0.8, 0.8


def test_the_margin_at_the_minimum_is_the_raters_difference_of_rewards() -> None:
    difference = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
    wins = torch.sigmoid(difference)
    margin = difference.clone().requires_grad_()
    (wins * dpo_loss(margin) + (1 - wins) * dpo_loss(-margin)).sum().backward()
    assert margin.grad is not None
    assert margin.grad.abs().max() < 1e-15


@dataclass(frozen=True)
class Drawn:
    """Noise of each sample that is drawn once."""

    values: Tensor
    seed: int = 0
    stream: str = "objective"
    iteration: int = 1

    def step(self, samples: list[int], step: int, shape: tuple[int, ...]) -> Tensor:
        return self.values[samples]


@pytest.mark.parametrize("path", [sd_path(), flow_path()], ids=["vp", "flow"])
def test_a_shift_learnt_from_bradley_terry_votes_is_its_closed_form(path: Any) -> None:
    """With the shift h of x0_hat at a level, the margin of a pair is beta w h (1 - a G) (x_preferred - x_other).

    G is the gain of x0_hat in x. So h = lam / (beta w (1 - a G)) for a rater who follows lam x, up to four
    standard errors of the logistic regression.
    """
    table = SamplingPlan.sde(4, GDDIM(1.0)).tabulate(path.grid(4))
    policy = GaussianPolicy(0.5, VARIANCE, path, table=table, with_feedback=False)
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + VARIANCE**0.5 * torch.randn(PAIRS, 2, generator=generator)
    first = torch.rand(PAIRS, generator=generator) < torch.sigmoid(LAM * (x[:, 0] - x[:, 1]))
    advantages = torch.stack([first.float(), 1 - first.float()], 1).flatten()
    samples = Samples(
        table,
        Trajectory.of_images(x.reshape(-1, 1, 1, 1)),
        policy.encode([""] * 2 * PAIRS),
        1.0,
        list(range(2 * PAIRS)),
        Drawn(torch.randn(2 * PAIRS, 1, 1, 1, generator=generator)),  # type: ignore[arg-type]
        2,
        advantages,
    )
    objective, step = DPO(BETA), 2
    objective.prepare(policy, samples, [], None, lambda n: None)  # type: ignore[arg-type]
    rows, columns = torch.arange(PAIRS), torch.full((PAIRS,), step)
    optimizer = torch.optim.LBFGS([policy.network.shift], max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective.loss(policy, samples, rows, columns).value
        value.backward()
        return value

    optimizer.step(closure)
    a, s = float(table.a[step]), float(table.s[step])
    kept = 1 - a * a * VARIANCE / (a**2 * VARIANCE + s**2)  # 1 - a G
    flow = policy.prediction_type == "flow"
    weight = 1 / s**2 if flow else (a / s) ** 2
    scale = float(policy.network.scale[step])  # of the output, which moves x0_hat by -s / a on VP and by -s on flow
    found = float(policy.network.shift[step]) * scale * (-s if flow else -s / a)
    slope = BETA * weight * found * kept
    spread = float(
        (
            torch.sigmoid(LAM * (x[:, 0] - x[:, 1]))
            * torch.sigmoid(-LAM * (x[:, 0] - x[:, 1]))
            * (x[:, 0] - x[:, 1]) ** 2
        ).sum()
    )
    assert abs(slope - LAM) < 4 * spread**-0.5
    assert spread**-0.5 < LAM / 10


def write_pairs(root: Path, captions: list[str]) -> str:
    """The redder of two pictures is preferred."""
    rows = []
    for number, caption in enumerate(captions):
        for side, colour in enumerate([(220, 30 + number, 30), (30, 30, 220)]):
            Image.new("RGB", (10, 10), colour).save(root / f"{number}-{side}.png")
        rows.append(
            {"caption": caption, "image_0": f"{number}-0.png", "image_1": f"{number}-1.png", "label_0": 1, "label_1": 0}
        )
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root / "pairs.jsonl")


def vote_on_pairs(root: Path, captions: list[str]) -> str:
    """The same pictures in a pool, voted on by somebody who likes red, and exported; a tie and a skip beside them."""
    with Pool(root / "pool", create=True) as pool:
        pixels = [np.full((10, 10, 3), colour, np.uint8) for colour in [(220, 30, 30), (30, 30, 220)]]
        files = encode_pictures([each.transpose(2, 0, 1) for each in pixels])
        texts = [*captions, "a tie", "a skip"]
        items = [(2 * n + side, text, files[side]) for n, text in enumerate(texts) for side in (0, 1)]
        pool.add_images(pool.add_maker("squares", {}), items)
        images = {image.id: image for image in pool.images()}
        red = {image.digest for image in images.values() if image.sample % 2 == 0}
        desk = Desk(pool, Pairing(pool, repeat_share=0.0, seed=0), 0)
        state = desk.pairs({"rater": "ann"})
        while state["queue"]:
            pair = state["queue"][0]
            answer = {"a tie": "tie", "a skip": "skip"}.get(pair["prompt"], "left" if pair["left"] in red else "right")
            state = desk.vote({"rater": "ann", "pair": pair["pair"], "answer": answer})
        assert export_votes(pool, root / "votes.jsonl") == len(captions) + 1
    preferred = [Image.open(pair.preferred).getpixel((0, 0)) for pair in load_pairs(str(root / "votes.jsonl"))]
    assert preferred == [(220, 30, 30)] * len(captions)
    return str(root / "votes.jsonl")


@pytest.mark.parametrize(("model", "source"), [("sd", vote_on_pairs), ("flux", write_pairs), ("qwen", write_pairs)])
def test_pairs_of_a_file_or_of_voters_are_learnt_without_a_rollout(tmp_path: Path, model: str, source: Any) -> None:
    tree = brief_settings(tmp_path)
    if model == "flux":
        tree["model"] = str(save_flux(tmp_path / "flux"))
    if model == "qwen":
        qwen_image().save_pretrained(tmp_path / "qwen")
        tree |= {"model": str(tmp_path / "qwen"), "resolution": 16}
    pairs = source(tmp_path, ["red heart", "pizza", "sun"])
    tree |= {"iterations": 6, "evaluation": {"every": 6, "num_images": 2, "grid_images": 2}}
    tree["objective"] = {"kind": "dpo", "options": {"pairs": pairs, "beta": 200.0, "levels": 3}, "updates_per_epoch": 1}
    tree["optimizer"] = {"learning_rate": 2e-2}
    tree["sampling"]["guidance_scale"] = 1.0
    trainer = Trainer(parse_config(tree), tmp_path / "run")
    trainer.train()
    rows = metrics(tmp_path / "run")[1:]
    assert [row["dpo_accuracy"] for row in rows[:1]] == [0.5]
    assert rows[-1]["dpo_accuracy"] > 0.6
    assert rows[-1]["dpo_margin"] > 0
    assert "reward" not in rows[-1]
    assert (tmp_path / "run" / "report.html").is_file()
    offline = trainer.blueprint.offline
    assert offline is not None
    drawn = [pair.caption for iteration in (1, 2, 3) for pair in offline.drawn(iteration)]
    assert len(drawn) == 6
    assert all(len(set(drawn[i : i + 2])) == 2 for i in (0, 2, 4))  # no pair twice before every pair once


def test_images_encoded_and_decoded_are_the_images_again_up_to_the_autoencoder() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill=(220, 40, 40))
    image = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None]
    for model in ("emoji-sd", "emoji-flux"):
        policy = load_policy(model)
        latents = policy.encode_images(image)
        assert latents.shape == (1, *policy.latent_shape)
        assert (policy.decode(latents).float() - image.float()).abs().mean() < 8


def test_a_file_of_pairs_needs_groups_of_two(tmp_path: Path) -> None:
    tree = brief_settings(tmp_path)
    tree["rollout"]["images_per_prompt"] = 4
    tree["objective"] = {"kind": "dpo", "options": {"pairs": write_pairs(tmp_path, ["sun"])}}
    with pytest.raises(EtudeError, match=r"set rollout\.images_per_prompt to 2, not 4"):
        Trainer(parse_config(tree), tmp_path / "run")


def test_equal_images_teach_nothing_and_the_best_of_a_group_is_preferred_to_its_worst(tmp_path: Path) -> None:
    tree = brief_settings(tmp_path)
    tree["objective"] = {"kind": "dpo", "options": {"levels": 2}}
    tree["rollout"] = {"images_per_iteration": 6, "images_per_prompt": 3}
    trainer = Trainer(parse_config(tree), tmp_path / "run")
    before = weights(trainer)
    batch, table = trainer._draw(1), trainer.schedule.table_at(1)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, *trainer.policy.latent_shape, generator=generator)
    noise = NoiseSource(0, "objective", 1)
    samples = Samples(
        table, Trajectory.of_images(latents), trainer.policy.encode(batch.own.texts), 1.0, batch.indices, noise, 3
    )
    trainer.learner.update(samples.judged(torch.ones(6)), 1, lambda: None)
    moved = max(float((weights(trainer)[name] - before[name]).abs().max()) for name in before)
    assert moved < 1e-6  # the weight decay alone
    judged = samples.judged(torch.tensor([0.1, 2.0, -1.0, 0.0, -3.0, 1.0]))
    trainer.learner.update(judged, 2, lambda: None)
    assert not same(before, weights(trainer))
    loss = trainer.objective.loss(trainer.policy, judged, torch.tensor([0, 1]), torch.tensor([0, 1]))
    swapped = judged.judged(torch.tensor([9.0, 2.0, -1.0, 0.0, -3.0, 9.0]))
    other = trainer.objective.loss(trainer.policy, swapped, torch.tensor([1]), torch.tensor([1]))
    same_pair = trainer.objective.loss(trainer.policy, judged, torch.tensor([1]), torch.tensor([1]))
    assert torch.equal(other.value, same_pair.value)  # images 5 and 4, in both
    assert loss.value > 0
