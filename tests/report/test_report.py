"""The report: one self-contained page, whatever part of a run exists, with nothing of a user's text taken as markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.report import write_report
from etude.report.grids import GAP, LINE_HEIGHT, image_grid
from etude.report.page import duration, interval
from etude.rewards import WEIGHTED_SUM

HOSTILE = "<script>alert('x')</script>&{{ 7 * 7 }}$a_b$"


def estimate(mean: float, half: float = 0.1) -> dict[str, Any]:
    return {
        "mean": mean,
        "standard_error": half / 2,
        "low": mean - half,
        "high": mean + half,
        "n": 64,
        "clusters": 32,
        "clustered": True,
    }


def evaluation(rewards: list[str], improvement: float, gap: float) -> dict[str, Any]:
    values = {"ode": 2.0, "sde": 2.0 - gap, "gap": gap, "improvement": improvement}
    return {"eta": 1.2, "num_steps": 20} | {q: {name: estimate(v) for name in rewards} for q, v in values.items()}


def metrics(
    rewards: list[str], iterations: int = 4, improvement: float = 1.25, gap: float = 0.31
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "iteration": 0,
            "evaluation": evaluation(rewards, 0.0, gap),
            "seconds": {"evaluation": 3.0, "total": 3.0},
            "memory_mb": 900.0,
        }
    ]
    for i in range(1, iterations + 1):
        row = {"iteration": i, "reward": {name: {"mean": 1.0 + i, "std": 0.5} for name in rewards}}
        row |= {
            "loss": 0.01,
            "approx_kl": 0.002,
            "clipfrac": 0.1,
            "ratio_mean": 1.0,
            "grad_norm": 0.4,
            "zero_std_ratio": 0.0,
        }
        row |= {"seconds": {"rollout": 4.0, "rewards": 0.5, "update": 5.5, "total": 10.0}, "memory_mb": 1000.0 + i}
        rows.append(row)
    rows[-1]["evaluation"] = evaluation(rewards, improvement, gap)
    return rows


def write_run(
    path: Path, rows: list[dict[str, Any]] | None = None, rewards: list[str] | None = None, done: bool = True
) -> Path:
    rewards = rewards or ["alignment"]
    rows = metrics(rewards) if rows is None else rows
    path.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(rewards=dict.fromkeys(rewards, 1.0), sampling={"eta": 1.2}, iterations=9)
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if done:
        summary = {
            "model": "emoji-sd",
            "eta": 1.2,
            "rewards": rewards,
            "held_out_rewards": [],
            "final": rows[-1].get("evaluation"),
        }
        summary |= {
            "peak_memory_mb": 1536.0,
            "versions": {"torch": "2.13.0"},
            "machine": {"cores": 2, "gpu": None},
            "deploy": "Ship the ODE sampler.",
        }
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path


def write_grids(path: Path, prompts: list[str]) -> None:
    (path / "samples").mkdir()
    for name in ("before_ode", "after_ode", "before_sde", "after_sde"):
        image_grid(torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8), 2, labels=prompts).save(
            path / "samples" / f"{name}.png"
        )
    (path / "samples" / "prompts.json").write_text(json.dumps(prompts))


class Page(HTMLParser):
    """Tags, attributes and visible text; checks that elements are closed in order."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_finished_run_shows_both_numbers_with_their_intervals(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_grids(run, ["a cat", "the sea"])
    page = Page(write_report(run))
    for text in (
        "+1.25 95 % interval [+1.15, +1.35]",
        "+0.31 95 % interval [+0.21, +0.41]",
        "Ship the ODE sampler.",
        "2.13.0",
    ):
        assert text in page.text
    assert "Tuning raised the reward" in page.text
    assert "64 pairs of images of 32 held-out prompts" in page.text
    assert "has not" not in page.text
    assert len(page.all("img")) == 4


@pytest.mark.parametrize(
    ("improvement", "gap", "words"),
    [
        (1.0, 0.0, ["Tuning raised", "cannot be told apart"]),
        (0.05, 0.5, ["No improvement is shown", "scores higher than the SDE at η = 1.2"]),
        (-1.0, -0.5, ["Tuning lowered", "scores lower than the SDE at η = 1.2"]),
    ],
)
def test_the_words_follow_the_interval(tmp_path: Path, improvement: float, gap: float, words: list[str]) -> None:
    page = Page(write_report(write_run(tmp_path, metrics(["alignment"], improvement=improvement, gap=gap))))
    assert all(word in page.text for word in words)


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_grids(run, ["a cat"])
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(run / "report.html")
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    sources = [a.get(key) for _, a in page.elements for key in ("src", "href", "xlink:href") if a.get(key)]
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_every_picture_has_a_text_and_every_reference_a_target(tmp_path: Path) -> None:
    run = write_run(tmp_path, rewards=["alignment", "colorfulness"])
    write_grids(run, ["a cat"])
    page = Page(write_report(run))
    assert all(a["alt"] for a in page.all("img"))
    assert "a cat" in page.all("img")[0]["alt"]
    assert all(a["role"] == "img" and a["aria-label"] for a in page.all("svg"))
    ids = {a["id"] for _, a in page.elements if "id" in a}
    used = {a["xlink:href"][1:] for a in page.all("use")} | set(re.findall(r"url\(#([^)]+)\)", str(page.elements)))
    assert used
    assert used <= ids


