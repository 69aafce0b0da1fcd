"""A reward from votes: it finds what was hidden, at the speed that theory gives, and claims nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from etude import rewards
from etude.errors import EtudeError
from etude.preferences import davidson, features
from etude.preferences.clustering import Clusters
from etude.preferences.pairing import Pairing
from etude.preferences.pool import Pool
from etude.preferences.preference_reward import CARD, HEAD, read_head, write_reward
from etude.preferences.reward_fit import Votes, cross_validate, fit_reward, make_space, minimise
from etude.preferences.shares import estimate_share
from support.preferences import SimulatedRater, fill, quick


def _votes(z: np.ndarray, w: np.ndarray, n: int, rng: np.random.Generator, side: float = 0.0, nu: float = 0.0) -> Votes:
    left, right = rng.integers(len(z), size=(2, n))
    d = (z[left] - z[right]) @ w + side
    return Votes(left, right, davidson.simulate(d, np.log(nu) if nu else -np.inf, rng), np.zeros(n, np.intp))


def test_the_minimum_is_that_of_newtons_method_without_ridge() -> None:
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(200, 4)), np.array([0.8, -0.3, 0.0, 0.4])
    votes = _votes(z, w, 1500, rng, side=0.3, nu=0.6)
    best = minimise(z, votes, ridge=1e-6)
    design = np.column_stack([z[votes.left] - z[votes.right], np.ones(1500)])
    exact = davidson.fit(design, votes.outcome, Clusters.of(np.arange(1500)))
    np.testing.assert_allclose(best.w, exact.theta[:4], atol=1e-3)
    assert best.side[0] == pytest.approx(exact.theta[4], abs=1e-3)
    assert best.eta[0] == pytest.approx(exact.eta, abs=1e-3)


def test_the_error_of_the_utility_falls_with_the_votes_as_fishers_information_says() -> None:
    """E (x . (w_fit - w))^2 = tr(C X) / n with C the inverse information of a vote and X = E x x', within 25 % at 30 repeats."""
    rng = np.random.default_rng(1)
    z, w = rng.normal(size=(2000, 8)), rng.normal(size=8) * 0.5
    pairs = rng.integers(2000, size=(2, 20_000))
    x = z[pairs[0]] - z[pairs[1]]
    moment = x.T @ x / len(x)
    h = davidson.information(x @ w, np.log(0.5))
    information = x.T @ (x * h[:, 0, 0, None]) / len(x)
    across = x.T @ h[:, 0, 1] / len(x)  # the tie parameter is estimated, too
    information -= np.outer(across, across) / h[:, 1, 1].mean()
    expected = np.trace(np.linalg.solve(information, moment))
    correlations = []
    for n in (500, 2000, 8000):
        fits = [minimise(z, _votes(z, w, n, rng, nu=0.5), 1e-3).w for _ in range(30)]
        errors = [(each - w) @ moment @ (each - w) for each in fits]
        assert np.mean(errors) == pytest.approx(expected / n, rel=0.25)
        correlations.append(np.mean([np.corrcoef(z @ each, z @ w)[0, 1] for each in fits]))
    assert correlations[0] < correlations[1] < correlations[2]
    assert correlations[2] > 0.98


def test_each_raters_leaning_is_found_by_rater_effects() -> None:
    rng = np.random.default_rng(2)
    z, w = rng.normal(size=(300, 3)), np.array([1.0, 0.5, 0.0])
    parts = [_votes(z, w, 1500, rng, side=side) for side in (-0.6, 0.0, 0.6)]
    votes = Votes(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("left", "right", "outcome")),
        np.repeat([0, 1, 2], 1500),
    )
    np.testing.assert_allclose(minimise(z, votes, 1e-3).side, [-0.6, 0.0, 0.6], atol=0.2)


