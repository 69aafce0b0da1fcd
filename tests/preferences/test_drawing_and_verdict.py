"""Pools that are drawn, sides that are judged, the page of it all, and a pool of 100,000 votes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import etude
from etude.cli.app import app
from etude.config import SamplerSettings
from etude.errors import EtudeError
from etude.policies.source import ModelSource
from etude.preferences.drawing import STREAM, parse_side
from etude.preferences.pairing import Pairing
from etude.preferences.pool import Pool
from etude.preferences.preference_page import write_page
from etude.preferences.reward_fit import RIDGES, Votes, cross_validate
from etude.preferences.verdict import Watch, judge
from etude.preferences.voting_desk import Desk
from etude.sampling.solvers import Solver
from support.preference_scale import large_pool, vote_seconds
from support.preferences import fill, quick
from support.tiny import save_stable_diffusion

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    return save_stable_diffusion(root / "sd")


def run(*arguments: object) -> str:
    result = RUNNER.invoke(app, ["preferences", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = RUNNER.invoke(app, ["preferences", *map(str, arguments)])
    assert result.exit_code != 0
    return " ".join(result.output.split())


def drawn(model: Path, out: Path, *more: object) -> str:
    prompts = model.parent / "prompts.txt"
    return run("draw", model, "--prompts", prompts, "--images", 2, "--steps", 2, "--out", out, *more)


def test_a_pool_holds_the_keyed_images_and_all_that_made_them(model: Path, tmp_path: Path) -> None:
    drawn(model, tmp_path / "pool", "--eta", 0, "--eta", 1.2)
    policy = etude.load_policy(model)
    texts = ["red heart", "pizza", "tiger", "sun"] * 2
    with Pool(tmp_path / "pool") as pool:
        makers = pool.makers()
        assert [maker.settings["sampler"]["kind"] for maker in makers.values()] == ["SDE", "SDE"]
        assert [maker.settings["sampler"]["eta"] for maker in makers.values()] == [0.0, 1.2]
        for maker in makers.values():
            assert {"model", "commit", "adapter_sha256", "seed", "sampler", "stream", "dtype"} <= set(maker.settings)
            images = [image for image in pool.images() if image.maker == maker.id]
            assert [image.prompt for image in images] == texts
            sampler = etude.SDE(eta=maker.settings["sampler"]["eta"], steps=2)
            expected = sampler.draw(policy, texts, 0, stream=STREAM).numpy()
            assert all(
                np.array_equal(pool.pixels(image.digest), pixels)
                for image, pixels in zip(images, expected, strict=True)
            )
        before = pool.images()
    drawn(model, tmp_path / "pool", "--eta", 0, "--eta", 1.2)  # as after a kill
    with Pool(tmp_path / "pool") as pool:
        assert pool.images() == before


def test_a_side_names_model_adapter_and_sampler() -> None:
    base, beside = ModelSource(""), SamplerSettings(guidance=3.0, size=64)
    source, sampler = parse_side("emoji-sd,lora=runs/a/lora,eta=1.2,steps=7", base, beside)
    assert (source.name, source.lora, source.resolution) == ("emoji-sd", "runs/a/lora", 64)
    assert sampler == etude.SDE(eta=1.2, steps=7, guidance=3.0)
    assert parse_side("emoji-sd", base, SamplerSettings(steps=9))[1] == etude.ODE(9, 5.0)
    assert parse_side("emoji-sd", base, beside)[1] == etude.ODE(20, 3.0)
    assert parse_side("emoji-sd,solver=heun", base, beside)[1] == Solver("heun", 20, 3.0)
    assert parse_side("emoji-sd,heun", base, beside) == parse_side("emoji-sd,solver=heun", base, beside)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("emoji-sd,etta=1", "did you mean 'eta'"),
        ("emoji-sd,eta=x", "eta"),
        ("emoji-sd,steps=0", "steps"),
        ("emoji-sd,kernel=cps", "give an eta above 0"),
        ("emoji-sd,solver=heun,eta=1.2", "deterministic"),
        ("emoji-sd,eta=1,eta=2", "stands twice"),
        ("emoji-sd,lora=a,lora=b", "at most one lora"),
        (",eta=1", "one model"),
    ],
)
def test_no_option_of_a_side_is_ignored(text: str, words: str) -> None:
    with pytest.raises(EtudeError, match=words):
        parse_side(text, ModelSource(""), SamplerSettings())


def test_a_judgement_pairs_prompt_and_noise_counts_for_a_and_says_when_it_is_decided(
    model: Path, tmp_path: Path
) -> None:
    prompts, out = model.parent / "prompts.txt", tmp_path / "judged"
    sides = [model, f"{model},eta=1.2"]
    shared = ["--prompts", prompts, "--steps", 2, "--out", out]
    assert "vote: etude preferences vote" in run("judge", *sides, *shared, "--draw-only")
    with Pool(out) as pool:
        assert [maker.settings["sampler"]["kind"] for maker in pool.makers().values()] == ["ODE", "SDE"]
        a, b = pool.fact("sides")
        pairing = Pairing(pool, repeat_share=0.0, seed=0)
        assert pairing.total == 4
        for _ in range(4):
            pair = pairing.next("ann")
            (_, left, right), *_ = pool.open_pairs("ann")
            one, other = pool.image(left), pool.image(right)
            assert {one.maker, other.maker} == {a, b}
            assert (one.sample, one.prompt) == (other.sample, other.prompt)
            pool.vote(pair, "ann", "left" if one.maker == a else "right")
        assert pairing.next("ann") is None
        verdict = judge(pool)
        assert (verdict.win_rate.mean, verdict.win_rate.n, verdict.running.n) == (1.0, 4, 4)
        assert verdict.running.decision() is None
        assert Watch(pool).enough() is None
    assert "A wins 100.0 %" in run("judge", "--verdict", "--out", out, "--json", tmp_path / "verdict.json")
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"] is None
    shared.append("--draw-only")
    assert "two sides that differ" in refused("judge", model, model, *shared)
    for other in (sides[::-1], [model, f"{model},eta=0.7"]):
        assert "judges other sides" in refused("judge", *other, *shared)
    assert "would bend the verdict" in refused("vote", out, "--reward", tmp_path)
    with Pool(out) as pool:
        assert len(pool.makers()) == 2  # nothing was drawn for the refused sides


def _judged(tmp_path: Path, prompts: int, share: float) -> Pool:
    """A judgement of made-up images in which A wins that share of the votes of each of two raters."""
    pool = fill(fill(quick(tmp_path / "judged"), prompts, 1, "side A"), prompts, 1, "side B", seed=1)
    pool.set_fact("sides", [1, 2])
    rng = np.random.default_rng(0)
    for rater in ("ann", "bob"):
        for sample in range(prompts):
            left, right = (sample + 1, sample + 1 + prompts)[:: 1 if rng.random() < 0.5 else -1]
            wins = rng.random() < share
            pool.vote(pool.add_pair(left, right, rater), rater, "left" if (left <= prompts) == wins else "right")
    return pool


def test_a_verdict_uses_each_prompt_once_and_tells_no_voter_who_won(tmp_path: Path) -> None:
    pool = _judged(tmp_path, prompts=60, share=0.85)
    verdict = judge(pool)
    assert (verdict.win_rate.n, verdict.running.n) == (120, 60)
    assert verdict.running.decision() == "A"
    assert verdict.win_rate.low > 0.5
    assert "people prefer A" in "\n".join(verdict.lines())
    said = Watch(pool).enough()
    assert said is not None
    assert "A" not in said.replace("are", "")
    assert "side" not in json.dumps(Desk(pool, Pairing(pool, seed=0), 0).pairs({"rater": "eve"}))


def test_the_page_says_enough_when_the_verdict_is_decided_whatever_is_voted_and_withdrawn(tmp_path: Path) -> None:
    pool = _judged(tmp_path, prompts=30, share=0.9)
    watch, rng, said = Watch(pool), np.random.default_rng(1), set()
    pairing = Pairing(pool, repeat_share=0.2, seed=0)
    for _ in range(80):
        rater = f"rater {rng.integers(3)}"
        if rng.random() < 0.3:
            pool.undo(rater if rng.random() < 0.5 else "ann")
        else:
            pairing.next(rater)
            if shown := pool.open_pairs(rater):
                pool.vote(shown[0][0], rater, str(rng.choice(["left", "right", "tie", "skip"])))
        assert (watch.enough() is None) == (judge(pool).running.decision() is None)
        said.add(watch.enough())
    assert len(said) == 2  # the withdrawn votes undecide it


def test_the_page_shows_hostile_names_as_text_and_asks_no_other_host(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    pool = fill(quick(tmp_path / "pool"), prompts=4, each=3, label=hostile)
    pairing = Pairing(pool, seed=0)
    for _ in range(8):
        pool.vote(pairing.next("<b>ann</b>"), "<b>ann</b>", "left")
    text = write_page(pool).read_text()
    assert hostile not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;ann&lt;/b&gt; 8" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    verdict = write_page(_judged(tmp_path, 30, 0.9), out=tmp_path / "verdict.html").read_text()
    assert "People prefer A." in verdict


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return large_pool(tmp_path_factory.mktemp("large") / "pool")


def test_a_page_of_a_pool_with_100_000_votes_takes_less_than_100_ms(large: Pool) -> None:
    """CPU time of a vote and the answer with the next pairs, in the median of 20."""
    assert vote_seconds(large, 20) < 0.1
    assert large.count("rater 3") == 5020


def test_a_page_of_a_judgement_with_100_000_votes_takes_less_than_100_ms(tmp_path: Path) -> None:
    assert vote_seconds(large_pool(tmp_path / "judged", makers=2), 20) < 0.1


@pytest.mark.slow
def test_a_fold_of_a_fit_to_100_000_votes_takes_seconds(large: Pool) -> None:
    """A 5-fold fit makes 45 minimisations; here 2 folds of 9 on 8 features, so that only the votes are large."""
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(10_000, 8)) / 4, rng.normal(size=8)
    ballots = large.ballots()
    left, right = ballots.left - 1, ballots.right - 1
    keep = (left < 10_000) & (right < 10_000)
    outcome = np.sign((z[left] - z[right]) @ w + rng.logistic(size=len(left))).astype(np.int8)
    votes = Votes(left[keep], right[keep], outcome[keep], np.zeros(int(keep.sum()), np.intp))
    start = time.process_time()
    checked = cross_validate(z, votes, (left[keep] // 4) % 2, 0, lambda done, total: None)
    assert time.process_time() - start < 60
    assert checked.ridge in RIDGES
    assert checked.right(votes).mean() > 0.55