def test_text_of_users_is_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path, rewards=[HOSTILE])
    write_grids(run, [HOSTILE])
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"# {HOSTILE}\n")
    page = Page(write_report(run))
    assert page.all("script") == []
    assert page.text.count(HOSTILE) >= 3
    assert HOSTILE in page.all("img")[0]["alt"]


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in html
    assert "#0a0b" not in html
    assert {"var(--ode)", "var(--sde)", "var(--gap)", "var(--gain)"} <= set(re.findall(r"var\(--[a-z-]+\)", html))


def test_each_phase_is_summed_over_the_run(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path)))
    assert "update 22.0 s 51 %" in page.text
    assert "evaluation 3.0 s 7 %" in page.text
    assert "total 43.0 s" in page.text


def windowed(starts: list[int], size: int = 4) -> list[dict[str, Any]]:
    rows = metrics(["alignment"], iterations=len(starts))
    for row, start in zip(rows[1:], starts, strict=True):
        row["window"] = {"start": start, "size": size}
    return rows


def flow_config(path: Path, **sampling: Any) -> None:
    """Gives a run the settings of a flow model, those that this version may not know included."""
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["sampling"] |= {"kernel": "flow_sde", "num_steps": 10, **sampling}
    tree |= {"model": "emoji-flux", "advantage": {"kind": "group"}, "resolution": 64}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))


def test_a_moving_window_is_shown_with_the_visits_of_every_step(tmp_path: Path) -> None:
    run = write_run(tmp_path, windowed([0, 0, 1, 1, 2, 0]), done=False)
    flow_config(run, window={"strategy": "progressive", "size": 4, "compression": 0.4})
    page = Page(write_report(run))
    assert "algorithm MixGRPO-Flash kernel flow_sde" in page.text
    assert "These steps of 10 were sampled with noise" in page.text
    assert "fewer steps of a second-order solver" in page.text
    assert "higher than the SDE at η = 1.2 in every step" in page.text  # which no iteration sampled, nor trained
    assert "Samples with noise in the window's steps, training prompts" in page.text
    alts = [a["aria-label"] for a in page.all("svg")]
    assert "Window of trained steps over 6 iterations: starts from step 0 to step 0, at 3 positions." in alts
    visits = "step 0 3, step 1 5, step 2 6, step 3 6, step 4 3, step 5 1"
    assert f"Iterations in which each step was in the window: {visits}." in alts


def test_a_window_of_one_iteration_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, windowed([3], size=2), done=False)
    flow_config(run, window={"strategy": "fixed", "size": 2})
    page = Page(write_report(run))
    assert "the rest followed the ODE" in page.text
    assert any(
        "over 1 iteration: starts from step 3 to step 3, at 1 position." in a["aria-label"] for a in page.all("svg")
    )


def test_a_flow_run_without_a_window_shows_none(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    flow_config(run, window=None)
    page = Page(write_report(run))
    assert "algorithm GRPO kernel flow_sde" in page.text
    assert "Trained steps" not in page.text


def test_several_and_held_out_rewards_are_all_shown(tmp_path: Path) -> None:
    rows = metrics(["alignment", "colorfulness", "jpeg_compressibility", WEIGHTED_SUM])
    for row in rows:
        row["reward"] = {name: v for name, v in row.get("reward", {}).items() if name in ("alignment", "colorfulness")}
    page = Page(write_report(write_run(tmp_path, rows, rewards=["alignment", "colorfulness"])))
    assert "jpeg_compressibility (not trained on)" in page.text
    assert page.text.count("(not trained on)") == 1
    assert f"{WEIGHTED_SUM} of the trained 2.00" in page.text
    assert len([a for a in page.all("div") if a.get("class") == "card gain"]) == 2


@pytest.mark.parametrize(
    ("rows", "sentences"),
    [
        ([], ["No evaluation has been written", "No reward has been measured", "No update", "No time and no memory"]),
        (metrics(["alignment"])[:1], ["No update has been written", "No image grid", "0 of 9"]),
        (
            [{"iteration": 1, "reward": {"alignment": {"mean": 1.0, "std": float("nan")}}, "loss": float("nan")}],
            ["No evaluation"],
        ),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    tmp_path: Path, rows: list[dict[str, Any]], sentences: list[str]
) -> None:
    page = Page(write_report(write_run(tmp_path, rows, done=False)))
    for sentence in ["This run has not finished", "Versions and the machine are written when the run ends", *sentences]:
        assert sentence in page.text


def test_a_run_without_metrics_or_with_some_grids_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, done=False)
    (run / "metrics.jsonl").unlink()
    write_grids(run, ["a cat"])
    (run / "samples" / "after_ode.png").unlink()
    assert "The other grids have not been written" in Page(write_report(run)).text


def test_a_line_cut_off_by_a_kill_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')
    assert "was cut off while it was written" in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"iteration": 0}\nnot json\n', "line 2 is not valid JSON"),
        ("metrics.jsonl", "[1]\n", "line 1 is not a row of metrics"),
        ("summary.json", "{", "summary.json' is not valid JSON"),
        ("summary.json", "[]", "holds a list where a dict belongs"),
        ("config.yaml", "a: [", "config.yaml' is not valid YAML"),
        ("config.yaml", "", "holds a NoneType where a dict belongs"),
    ],
)
def test_a_damaged_file_is_named_and_no_report_is_left(tmp_path: Path, file: str, content: str, message: str) -> None:
    run = write_run(tmp_path)
    (run / file).write_text(content)
    with pytest.raises(EtudeError, match=re.escape(message)):
        write_report(run)
    assert not list(run.glob("*report*"))


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EtudeError, match=r"is not a run: it has no config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(EtudeError, match="is not a directory"):
        write_report(tmp_path / "nowhere")


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


