"""A benchmark is paired, pinned by its hash, and after a kill it ends with the bytes of one that was not killed."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from etude.bench.bench_page import LARGEST_SIDE, LOUD, contact_sheet
from etude.bench.cells import SHOWN, Cell, entries, parts
from etude.bench.protocol import Protocol, pin, protocol_names, protocol_text, read_protocol
from etude.cli.app import app
from etude.config import LoraConfig, SamplerSettings
from etude.config.yaml_text import parse_yaml
from etude.errors import EtudeError
from etude.measuring.gap import reward_gap
from etude.measuring.pairs import Measurement
from etude.measuring.statistics import Estimate
from etude.policies.source import ModelSource
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.prompts import load_prompts
from etude.report.grids import GAP
from etude.rewards import register
from etude.sampling.sampler import SDE
from etude.training.inputs import prompts_digest
from support.adapters import peft, write
from support.tiny import save_stable_diffusion, stable_diffusion, stable_diffusion_xl

PROTOCOL = """
name: tiny
prompts: {prompts}
num_prompts: 3
images_per_prompt: 2
sampler: {{steps: 3, guidance: 2}}
samplers: [{{eta: 1.2}}]
rewards: [colorfulness, "diversity:pixels"]
sensitivity: {{solvers: [heun], steps: [2], guidance: [1], sizes: [16]}}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A base model, an adapter of it that changes nothing, one that does, and a protocol."""
    root = tmp_path_factory.mktemp("bench")
    save_stable_diffusion(root / "base")
    tuned = StableDiffusionPolicy(stable_diffusion())
    tuned.add_lora(LoraConfig(), seed=0)
    tuned.export(root / "untrained" / "lora")
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.05)
    tuned.export(root / "trained" / "lora")
    (root / "prompts.txt").write_text("sun\nmoon\nSun\nstars\nrain\n")
    (root / "tiny.yaml").write_text(PROTOCOL.format(prompts=root / "prompts.txt"))
    return root


def bench(places: Path, out: Path, *more: str, code: int = 0, batch: int = 4, protocol: Path | None = None) -> str:
    words = ["bench", str(places / "base"), "--protocol", str(protocol or places / "tiny.yaml"), "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--batch-size", str(batch), *more])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def done(places, tmp_path_factory) -> Path:
    """A benchmark of the base model and both adapters, with the sensitivity table."""
    out = tmp_path_factory.mktemp("done") / "bench"
    adapters = [word for name in ("untrained", "trained") for word in ("--lora", str(places / name / "lora"))]
    bench(places, out, "--sensitivity", *adapters)
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_an_adapter_that_changes_nothing_differs_by_exactly_nothing(done):
    rows = {
        (row["model"], row["against"]): row["difference"]["colorfulness"] for row in results(done)["between_models"]
    }
    assert set(rows) == {("untrained", "base"), ("trained", "base"), ("trained", "untrained")}
    assert [rows["untrained", "base"][key] for key in ("mean", "low", "high")] == [0, 0, 0]
    assert rows["trained", "base"] == rows["trained", "untrained"]
    assert rows["trained", "base"]["mean"] != 0


def test_the_difference_of_samplers_is_the_reward_gap_of_etude_gap(places, done):
    """To the accuracy of batches of another shape."""
    rows = results(done)["around_the_sampler"]
    (row,) = [row for row in rows if (row["model"], row["kind"]) == ("base", "sampler")]
    measurement = Measurement.of(["colorfulness"], ["sun", "moon", "stars"], num_images=6)
    known = reward_gap(ModelSource(places / "base"), sampler=SDE(1.2, 3, guidance=2.0), measurement=measurement)
    gap, found = known["colorfulness", 1.2].gap, Estimate.from_dict(row["difference"]["colorfulness"])
    assert -found.mean == pytest.approx(gap.mean, abs=0.05)
    assert found.clusters == gap.clusters == 3


def test_the_sensitivity_table_has_every_model_at_every_value_with_its_improvement_there(done):
    rows = [row for row in results(done)["around_the_sampler"] if row["kind"] == "sensitivity"]
    samplers = ["heun, 3 steps, guidance 2", "ODE, 2 steps, guidance 2", "ODE, 3 steps, guidance 1"]
    samplers += ["ODE, 3 steps, guidance 2, 16 px"]
    keys = [(sampler, model) for sampler in samplers for model in ("base", "untrained", "trained")]
    assert [(row["sampler"], row["model"]) for row in rows] == keys
    assert all(("improvement" in row) == (row["model"] != "base") for row in rows)
    scores = {
        (row["model"], json.dumps(row["sampler"])): row["scores"]["colorfulness"] for row in results(done)["scores"]
    }
    for row, key in zip(rows, keys, strict=True):
        if key[1] == "untrained":
            assert row["improvement"]["colorfulness"]["mean"] == 0
    assert len(scores) == 3 * 6


def test_a_killed_benchmark_ends_with_the_bytes_of_one_that_was_not(places, tmp_path, monkeypatch):
    adapter, images, out = ("--lora", str(places / "trained" / "lora")), Measurement.images, tmp_path / "killed"
    for calls in (0, 1, 4):  # each time it comes that many parts further
        left = [calls]

        def until(*args, left=left, **options):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return images(*args, **options)

        monkeypatch.setattr(Measurement, "images", until)
        bench(places, out, *adapter, code=130)
        if files := sorted((out / "cells").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
            with files[-1].open("ab") as file:
                file.write(b'{"samples": [0, 1')  # as a kill leaves a line
    monkeypatch.setattr(Measurement, "images", images)
    bench(places, out, *adapter)
    bench(places, tmp_path / "whole", *adapter)
    for name in ("results.json", "results.md", "contact-sheet.png", "index.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(Measurement, "images", never)
    bench(places, out, *adapter)
    assert (out / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


def test_a_damaged_cell_is_named_and_another_model_under_the_same_name_is_measured_anew(places, tmp_path):
    out = tmp_path / "bench"
    bench(places, out, "--lora", str(places / "untrained" / "lora"))
    file = min((out / "cells").glob("untrained-*.jsonl"))
    file.write_text(file.read_text().replace('"samples": [0', '"samples": [9'))
    assert f"'{file}' is damaged" in bench(places, out, "--lora", str(places / "untrained" / "lora"), code=1)
    other = tmp_path / "untrained" / "lora"
    other.parent.mkdir()
    (places / "trained" / "lora").rename(other)
    try:
        bench(places, out, "--lora", str(other))
    finally:
        other.rename(places / "trained" / "lora")
    assert results(out)["between_models"][0]["difference"]["colorfulness"]["mean"] != 0


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_computed(places, tmp_path, monkeypatch):
    write(tmp_path / "foreign", peft(stable_diffusion_xl().unet, "unet")[0])
    monkeypatch.setattr(Measurement, "images", lambda *_: pytest.fail("an image was drawn"))
    adapters = "--lora", str(places / "trained" / "lora"), "--lora", str(tmp_path / "foreign")
    assert "does not fit the model" in bench(places, tmp_path / "out", *adapters, code=1)
    assert not (tmp_path / "out").exists()


def test_results_of_another_protocol_are_named_loudly_and_not_compared(places, done, tmp_path):
    again = bench(places, tmp_path / "again", "--against", str(done))
    assert LOUD not in again
    row = results(tmp_path / "again")["earlier"][0]["differences"][0]
    assert (row["model"], row["difference"]["colorfulness"]["mean"]) == ("base", 0)
    text = (places / "tiny.yaml").read_text().replace("steps: 3", "steps: 2").replace("guidance: 2}", "guidance: 4}")
    (tmp_path / "other.yaml").write_text(text)
    out = tmp_path / "other"
    printed = bench(places, out, "--against", str(done), protocol=tmp_path / "other.yaml")
    differs = "steps 3 there and 2 here, guidance 2.0 there and 4.0 here"
    for shown in (printed, (out / "results.md").read_text(), (out / "index.html").read_text()):
        assert LOUD in shown
        assert differs in shown
    assert results(out)["earlier"][0]["differences"] == []


def test_damaged_results_of_the_same_hash_are_named(places, done, tmp_path):
    damaged = results(done)
    damaged["scores"][0]["scores"]["colorfulness"].pop()
    (tmp_path / "results.json").write_text(json.dumps(damaged))
    said = bench(places, tmp_path / "out", "--against", str(tmp_path), code=1)
    assert "are damaged: they lack scores of the protocol" in said


def test_results_say_what_measured_each_cell_and_mixed_versions_are_told(places, done, tmp_path):
    known, adapters = (
        results(done),
        [word for name in ("untrained", "trained") for word in ("--lora", str(places / name / "lora"))],
    )
    (environment,) = known["environments"]
    assert environment["torch"] == torch.__version__
    assert all(row["environments"] == [0] for row in known["scores"])
    assert f"torch {torch.__version__}" in (done / "results.md").read_text()
    mixed = tmp_path / "mixed"
    shutil.copytree(done, mixed)
    file = min((mixed / "cells").glob("trained-*.jsonl"))
    file.write_text(file.read_text().replace(torch.__version__, "1.0.0"))
    said = "Measured with several versions or processors, whose rounding enters the differences"
    assert said not in (done / "results.md").read_text()
    assert said in bench(places, mixed, "--sensitivity", *adapters)
    assert [row["environments"] for row in results(mixed)["scores"]].count([1]) == 1


def test_a_directory_takes_one_protocol_and_one_batch_size(places, done, tmp_path):
    assert "give --batch-size 4" in bench(places, done, batch=2, code=1)
    (tmp_path / "other.yaml").write_text((places / "tiny.yaml").read_text().replace("steps: 3", "steps: 2"))
    assert "another protocol" in bench(places, done, protocol=tmp_path / "other.yaml", code=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "holds no benchmark" in bench(places, tmp_path / "full", code=1)


def protocol(places: Path, **changes: object) -> Protocol:
    return Protocol.model_validate({**parse_yaml((places / "tiny.yaml").read_text(), "tiny"), **changes})


def test_the_hash_is_of_the_content_and_not_of_names_and_places(places, tmp_path):
    known = pin(protocol(places)).hash
    (tmp_path / "elsewhere.txt").write_text("sun\nmoon\nstars\nsnow\n")
    same = {"name": "other", "prompts": str(tmp_path / "elsewhere.txt"), "samplers": [], "sensitivity": {}}
    same |= {"rewards": ["diversity:pixels", "colorfulness"], "num_prompts": 3}
    assert pin(protocol(places, **same)).hash == known
    changes = [
        {"num_prompts": 2}, {"images_per_prompt": 3}, {"seed": 1}, {"sampler": {"steps": 4, "guidance": 2}},
        {"sampler": {"steps": 3, "guidance": 2, "eta": 0.5}}, {"sampler": {"steps": 3, "guidance": 2, "size": 16}},
        {"dtype": "bfloat16"}, {"shift": 2.0}, {"rewards": ["colorfulness"]},
    ]  # fmt: skip
    hashes = {pin(protocol(places, **change)).hash for change in changes}
    assert len({known, *hashes}) == 1 + len(changes)


def test_prompts_are_used_once_and_must_have_the_digest_that_a_protocol_names(places):
    pinned = pin(protocol(places))
    assert pinned.prompts.texts == ["sun", "moon", "stars"]
    assert pin(protocol(places, prompts_digest=prompts_digest(pinned.prompts))).hash == pinned.hash
    with pytest.raises(EtudeError, match=f"have the digest {prompts_digest(pinned.prompts)}"):
        pin(protocol(places, prompts_digest="0" * 64))
    with pytest.raises(EtudeError, match=r"uses 5 prompts, and .* holds 4 without repeats"):
        pin(protocol(places, num_prompts=5))


def test_diversity_of_single_images_is_refused_before_a_model_is_loaded(places):
    with pytest.raises(EtudeError, match=r"a prompt has 1: set images_per_prompt to 2"):
        pin(protocol(places, images_per_prompt=1))


def test_the_hash_is_of_what_the_server_of_a_reward_says_that_it_computes(places):
    class Served:
        served = None

        def load(self):
            self.served = computes

    hashes = set()
    for computes in ("one", "one", "another"):  # noqa: B007 - read by load
        register("served")(Served)
        hashes.add(pin(protocol(places, rewards=["served"])).hash)
    assert len(hashes) == 2


def test_a_reward_from_the_hub_must_name_its_commit(places):
    pin(protocol(places, rewards=["pickscore"]))  # whose defaults are pinned
    with pytest.raises(EtudeError, match=r"reads owner/clip at whatever commit .* clip_score:owner/clip@COMMIT\."):
        pin(protocol(places, rewards=["clip_score:owner/clip"]))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ("steps: 4", "unknown key 'steps': did you mean 'sampler.steps'"),
        ("seed: -1", "seed = -1"),
        ("sampler: {solver: heun, eta: 1}", "solver heun is deterministic"),
        ("rewards: []", "rewards"),
        ("rewards: [colorfulness, colorfulness]", "stands there twice"),
        ("- a", "must hold a mapping"),
    ],
)
def test_a_protocol_that_cannot_be_is_one_sentence(tmp_path, changes, problem):
    whole = "name: p\nprompts: emoji-eval\n" + ("" if "rewards" in changes else "rewards: [colorfulness]\n")
    (tmp_path / "p.yaml").write_text(changes if changes.startswith("-") else whole + changes)
    with pytest.raises(EtudeError, match=problem):
        read_protocol(str(tmp_path / "p.yaml"))


def test_sensitivity_moves_one_axis_at_a_time_or_all(places):
    axes = {"solvers": ["heun"], "steps": [2, 6], "guidance": [1], "sizes": [16]}
    one = pin(protocol(places, sensitivity=axes)).variations
    assert len(one) == 5
    for each in one:
        point = pin(protocol(places)).sampler.model_dump()
        assert sum(value != point[key] for key, value in each.model_dump().items()) == 1
    assert len(pin(protocol(places, sensitivity={**axes, "product": True})).variations) == 2 * 3 * 2 * 2 - 1
    stochastic = {"steps": 3, "guidance": 2, "eta": 0.5}
    with pytest.raises(EtudeError, match=r"sensitivity.solvers are deterministic, and the sampler has eta 0.5"):
        pin(protocol(places, sampler=stochastic)).variations  # noqa: B018
    assert (
        len(pin(protocol(places, sampler=stochastic, sensitivity={"steps": [2]})).variations) == 3
    )  # 2 steps, guidance 1 and 3


def test_the_built_in_protocols_are_valid_and_those_of_embedded_models_are_pinned():
    for name in protocol_names():
        settings = read_protocol(name)
        assert settings.name == name
        assert protocol_text(name).startswith("# ")
        if settings.prompts.startswith("hub:"):
            assert not {"alignment"} & set(settings.rewards)  # which embeds emoji names alone
        else:
            assert settings.prompts_digest == prompts_digest(load_prompts(settings.prompts).head(settings.num_prompts))
            assert pin(settings).hash


def test_a_part_is_whole_prompts_and_all_parts_are_every_image_once():
    measurement = Measurement.of(["colorfulness"], list("abcde"), num_images=15, images_per_prompt=3)
    for batch_size in (1, 6, 7, 100):
        planned = list(parts(measurement, batch_size))
        assert sorted(i for part in planned for i in part) == list(range(15))
        for part in planned:
            texts = measurement.shown(part).texts
            assert all(texts.count(text) == 3 for text in texts)
            assert len(set(texts)) == max(1, batch_size // 3) or part == planned[-1]


def test_adapters_get_short_names_and_no_two_the_same():
    places = ["/x/runs/first/lora", "/y/first/lora", "/z/style.safetensors", "/x/runs/first/lora-best"]
    found = entries(ModelSource("m"), [Path(place) for place in places])
    assert [entry.label for entry in found] == ["base", "first", "first/lora", "style", "first/lora-best"]
    assert found[0].source.lora is None


def test_images_of_two_sizes_are_not_said_to_share_noise(places, done):
    said = "Images of two sizes share the prompt and no noise."
    tables = (done / "results.md").read_text().split("## ")
    assert [table.splitlines()[0] for table in tables if said in table] == ["Sensitivity"]


def test_a_large_image_is_made_smaller_for_the_contact_sheet(tmp_path):
    for name, size in (("wide", (1024, 512)), ("small", (64, 32))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    cells = [
        Cell(name, {}, SamplerSettings().filled(), {}, (tmp_path / f"{name}.png",), ()) for name in ("wide", "small")
    ]
    sheet = Image.open(io.BytesIO(contact_sheet(cells, ["sun"])))
    assert sheet.width == LARGEST_SIDE + 2 * GAP
    reds = [sheet.getpixel((sheet.width // 2, y)) == (255, 0, 0) for y in range(sheet.height)]
    assert sum(reds) == 2 * LARGEST_SIDE // 2


def test_the_contact_sheet_shows_the_first_prompts_of_every_cell(done):
    pictures = sorted(path.name for path in (done / "cells").glob("base-*.png"))
    assert len(pictures) == 6 * min(SHOWN, 6)


GENEVAL = "a photo of a bench\na photo of two clocks\na photo of a bench\n"
DPG = """item_id,text,keywords,proposition_id,dependency,question_natural_language
partiprompts0,"A tall, red tower",,1,0,Is there a tower?
partiprompts0,"A tall, red tower",,2,1,Is the tower red?
coco1,Two dogs on a bench,,1,0,Are there dogs?
"""


@pytest.mark.parametrize(
    ("name", "file", "text", "texts"),
    [
        ("geneval", "generation_prompts.txt", GENEVAL, ["a photo of a bench", "a photo of two clocks"]),
        ("dpg", "dpg_bench.csv", DPG, ["A tall, red tower", "Two dogs on a bench"]),
    ],
)
def test_published_prompts_are_read_from_their_authors_files_at_a_commit(
    name, file, text, texts, tmp_path, monkeypatch
):
    """A stand-in of the same layout takes the place of the file that the protocol names."""
    asked = []

    class Table(dict):
        column_names = property(list)

    def load_dataset(builder, config, *, split, revision, data_files):
        asked.append((builder, split, revision, data_files))
        if builder == "text":
            return Table(text=text.splitlines())
        rows = list(csv.DictReader(io.StringIO(text)))
        return Table({column: [row[column] for row in rows] for column in rows[0]})

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", module)
    pinned = pin(read_protocol(name))
    assert pinned.prompts.texts == texts
    ((builder, split, revision, url),) = asked
    assert (builder, split, revision) == ({"geneval": "text", "dpg": "csv"}[name], "train", None)
    assert re.fullmatch(rf"https://raw\.githubusercontent\.com/[\w/]+/[0-9a-f]{{40}}/[\w/]+/{re.escape(file)}", url)
