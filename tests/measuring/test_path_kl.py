"""The KL of a path: closed forms, the identity with log-probabilities, and a run that measures it and keeps its strips."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from etude.config import TrainConfig, parse_config
from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.measuring.pairs import Measurement
from etude.measuring.path_kl import images_and_path_kl
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.prompts import PromptSet
from etude.report import write_report
from etude.report.strips import thumbnails
from etude.runs.reader import read_run
from etude.sampling.noise import NoiseSource
from etude.sampling.rollout import rollout
from etude.sampling.sampler import ODE, SDE
from etude.training.trainer import Trainer
from support.gaussian_policy import GaussianPolicy, flow_path, sd_path
from support.small_runs import brief_settings, metrics
from support.tiny import stable_diffusion

STEPS = 5


def measurement(count: int, batch_size: int = 32) -> Measurement:
    return Measurement(PromptSet(["a", "b"]), lambda images, prompts, metadata: {}, count, batch_size=batch_size)


def gaussian(path, eta: float, size=(1, 1)) -> tuple[GaussianPolicy, SDE]:
    sampler = SDE(eta, STEPS, guidance=1.0)
    table = sampler.table(GaussianPolicy(0.3, 0.5, path))
    return GaussianPolicy(0.3, 0.5, path, size, table), sampler


@pytest.mark.parametrize("eta", [0.4, 1.3])
@pytest.mark.parametrize("path", [sd_path(), flow_path()], ids=["vp", "flow"])
def test_a_shift_of_every_step_by_c_standard_deviations_costs_half_c_squared_a_stochastic_step(path, eta):
    policy, sampler = gaussian(path, eta)
    shifts = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5])
    policy.network.shift.data[:] = shifts
    stochastic = torch.tensor(sampler.table(policy).stochastic)
    nats = images_and_path_kl(policy, sampler, measurement(4))[1]
    assert nats == pytest.approx([(shifts[stochastic].square().sum() / 2).item()] * 4, rel=2e-3)
    assert 0 < stochastic.sum() <= STEPS


def test_its_mean_is_that_of_the_log_ratio_of_the_paths():
    """E log p - log p_ref under p: the two estimates of each image differ by noise of mean 0."""
    policy, sampler = gaussian(sd_path(), 1.0)
    policy.network.shift.data[:] = 0.3
    policy.network.feedback.data[:] = torch.tensor([0.2, -0.3, 0.1, 0.4, -0.2])
    measured = measurement(2000, batch_size=2000)
    nats = images_and_path_kl(policy, sampler, measured)[1].double()
    table = sampler.table(policy)
    table = replace(table, trained=table.stochastic)
    texts = measured.shown().texts
    path = rollout(
        policy, table, policy.encode(texts), NoiseSource(0, measured.stream), list(range(2000)), 1.0, 2000, "sum",
        policy.reference,
    )  # fmt: skip
    scaled = (path.states[:, 1:] - path.reference_mean)[..., 0, 0, 0] / table.std[list(path.steps)]
    reference = (-scaled.square() / 2 - table.std[list(path.steps)].log() - torch.tensor(2 * torch.pi).log() / 2).sum(1)
    difference = (path.log_prob.sum(1) - reference).double() - nats
    assert difference.mean().abs() < 4 * difference.std() / 2000**0.5
    assert nats.mean() > 0.2


def test_the_images_are_those_without_it_and_equal_weights_have_none():
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.add_lora(TrainConfig().lora, seed=0)
    sampler, measured = SDE(1.2, 4, guidance=2.0), measurement(5, batch_size=2)
    images, nats = images_and_path_kl(policy, sampler, measured)
    assert torch.equal(images, measured.images(policy, sampler))
    assert nats.tolist() == [0.0] * 5
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    images, nats = images_and_path_kl(policy, sampler, measured, samples=[4, 1])
    assert torch.equal(images, measured.images(policy, sampler, samples=[4, 1]))
    assert (nats > 0).all()


def test_a_deterministic_path_has_no_kl():
    policy = gaussian(sd_path(), 1.0)[0]
    with pytest.raises(EtudeError, match="no stochastic step, and a deterministic path has no KL"):
        images_and_path_kl(policy, SDE(0.0, 3, guidance=1.0), measurement(2))
    with pytest.raises(EtudeError, match="path_kl = true needs a stochastic step"):
        parse_config({"evaluation": {"path_kl": True}, "sampling": {"eta": 0}})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("path-kl")
    tree = {**brief_settings(root), "lora": {"rank": 0}}
    tree["evaluation"] = {"every": 1, "num_images": 4, "grid_images": 2, "path_kl": True, "strip_images": 3}
    trainer = Trainer(parse_config(tree), root / "run")
    trainer.train()
    return trainer, root / "run"


def test_a_run_measures_it_in_every_evaluation_and_keeps_its_strips(run):
    """Full fine-tuning keeps the model before training for it; the base model's KL is 0 to the bit."""
    trainer, out = run
    found = [row["evaluation"]["path_kl"] for row in metrics(out)]
    assert (found[0]["mean"], found[0]["low"], found[0]["high"]) == (0, 0, 0)
    assert 0 < found[1]["low"] < found[2]["mean"]
    texts = trainer.evaluation.measurement.shown().texts[:3]
    assert json.loads((out / "samples/along/prompts.json").read_text()) == texts
    kept = sorted(path.name for path in (out / "samples/along").glob("*.png"))
    assert kept == ["000000.png", "000001.png", "000002.png"]
    images = ODE(3, 2.0).draw(trainer.policy, texts)
    with Image.open(out / "samples/along/000002.png") as picture:
        row = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert (row.int() - torch.cat(list(images), dim=2).int()).abs().max() <= 1


def test_the_report_shows_both(run):
    page = (run[1] / "report.html").read_text()
    assert "KL from the model before training" in page
    assert "<h3>Along training</h3>" in page
    assert "after iterations 0, 1, 2, a row for each of: red heart; pizza; tiger" in page


def test_a_kept_file_that_is_no_picture_is_one_sentence(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    along = tmp_path / "run/samples/along"
    (along / "000001.png").write_bytes((along / "000000.png").read_bytes()[:40])
    with pytest.raises(EtudeError, match=r"000001.png' is not a picture"):
        write_report(tmp_path / "run")
    buffer = io.BytesIO()
    Image.new("RGB", (5, 8)).save(buffer, format="PNG")
    (along / "000001.png").write_bytes(buffer.getvalue())
    with pytest.raises(EtudeError, match=re.escape("000001.png' is 5 x 8")):
        write_report(tmp_path / "run")
    shutil.rmtree(along)
    assert read_run(tmp_path / "run").strips == {}
    assert "Along training" not in write_report(tmp_path / "run").read_text()


def test_a_report_of_many_evaluations_shows_the_first_the_last_and_those_between(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    many = [{**rows[-1], "iteration": i} for i in range(15)]
    atomic_write_text(tmp_path / "run/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in many))
    for i in range(15):
        shutil.copy(run[1] / "samples/along/000000.png", tmp_path / f"run/samples/along/{i:06d}.png")
    assert "after iterations 0, 2, 4, 6, 8, 10, 12, 14" in write_report(tmp_path / "run").read_text()


def test_kept_images_are_small_averages():
    images = torch.arange(256).repeat(3, 256, 1)[None].byte()
    small = thumbnails(images)
    assert small.shape == (1, 3, 128, 128)
    assert torch.equal(small[0, 0, 0], (torch.arange(128) * 2 + 0.5).round().byte())
    assert thumbnails(images[..., :128, :100]) is not None
    assert torch.equal(thumbnails(images[..., :128, :100]), images[..., :128, :100])