def test_importing_the_report_imports_no_plotting_and_no_torch() -> None:
    code = (
        "import sys, etude.report, etude.report.grids; assert not {'matplotlib', 'torch', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_read_as_people_write_them() -> None:
    assert interval(estimate(-0.25)) == "−0.25 [−0.35, −0.15]"
    assert interval(None) == "–"
    assert [duration(s) for s in (0.04, 59.96, 245, 12_000)] == ["0.0 s", "60.0 s", "4 min 05 s", "3 h 20 min"]


def test_a_grid_holds_every_pixel_of_every_image_enlarged() -> None:
    images = torch.randint(0, 256, (5, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = image_grid(images, columns=3, scale=2)
    assert grid.size == (6 + 3 * (18 + 6), 6 + 2 * (14 + 6))
    pixels = (
        torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(grid.height, grid.width, 3).permute(2, 0, 1)
    )
    for index, image in enumerate(images):
        left, top = 6 + index % 3 * 24, 6 + index // 3 * 20
        assert torch.equal(pixels[:, top : top + 14 : 2, left : left + 18 : 2], image)
        assert torch.equal(pixels[:, top + 1 : top + 14 : 2, left + 1 : left + 18 : 2], image)


def test_labels_are_drawn_under_their_cells_and_never_outside() -> None:
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    long = "an unpronounceably-long-hyphenated-word-that-cannot-fit and many more words than three lines can ever hold"
    plain, labelled = (image_grid(images, 2, labels=labels) for labels in (["", ""], ["cat", long]))
    assert labelled.height > plain.height
    assert labelled.width == plain.width
    ink = (
        torch.frombuffer(bytearray(labelled.convert("L").tobytes()), dtype=torch.uint8).view(labelled.height, -1) < 128
    )
    assert not ink[:14].any()
    middle = labelled.width // 2
    assert ink[14:, :middle].any()
    assert ink[14:, middle:].sum() > 3 * ink[14:, :middle].sum()
    assert not ink[:, middle - 2 : middle + 2].any()


def test_a_title_stands_above_each_row_and_moves_nothing_else() -> None:
    images = torch.zeros(4, 3, 90, 90, dtype=torch.uint8)
    plain = image_grid(images, 2)
    titled = image_grid(
        images, 2, titles=["base, ODE", "a title far longer than the two images beside one another are"]
    )
    assert titled.size == (plain.width, plain.height + 2 * LINE_HEIGHT)
    for row in range(2):
        top = GAP + row * (plain.height - GAP) // 2
        lower = top + (row + 1) * LINE_HEIGHT
        own = titled.crop((0, lower, titled.width, lower + 90))
        assert own.tobytes() == plain.crop((0, top, plain.width, top + 90)).tobytes()
    with pytest.raises(EtudeError, match="a grid of 2 rows needs as many titles, not 1"):
        image_grid(images, 2, titles=["base"])


@pytest.mark.parametrize(
    ("n", "columns", "scale", "labels"), [(0, 1, 1, None), (1, 0, 1, None), (1, 1, 0, None), (2, 1, 1, ["one"])]
)
def test_an_impossible_grid_is_refused(n: int, columns: int, scale: int, labels: list[str] | None) -> None:
    with pytest.raises(EtudeError, match="grid"):
        image_grid(torch.zeros(n, 3, 4, 4, dtype=torch.uint8), columns, scale, labels)