def test_votes_at_random_are_told_from_chance_in_few_of_25_simulations() -> None:
    rng, told = np.random.default_rng(3), 0
    for _ in range(25):
        z = rng.normal(size=(120, 6)) / 3
        prompt = np.repeat(np.arange(30), 4)
        left = rng.integers(120, size=200)
        right = (left // 4) * 4 + (left + rng.integers(1, 4, size=200)) % 4
        votes = Votes(left, right, rng.choice([-1, 1], 200).astype(np.int8), np.zeros(200, np.intp))
        checked = cross_validate(z, votes, prompt[left], 0, lambda done, total: None)
        told += estimate_share(checked.right(votes), Clusters.of(prompt[left])).low > 0.5
    assert told <= 3  # 2.5 % are expected


def test_the_components_are_those_within_prompts_and_pairs_differ_by_one() -> None:
    rng = np.random.default_rng(4)
    prompts = np.repeat([f"p{i}" for i in range(50)], 4)
    shared = np.repeat(rng.normal(size=(50, 10)) * 100, 4, axis=0)  # differs between prompts only
    f = np.column_stack([shared, rng.normal(size=(200, 5))]).astype(np.float32)
    left = np.arange(0, 200, 4)
    votes = Votes(left, left + 1, np.ones(50, np.int8), np.zeros(50, np.intp))
    space = make_space(f, prompts, votes, (10, 5))
    x = space.z[votes.left] - space.z[votes.right]
    assert (x**2).sum(axis=1).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(space.z, (f - space.mean) @ space.basis, atol=1e-9)
    assert np.abs(space.basis[:10]).max() < 1e-6 * np.abs(space.basis[10:]).max()


class Colours:
    """A backbone of six numbers."""

    def describe(self, images: torch.Tensor, prompts: list[str]) -> list[torch.Tensor]:
        x = images.float() / 255
        return [x.mean((2, 3)), x.std((2, 3))]


def test_a_block_of_few_features_is_heard_beside_one_of_many() -> None:
    """500 votes on a utility of one feature of 4, beside a block of 1,000 features of noise."""
    rng = np.random.default_rng(5)
    f = rng.normal(size=(400, 1004)).astype(np.float32)
    prompts = np.repeat([f"p{i}" for i in range(100)], 4)
    left = rng.integers(400, size=500)
    right = (left // 4) * 4 + (left + rng.integers(1, 4, size=500)) % 4
    y = davidson.simulate(1.5 * (f[left, 1000] - f[right, 1000]), -np.inf, rng)
    votes, found = Votes(left, right, y, np.zeros(500, np.intp)), []
    for blocks in ((1000, 4), (1004,)):
        space = make_space(f, prompts, votes, blocks)
        score = space.z @ minimise(space.z, votes, 1.0).w
        found.append(np.corrcoef(score[left] - score[right], f[left, 1000] - f[right, 1000])[0, 1])
    assert found[0] > 0.9
    assert found[0] > found[1] + 0.2


def test_a_feature_that_hardly_varies_in_the_pool_gets_no_large_weight() -> None:
    """Other images may show it: at the weight of a unit of variance they would get any score."""
    rng = np.random.default_rng(7)
    f = rng.normal(size=(200, 10)).astype(np.float32)
    f[:, 9] *= 1e-5
    prompts = np.repeat([f"p{i}" for i in range(50)], 4)
    left = np.repeat(np.arange(0, 200, 4), 3)
    votes = Votes(left, left + np.tile([1, 2, 3], 50), rng.choice([-1, 1], 150).astype(np.int8), np.zeros(150, np.intp))
    space = make_space(f, prompts, votes, (10,))
    weight = space.basis @ minimise(space.z, votes, 0.1).w
    assert abs(weight[9]) < np.abs(weight[:9]).max()
    f[:, :9] = 0  # and one that is constant counts for nothing
    assert np.abs(make_space(f, prompts, votes, (9, 1)).basis[:9]).max() == 0


def test_the_statistics_are_those_of_numpy() -> None:
    images = np.random.default_rng(6).integers(0, 256, (3, 3, 9, 7)).astype(np.uint8)
    rows = features.statistics(torch.from_numpy(images)).numpy()
    x = images / 255
    np.testing.assert_allclose(rows[:, :3], x.mean((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(rows[:, 8], (x[:, 0] - x[:, 1]).std((1, 2), ddof=1), rtol=1e-5)


def red(pixels: np.ndarray) -> float:
    return float(pixels[0].mean() - pixels[2].mean()) / 64


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """400 votes of a rater who likes red, leans to the left, and ties at times."""
    pool = fill(quick(tmp_path_factory.mktemp("fit") / "pool"), prompts=50, each=5)
    vote(pool, SimulatedRater(red, sharpness=0.7, side=0.8, nu=0.4), 400)
    return pool


def vote(pool: Pool, rater: SimulatedRater, count: int, name: str = "ann") -> None:
    pairing = Pairing(pool, seed=0)
    digests = {image.id: image.digest for image in pool.images()}
    for _ in range(count):
        number = pairing.next(name)
        _, left, right = pool.open_pairs(name)[0]
        pool.vote(number, name, rater.answer(digests[left], digests[right], pool.pixels))


@pytest.fixture(autouse=True)
def _small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "load_backbone", lambda name: Colours())
    monkeypatch.setattr("etude.preferences.preference_reward.load_backbone", lambda name: Colours())


def test_a_fit_finds_the_hidden_utility_the_leaning_and_the_inconsistency(voted: Pool, tmp_path: Path) -> None:
    fitted = fit_reward(voted)
    assert fitted.told_from_chance
    assert fitted.agreement.left.low > 0.5
    side, slope = fitted.card["side"], fitted.card["slope"]
    assert side["low"] > 0
    assert 0.3 < side["mean"] < 1  # 0.8, less what the reward does not explain
    assert slope["low"] <= 1 <= slope["high"]
    assert fitted.agreement.own.n >= 20
    assert 0.5 < fitted.agreement.own.mean < 1
    assert fitted.accuracy.low <= fitted.agreement.ceiling.high
    assert "a leaning to the left" in " ".join(fitted.lines())
    assert [row["votes"] for row in fitted.card["curve"]] == sorted(row["votes"] for row in fitted.card["curve"])
    write_reward(fitted, tmp_path / "taste")
    reward = rewards.get(f"preference:{tmp_path / 'taste'}")
    pixels = np.stack([voted.pixels(image.digest) for image in voted.images()])
    scores = rewards.score_one("taste", reward, torch.from_numpy(pixels), [image.prompt for image in voted.images()])
    assert np.corrcoef(scores.numpy(), [red(each) for each in pixels])[0, 1] > 0.97
    assert abs(float(scores.mean())) < 1e-3  # the pool's mean is 0
    assert reward.revisions() == {str(tmp_path / "taste"): read_head(tmp_path / "taste").digest}


def test_features_are_computed_once_and_new_images_are_added(voted: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = features.pool_features(voted, "embedded")
    monkeypatch.setattr(features, "load_backbone", lambda name: pytest.fail("the cache was not used"))
    assert np.array_equal(features.pool_features(voted, "embedded").values, first.values)


def test_the_most_informative_pair_is_the_least_known_one(voted: Pool, tmp_path: Path) -> None:
    write_reward(fit_reward(voted), tmp_path / "taste")
    head = read_head(tmp_path / "taste")
    known = features.pool_features(voted, "embedded")
    informs = head.unsure(known)
    x = known.values @ head.basis.numpy()
    ids = known.images.tolist()
    near, far = (ids[0], ids[0]), (ids[0], ids[int(np.argmax(((x - x[0]) ** 2).sum(axis=1)))])
    assert informs([near])[0] < informs([far])[0]
    unknown = (ids[0], max(ids) + 1)  # drawn since
    taught = informs([near, unknown, far])
    assert taught[1] == pytest.approx((taught[0] + taught[2]) / 2)
    assert informs([unknown])[0] > 0


def test_a_coin_gives_no_reward_unless_it_is_asked_for_anyway(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from etude.cli.app import app

    pool = fill(quick(tmp_path / "pool"), prompts=20, each=4)
    vote(pool, SimulatedRater(red, sharpness=0.0), 80)
    pool.close()
    arguments = ["preferences", "fit", str(tmp_path / "pool"), "--out", str(tmp_path / "taste")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "cannot be told from chance" in result.output
    assert not (tmp_path / "taste").exists()
    result = CliRunner().invoke(app, [*arguments, "--anyway"])
    assert result.exit_code == 0, result.output
    with pytest.warns(UserWarning, match="cannot be told from chance"):
        rewards.get(f"preference:{tmp_path / 'taste'}")


def test_too_few_votes_are_no_fit(tmp_path: Path) -> None:
    pool = fill(quick(tmp_path / "pool"), prompts=3, each=3)
    with pytest.raises(EtudeError, match=r"has 0 decided votes on 0 prompts: a fit needs 20"):
        fit_reward(pool)


def test_a_damaged_reward_is_refused_in_a_sentence(voted: Pool, tmp_path: Path) -> None:
    taste = tmp_path / "taste"
    write_reward(fit_reward(voted), taste)
    card, head = (taste / CARD).read_text(), (taste / HEAD).read_bytes()
    (taste / HEAD).write_bytes(head[:-8])
    with pytest.raises(EtudeError, match="is not the file that"):
        read_head(taste)
    (taste / HEAD).write_bytes(head)
    for change in ({"kind": "x"}, {"version": 2}, {"eta": "x"}, {"backbone": 3}):
        (taste / CARD).write_text(json.dumps({**json.loads(card), **change}))
        with pytest.raises(EtudeError):
            read_head(taste)
    (taste / CARD).write_text("[" * 100_000)
    with pytest.raises(EtudeError, match="holds no reward"):
        read_head(taste)
    with pytest.raises(EtudeError, match="holds no reward"):
        rewards.get(f"preference:{tmp_path / 'nowhere'}")
    with pytest.raises(EtudeError, match="needs the directory of a fit"):
        rewards.get("preference")
