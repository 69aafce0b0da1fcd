"""An evaluation is the whole trajectory under the ODE and under the SDE, and the same however many processes share it."""

from __future__ import annotations

import warnings

import pytest
import torch

from etude.config import TrainConfig, parse_config
from etude.errors import EtudeError
from etude.learning.exchange import gather, share
from etude.measuring.pairs import Measurement
from etude.policies.flux import FluxPolicy
from etude.prompts import PromptSet
from etude.rewards import WeightedRewards, register
from etude.sampling.sampler import SDE
from etude.training.evaluation import Evaluation
from support.tiny import flux

PROMPTS = ["red heart", "pizza", "tiger"]


def brightness(images, prompts, **metadata):
    return images.float().mean((1, 2, 3))


class Processes:
    """One of several processes, whose gather joins what all of them gave in turn."""

    def __init__(self, count: int, index: int, given: list[torch.Tensor]) -> None:
        self.num_processes, self.process_index, self.given = count, index, given
        self.device, self.is_main_process = torch.device("cpu"), index == 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self.given.append(values)
        return torch.cat([values] * self.num_processes)


@pytest.fixture(scope="module")
def policy():
    return FluxPolicy(flux())


def config(tmp_path, **sections) -> TrainConfig:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    tree = {
        "rewards": {"brightness": 1.0},
        "prompts": {"train": str(file), "evaluation": str(file)},
        "sampling": {"eta": 1.2, "num_steps": 4, "guidance_scale": 2.0},
        "evaluation": {"num_images": 7, "grid_images": 3},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value}
    return parse_config(tree)


def evaluation(config, policy, out, count=1, index=0, given=None) -> Evaluation:
    register("brightness")(brightness)
    rewards = WeightedRewards(config.rewards)
    return Evaluation(config, policy, rewards, Processes(count, index, [] if given is None else given), out)  # type: ignore[arg-type]


def test_both_sides_take_the_whole_trajectory_whatever_was_trained(policy, tmp_path):
    windowed = config(tmp_path, sampling={"window": {"size": 1, "compression": 0.4}}, evaluation={"num_steps": 5})
    found = evaluation(windowed, policy, tmp_path).measure(lambda images: None)
    captions = [PROMPTS[i % 3] for i in range(7)]
    for side, eta in (("ode", 0.0), ("sde", 1.2)):
        images = SDE(eta, 5, guidance=2.0).draw(policy, captions)
        expected = brightness(images, captions).double().mean().item()
        assert found[side]["brightness"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert (found["eta"], found["num_steps"]) == (1.2, 5)
    assert found["improvement"]["brightness"]["mean"] == 0  # the first is the base model's


def test_the_scores_of_every_image_give_the_estimates(policy, tmp_path):
    measured = evaluation(config(tmp_path), policy, tmp_path)
    result, scores = measured.measure(lambda n: None), measured.scores
    assert scores["clusters"] == [0, 1, 2, 0, 1, 2, 0]
    means = {side: sum(values["brightness"]) / 7 for side, values in scores.items() if side != "clusters"}
    for quantity, expected in {
        "ode": means["ode"],
        "gap": means["ode"] - means["sde"],
        "improvement": means["ode"] - means["base"],
    }.items():
        assert result[quantity]["brightness"]["mean"] == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_progress_counts_the_share_of_this_process(policy, tmp_path):
    done = []
    shared = evaluation(config(tmp_path), policy, tmp_path, count=2, index=1)
    shared.measure(done.append)
    assert sum(done) == shared.work == 2 * 4 * 4


@pytest.mark.parametrize(("count", "number"), [(7, 1), (7, 2), (7, 3), (2, 5), (8, 4)])
def test_shares_cover_all_samples_in_order_and_are_equally_large(count, number):
    shares = [share(count, number, index) for index in range(number)]
    assert len({len(part) for part in shares}) == 1
    assert [i for part in shares for i in part][:count] == list(range(count))


def test_the_shares_of_two_processes_are_the_images_of_one(policy, tmp_path):
    parts = []
    for index in range(2):
        given: list[torch.Tensor] = []
        evaluation(config(tmp_path), policy, tmp_path, 2, index, given).measure(lambda images: None)
        parts.append(given)
    alone: list[torch.Tensor] = []
    evaluation(config(tmp_path), policy, tmp_path, 1, 0, alone).measure(lambda images: None)
    for mine, yours, whole in zip(*parts, alone, strict=True):
        assert torch.allclose(torch.cat([mine, yours])[:7], whole, atol=0.5)  # batches of other sizes round otherwise


def test_gathered_rows_lose_the_padding(tmp_path):
    assert gather(Processes(2, 0, []), torch.arange(4), 7).tolist() == [0, 1, 2, 3, 0, 1, 2]  # type: ignore[arg-type]


def test_any_images_of_a_measurement_are_those_images(policy):
    measurement = Measurement(PromptSet(PROMPTS), lambda images, prompts, metadata: {}, 5)
    whole = measurement.images(policy, SDE(1.2, 3, guidance=2.0))
    some = measurement.images(policy, SDE(1.2, 3, guidance=2.0), samples=[3, 1])
    assert (some.int() - whole[[3, 1]].int()).abs().max() <= 1


def test_prompts_that_are_trained_on_are_counted_and_warned_of(policy, tmp_path):
    settings, rewards = config(tmp_path), WeightedRewards({"jpeg_compressibility": 1.0})
    with pytest.warns(UserWarning, match=r"2 of the 3 prompts in prompts.evaluation are trained on \('red heart'\)"):
        seen = Evaluation(
            settings, policy, rewards, Processes(1, 0, []), tmp_path, trained=PromptSet(["Tiger", "red heart"])
        )
    assert seen.measure(lambda n: None)["prompts_trained_on"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = Evaluation(settings, policy, rewards, Processes(1, 0, []), tmp_path, trained=PromptSet(["tigers"]))
    assert fresh.prompts_trained_on == 0


def test_grids_are_written_when_asked_for(policy, tmp_path):
    made = evaluation(config(tmp_path, evaluation={"strip_images": 0}), policy, tmp_path)
    made.measure(lambda images: None)
    assert not (tmp_path / "samples").exists()
    made.measure(lambda images: None, grids="before")
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"before_ode.png", "before_sde.png", "prompts.json"}


def test_an_eta_that_the_evaluations_levels_do_not_allow_is_refused_at_once(policy, tmp_path):
    wrong = config(tmp_path, sampling={"kernel": "ddim", "eta": 1.9}, evaluation={"num_steps": 9})
    with pytest.raises(EtudeError, match="eta"):
        evaluation(wrong, policy, tmp_path)
